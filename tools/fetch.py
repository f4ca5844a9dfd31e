"""Bring the paper's data sets and models from the Hugging Face hub; what is already there is skipped.

    python tools/fetch.py list
    python tools/fetch.py data [--sets dolly self-inst vicuna sinst uinst] [--data-root data]
    python tools/fetch.py models [--names gpt2 teacher-gpt2-1.5B] [--checkpoints-root checkpoints]

Weights come as safetensors only, and no code comes from the hub.
"""

import errno
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, XetDownloadError

from pocl.cli.flags import flag, parse
from pocl.cli.process import run_main
from pocl.common.console import say
from pocl.common.errors import UserError, closest, first_line
from pocl.common.files import read_jsonl, replace_folder, write_text


@dataclass(frozen=True)
class File:
    """One JSONL file of a data set."""

    repo: str
    path: str  # under --data-root
    num_records: int  # of the paper; a longer file is cut where ``cut`` says so
    cut: bool = False


@dataclass(frozen=True)
class Model:
    """One model of the hub."""

    repo: str
    path: str  # under --checkpoints-root, as scripts/<family>/env.sh expects it


SETS: dict[str, tuple[File, ...]] = {
    "dolly": (
        File("MiniLLM/dolly", "dolly/raw.jsonl", 12_435),
        File("MiniLLM/dolly", "dolly/valid.jsonl", 500),
    ),
    "self-inst": (File("MiniLLM/self-inst", "self-inst/valid.jsonl", 242),),
    "vicuna": (File("MiniLLM/Vicuna", "vicuna/valid.jsonl", 80),),
    "sinst": (File("MiniLLM/sinst", "sinst/11_/valid.jsonl", 1_694),),
    "uinst": (File("MiniLLM/uinst", "uinst/11_/valid.jsonl", 10_000, cut=True),),
}

MODELS: dict[str, Model] = {
    "gpt2": Model("openai-community/gpt2", "gpt2/base"),
    "gpt2-medium": Model("openai-community/gpt2-medium", "gpt2/medium"),
    "gpt2-large": Model("openai-community/gpt2-large", "gpt2/large"),
    "gpt2-xl": Model("openai-community/gpt2-xl", "gpt2/xlarge"),
    "teacher-gpt2-1.5B": Model("MiniLLM/teacher-gpt2-1.5B", "gpt2/teacher-1.5B"),
    "opt-350m": Model("facebook/opt-350m", "opt/350m"),
    "opt-2.7b": Model("facebook/opt-2.7b", "opt/2.7b"),
    "Qwen2-0.5B": Model("Qwen/Qwen2-0.5B", "qwen2/0.5b"),
    "Qwen2-1.5B": Model("Qwen/Qwen2-1.5B", "qwen2/1.5b"),
    "Qwen3-0.6B": Model("Qwen/Qwen3-0.6B", "qwen3/0.6b"),
    "Qwen3-1.7B": Model("Qwen/Qwen3-1.7B", "qwen3/1.7b"),
    "Llama-3.2-1B-Instruct": Model("meta-llama/Llama-3.2-1B-Instruct", "llama3/1b"),
    "Llama-3.2-3B-Instruct": Model("meta-llama/Llama-3.2-3B-Instruct", "llama3/3b"),
    "gemma-3-270m-it": Model("google/gemma-3-270m-it", "gemma3/270m"),
    "gemma-3-1b-it": Model("google/gemma-3-1b-it", "gemma3/1b"),
    "SmolLM2-135M": Model("HuggingFaceTB/SmolLM2-135M", "smollm2/135m"),
    "SmolLM2-360M": Model("HuggingFaceTB/SmolLM2-360M", "smollm2/360m"),
}

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
WEIGHTS_INDEX = "model.safetensors.index.json"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class DataOptions:
    """Which data sets."""

    _argument_group_name: ClassVar[str] = "data"
    sets: list[str] = flag(f"which of {', '.join(SETS)}", list(SETS), known=SETS)
    data_root: str = flag("folder to put them into", "data")


@dataclass(frozen=True)
class ModelsOptions:
    """Which models."""

    _argument_group_name: ClassVar[str] = "models"
    names: list[str] = flag(f"which of {', '.join(MODELS)}", ["gpt2", "teacher-gpt2-1.5B"], known=MODELS)
    checkpoints_root: str = flag("folder to put them into", "checkpoints")
    revision: str | None = flag("branch, tag, commit or refs/pr/N of the repository; with one of --names", None)

    def check(self) -> None:
        """Raise UserError for a revision of several repositories."""
        if self.revision and len(self.names) != 1:
            raise UserError(f"--revision belongs to one repository, --names has {len(self.names)}")


@dataclass(frozen=True)
class ListOptions:
    """Where to look for what is already there."""

    _argument_group_name: ClassVar[str] = "list"
    data_root: str = flag("folder of the data sets", "data")
    checkpoints_root: str = flag("folder of the models", "checkpoints")


class Unreachable(Exception):
    """The hub did not give what was asked for; the message says why."""


def main() -> None:
    """Dispatch on the first argument."""
    commands: dict[str, tuple[type, Callable[[Any], None]]] = {
        "data": (DataOptions, fetch_data),
        "models": (ModelsOptions, fetch_models),
        "list": (ListOptions, list_all),
    }
    command, *rest = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        say(f"{__doc__}\n`python tools/fetch.py data --help` lists the flags of data; models and list likewise.")
        return
    if command not in commands:
        given = f"; got {command!r}{closest(command, commands)}" if command else ""
        raise UserError(f"say what to fetch: data, models or list{given} (--help explains)")
    kind, run = commands[command]
    (what,) = parse([kind], f"fetch.py {command}: {run.__doc__}", rest)
    run(what)


def fetch_data(what: DataOptions) -> None:
    """Bring data sets into --data-root."""
    files = {Path(what.data_root) / file.path: file for name in what.sets for file in SETS[name]}
    bring(files, Path.is_file, fetch_file, "data/README.md says what a line holds")


def fetch_models(what: ModelsOptions) -> None:
    """Bring models into --checkpoints-root."""
    models = {Path(what.checkpoints_root) / MODELS[name].path: MODELS[name] for name in what.names}
    needed = "each a folder of config.json, *.safetensors and the tokenizer's files"
    bring(models, is_model, partial(fetch_model, revision=what.revision), needed)


def list_all(what: ListOptions) -> None:
    """Show what can be fetched, where it goes, and whether it is there."""
    for name, files in SETS.items():
        for file in files:
            place = Path(what.data_root) / file.path
            say(f"{'there  ' if place.is_file() else 'missing'}  data    {name:17}  {place}  <- {file.repo}")
    for name, model in MODELS.items():
        place = Path(what.checkpoints_root) / model.path
        say(f"{'there  ' if is_model(place) else 'missing'}  models  {name:17}  {place}  <- {model.repo}")


def bring(
    wanted: Mapping[Path, Any], is_there: Callable[[Path], bool], fetch: Callable[[Any, Path], None], needed: str
) -> None:
    """Fetch what is not in its place yet.  Raises UserError that says why something is not, and what to put there."""
    missing: list[Path] = []
    repos_of: dict[str, dict[str, None]] = {}  # by the reason
    for place, thing in wanted.items():
        if is_there(place):
            say(f"{place} is already there")
            continue
        try:
            fetch(thing, place)
        except Unreachable as error:
            missing.append(place)
            repos_of.setdefault(str(error), {})[thing.repo] = None
    if missing:
        reasons = "; ".join(f"{reason} ({', '.join(repos)})" for reason, repos in repos_of.items())
        raise UserError(
            f"the hub did not give everything: {reasons}. Run the command again where there is a network, or place by "
            f"hand: {', '.join(map(str, missing))} ({needed})"
        )


def is_model(folder: Path) -> bool:
    """Whether this is a whole model folder; folders are put in place only when they are."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def fetch_file(file: File, place: Path) -> None:
    """Download one JSONL file, check every line, and put it in its place.  Raises Unreachable."""
    commit, names = repository(file.repo, "dataset")
    name = choose_file(names, file.path)
    if name is None:
        found = ", ".join(n for n in names if n.endswith(".jsonl")) or "none"
        raise Unreachable(f"no {Path(file.path).name} among the JSONL files {found}")
    copy = Path(ask_hub(huggingface_hub.hf_hub_download, file.repo, name, repo_type="dataset", revision=commit))
    read_jsonl(copy)
    lines = copy.read_bytes().splitlines(keepends=True)[: file.num_records if file.cut else None]
    write_text(place, b"".join(lines).decode("utf-8"))
    note = "" if len(lines) == file.num_records else f"; note: the paper's has {file.num_records}"
    say(f"{place}: {len(lines)} records of {file.repo}/{name} (commit {commit[:12]}){note}")


def choose_file(names: Collection[str], path: str) -> str | None:
    """The repository's file that is meant by ``path``: the longest common end, such as 11_/valid.jsonl, wins."""
    parts = Path(path).parts
    for i in range(len(parts)):
        wanted = "/".join(parts[i:])
        matches = sorted((n for n in names if n == wanted or n.endswith("/" + wanted)), key=len)
        if matches:
            return matches[0]
    return None


def fetch_model(model: Model, place: Path, revision: str | None) -> None:
    """Download configuration, tokenizer and safetensors, and put the folder in its place.  Raises Unreachable."""
    if place.exists() and any(place.iterdir()):
        raise UserError(f"{place} holds something that is no whole model; move it away and run the command again")
    commit, names = repository(model.repo, "model", revision)
    wanted = model_files(names)
    if not any(WEIGHTS.fullmatch(name) for name in wanted):
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        raise UserError(
            f"{model.repo} has no safetensors{f', only pickled weights ({pickled[0]})' if pickled else ''}, "
            f"and pickled weights may run code when loaded; fetch a revision that has them (--revision refs/pr/N), or "
            f"convert them where you trust their authors: save_pretrained to {place}, the tokenizer too"
        )
    say(f"{model.repo}: {len(wanted)} files (commit {commit[:12]}) ...")
    # The folder keeps its name until it is whole, so that a download that was cut off goes on where it stopped.
    temporary = place.with_name(place.name + ".part")
    ask_hub(
        huggingface_hub.snapshot_download,
        model.repo,
        revision=commit,
        local_dir=temporary,
        allow_patterns=wanted,
    )
    missing = [name for name in wanted if not (temporary / name).is_file()]
    if missing:
        raise Unreachable(f"{', '.join(missing)} did not arrive")
    shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the hub's own notes
    replace_folder(temporary, place)
    say(f"{place} is there")


def model_files(names: Collection[str]) -> list[str]:
    """Of a repository's files: configuration, tokenizer, safetensors and their index; nothing that can run."""
    indices = [name for name in names if name.endswith(".index.json") and name != WEIGHTS_INDEX]
    return [
        name
        for name in names
        if "/" not in name
        and name not in indices
        and (WEIGHTS.fullmatch(name) or name.endswith((".json", ".txt", ".model", ".jinja")))
    ]


def repository(repo: str, repo_type: str, revision: str | None = None) -> tuple[str, list[str]]:
    """(commit, names of the files) of a repository.  Raises Unreachable."""
    info = ask_hub(huggingface_hub.HfApi().repo_info, repo, repo_type=repo_type, revision=revision)
    return info.sha, [file.rfilename for file in info.siblings]


def ask_hub(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of huggingface_hub.  Raises Unreachable where the hub does not answer as hoped."""
    try:
        return function(*args, **kwargs)
    except (HTTPError, XetDownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise UserError(f"cannot write what the hub gives: {error}") from error
        if isinstance(error, OfflineModeIsEnabled):
            raise Unreachable("offline mode is on, HF_HUB_OFFLINE") from error
        raise Unreachable(first_line(error)) from error


if __name__ == "__main__":
    run_main(main)
