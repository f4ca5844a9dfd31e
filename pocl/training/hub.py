"""A run's best student on a hub: what is looked at before the run, and the upload behind it."""

from pathlib import Path

from pocl.common.errors import RunStopped, UserError, first_line


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"`push_to_hub` {name!r} is no name of a repository: {first_line(error)}") from error


def check_account(name: str) -> None:
    """Raise UserError unless the hub answers and knows who asks: better now than when the run has ended."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network, offline mode: each has its own exception
        raise UserError(
            f"`push_to_hub` {name}: the hub does not know this account ({first_line(error)}); log in with: hf auth "
            f"login; or leave it out and upload best/ later: hf upload {name} FOLDER"
        ) from error


def push(folder: Path, name: str) -> str:
    """Upload a model folder to a repository, which is made as a private one if it is not there -> its address.

    Raises RunStopped, with the command that does it by hand, where the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="A student trained by POCL")
    except Exception as error:
        raise RunStopped(
            f"{folder} is complete, but could not be uploaded to {name}: {first_line(error)}; the same command tries "
            f"again, as does hf upload {name} {folder}"
        ) from error
    return str(repository)
