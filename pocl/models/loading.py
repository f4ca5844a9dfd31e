"""Models, configurations and tokenizers from folders or the hub, with errors that say what is missing or refused."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.initialization import no_init_weights
from transformers.utils.peft_utils import find_adapter_config_file

from pocl.common.errors import UserError, first_line
from pocl.data.templates import Template, saved_template
from pocl.models import fields
from pocl.models.attention import attend_by_example
from pocl.models.lora import about_base, adapter_chain, merge_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOADING_ERRORS = (
    OSError,
    ImportError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, adapter folder or hub name; an adapter without one uses its base's.

    Raises UserError if there is none or it has no end-of-text token.
    """
    base, adapters = adapter_chain(path)
    with about_base(path, base):
        return _load_tokenizer(next((str(folder) for folder in reversed(adapters) if _has_tokenizer(folder)), base))


def load_template(path: str) -> Template | None:
    """The template that a model folder or adapter folder says it was trained with; None where none says one."""
    base, adapters = adapter_chain(path)
    found = (saved_template(folder) for folder in [*map(str, reversed(adapters)), base])
    return next((template for template in found if template is not None), None)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    _check_place(path)
    # Without any of these files AutoTokenizer returns an empty tokenizer, silently.
    if Path(path).is_dir() and not _has_tokenizer(Path(path)):
        raise UserError(f"no tokenizer in {path!r}: none of {', '.join(_TOKENIZER_FILES)} exists")
    fields.check_fields(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        if Path(path).is_dir() and (Path(path) / "config.json").is_file():  # it reads that, too, which may be at fault
            _read_config(path)
        folder = Path(path)
        old = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        if old and find_spec("sentencepiece") is None:
            raise UserError(
                f"the tokenizer in {path!r} is a tokenizer.model, which needs the package sentencepiece; pip install "
                f"sentencepiece, or save it elsewhere with save_pretrained, which writes tokenizer.json"
            ) from error
        raise _not_loaded("no tokenizer in", path, error) from error
    if tokenizer.eos_token_id is None and (Path(path) / "config.json").is_file():
        _check_causal(path, _read_config(path))
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path!r} has no end-of-text token; every response must end with one")
    return tokenizer


def load_model(path: str, dtype: str = "fp32", attention_name: str = "auto") -> PreTrainedModel:
    """A causal language model from safetensors, in evaluation mode on the CPU; an adapter folder's is merged.

    ``attention_name`` is transformers' name of the implementation; ``auto`` is this project's wherever that would be
    sdpa.  Raises UserError if the folder holds no configuration or no safetensors; pickled weights and remote code
    are refused, since both run a stranger's code.
    """
    base, adapters = adapter_chain(path)
    with about_base(path, base):
        model = _load_whole(base, dtype, attention_name)
    for folder in adapters:
        merge_adapter(model, folder)
    model.eval()
    return model


def load_skeleton(path: str, dtype: str = "fp32") -> PreTrainedModel:
    """The same model without its weights: call it under FakeTensorMode, where tensors have shapes but no memory.

    Raises UserError if ``load_model`` would not find a configuration or weights.
    """
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(path), dtype=DTYPES[dtype])
    model.tie_weights()  # which is left out with the initial weights
    fuse_activations(model)
    return model


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model folder, adapter folder (its base's) or hub name, and nothing else of it.

    Raises UserError if ``load_model`` would not find one.
    """
    base, _ = adapter_chain(path)
    with about_base(path, base):
        return _load_config(base)


def _load_config(path: str) -> PretrainedConfig:
    _check_place(path)
    if Path(path).is_dir():
        _check_folder(Path(path))
    config = _read_config(path)
    _check_causal(path, config)
    return config


def _check_causal(path: str, config: PretrainedConfig) -> None:
    """Raise UserError for a model that does not write a text from left to right."""
    if getattr(config, "is_encoder_decoder", False):
        why = "is an encoder with a decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        why = "sees the tokens behind the one that it writes, too"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        why = "has no such model in transformers"
    else:
        return
    raise UserError(f"{path!r} is no causal language model ({config.model_type} {why}); give one, such as a GPT-2")


def _read_config(path: str) -> PretrainedConfig:
    fields.check_fields(Path(path))
    try:
        if not Path(path).is_dir() and find_adapter_config_file(path):  # transformers would not merge it
            raise UserError(f"{path} is an adapter on the hub; download it to a folder, and give that")
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config
    except UserError:
        raise
    except _LOADING_ERRORS as error:
        raise _not_loaded("cannot load a model from", path, error) from error


def _check_place(path: str) -> None:
    """Raise UserError if no model can be there: neither a folder nor a possible hub name, or the folder of a run."""
    folder = Path(path)
    if not folder.is_dir() and (folder.is_absolute() or path.startswith((".", "~")) or len(folder.parts) > 2):
        way = "a run saves its student there, and scripts/<family>/sft/teacher.sh trains a teacher"
        if folder.name != "best":
            way = "python tools/fetch.py models downloads those of the scripts (python tools/fetch.py list names them)"
        raise UserError(
            f"{path} is not a folder; a model needs config.json, model.safetensors and its tokenizer; {way}"
        )
    if not (folder / "config.json").is_file() or not (folder / "best").is_dir():
        return
    if not _has_tokenizer(folder) and not list(folder.glob("*.safetensors")):
        raise UserError(f"{path} is a run's folder; its student is {folder / 'best'}")


def _not_loaded(what: str, path: str, error: Exception) -> UserError:
    """The error for a model that a library did not load; a hub name is first reported as not being a folder here."""
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    reason = None
    if not Path(path).is_dir() and not any(isinstance(cause, GatedRepoError) for cause in causes):
        if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
            reason = "the hub could not be reached"
        elif any(isinstance(cause, (RepositoryNotFoundError, HFValidationError)) for cause in causes):
            reason = "the hub has no model of this name"
    if reason:
        return UserError(f"there is no folder {path!r} here, and {reason}; give a model folder")
    return UserError(f"{what} {path!r}: {fields.reason(Path(path), error)}")


def _load_whole(path: str, dtype: str, attention_name: str) -> PreTrainedModel:
    config = _load_config(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=None if attention_name == "auto" else attention_name,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _LOADING_ERRORS as error:
        raise _not_loaded("cannot load a model from", path, error) from error
    except SafetensorError as error:
        raise UserError(f"the weights in {path!r} are damaged: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers fills them with random numbers, and only warns
        raise UserError(f"the weights in {path!r} lack {len(missing)} tensor(s), such as {missing[0]}")
    model.config.use_cache = False
    fuse_activations(model)
    if attention_name == "auto":
        attend_by_example(model)
    return model


def fuse_activations(model: nn.Module) -> None:
    """Replace GPT-2's GELU, eight operations in transformers, by torch's single kernel for the same function.

    The backward pass then keeps one tensor for it instead of four.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; a model needs config.json, model.safetensors, its tokenizer")
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        if pickled:
            raise UserError(
                f"{folder} holds pickled weights ({pickled[0]}), which may run code when loaded; "
                f"save the model again with save_pretrained, which writes safetensors"
            )
        raise UserError(f"{folder} holds no weights (model.safetensors)")
