"""Student, teacher and tokenizer: loading with checks, trunk and head apart, the vocabulary that both models share."""

import hashlib
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
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils.peft_utils import find_adapter_config_file

from pocl.common.errors import UserError, first_line
from pocl.data.dataset import Batch, tokenizer_fingerprint
from pocl.losses.head import make_head
from pocl.models import attention
from pocl.models.lora import about_base, adapter_chain, merge_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOADING_ERRORS = (
    OSError,
    ImportError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
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


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    _check_place(path)
    # Without any of these files AutoTokenizer returns an empty tokenizer, silently.
    if Path(path).is_dir() and not _has_tokenizer(Path(path)):
        raise UserError(f"no tokenizer in {path!r}: none of {', '.join(_TOKENIZER_FILES)} exists")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_loaded("no tokenizer in", path, error) from error
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
    return model.eval()


def load_skeleton(path: str, dtype: str = "fp32") -> PreTrainedModel:
    """The same model without its weights: call it under FakeTensorMode, where tensors have shapes but no memory.

    Raises UserError if ``load_model`` would not find a configuration or weights.
    """
    model = AutoModelForCausalLM.from_config(load_config(path), dtype=DTYPES[dtype])
    fuse_activations(model)
    return model


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model folder, adapter folder (its base's) or hub name, and nothing else of it.

    Raises UserError if ``load_model`` would not find one.
    """
    base, _ = adapter_chain(path)
    with about_base(path, base):
        return _load_config(base)


def check_positions(path: str, max_length: int) -> None:
    """Raise UserError if the model has too few positions for ``max_length`` tokens; the last is only predicted."""
    places = getattr(load_config(path), "max_position_embeddings", None)
    if places is not None and max_length - 1 > places:
        raise UserError(f"--max-length {max_length}, but {path!r} reads at most {places} tokens; lower it")


def _load_config(path: str) -> PretrainedConfig:
    _check_place(path)
    if Path(path).is_dir():
        _check_folder(Path(path))
    try:
        if not Path(path).is_dir() and find_adapter_config_file(path):  # transformers would not merge it
            raise UserError(f"{path} is an adapter on the hub; download it to a folder, and give that")
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
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
    return UserError(f"{what} {path!r}: {first_line(error)}")


def _load_whole(path: str, dtype: str, attention_name: str) -> PreTrainedModel:
    config = _load_config(path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
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
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers, and only warns
        raise UserError(f"the weights in {path!r} lack {len(missing)} tensor(s), such as {missing[0]}")
    model.config.use_cache = False
    fuse_activations(model)
    if attention_name == "auto":
        attend_by_example(model)
    return model


def recompute_activations(model: PreTrainedModel, *, enable: bool = True) -> None:
    """Gradient checkpointing on or off: keep one tensor per layer for the backward pass, recompute the rest."""
    # transformers below 5.20 has only the older names.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        arguments = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**arguments)
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def attend_by_example(model: PreTrainedModel) -> None:
    """Make each packed example attend only to itself, if the model's attention is sdpa."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.NAME)


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


def trunk(model: PreTrainedModel) -> nn.Module:
    """The model without its head: token ids in, hidden states after the final norm out."""
    return model.base_model


def response_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The trunk's hidden states at the positions that have a label.  -> [N, H].

    No attention mask is passed: padding is to the right of every response, where a causal trunk never looks. The
    examples of a packed batch are kept apart by ``pocl.models.attention``, or by positions (``pocl.models.packing``).
    """
    others: dict[str, Any] = {}
    if batch.position_ids is not None:
        others["position_ids"] = batch.position_ids
        if model.config._attn_implementation == attention.NAME:
            # A four-dimensional mask is passed through as it is: no other one is made.
            others |= {"segments": batch.segments, "attention_mask": batch.attention_mask[None, None]}
    states = trunk(model)(input_ids=batch.input_ids, use_cache=False, **others).last_hidden_state  # [B, T, H]
    return states.flatten(0, 1).index_select(0, batch.places)


def response_labels(batch: Batch) -> Tensor:
    """The labels of the same positions in the same order.  -> [N]."""
    return batch.labels.flatten().index_select(0, batch.places)


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise UserError if trunk and head apart do not give the model's own logits (on one short sequence).

    ``device`` is where the model runs.
    """
    ids = torch.arange(1, 7, device=device)[None] % model.config.vocab_size
    whole = model(input_ids=ids, use_cache=False).logits.float()
    apart = make_head(model)(trunk(model)(input_ids=ids, use_cache=False).last_hidden_state).float()
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 1e-2
    close = whole.shape == apart.shape and torch.allclose(whole, apart, atol=tolerance, rtol=tolerance, equal_nan=True)
    if not close:
        raise UserError(
            f"{name!r} ({model.config.model_type}) changes its logits after the head in a way that is not known "
            f"here; add it to make_head in pocl/losses/head.py"
        )


def shared_vocabulary(num_tokens: int, **models: PreTrainedModel) -> int | None:
    """How many logits the models keep: None for all, the tokenizer's size if one of them pads its vocabulary.

    Raises UserError if a model has fewer entries than the tokenizer; its keyword says which.
    """
    sizes = {name: _vocab_size(model) for name, model in models.items()}
    for name, size in sizes.items():
        if size < num_tokens:
            raise UserError(f"the {name} has {size} vocabulary entries, the tokenizer {num_tokens} tokens")
    return None if set(sizes.values()) == {num_tokens} else num_tokens


def _vocab_size(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


def check_same_tokenizer(student: str, teacher: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the teacher's tokenizer is not the student's."""
    others = load_tokenizer(teacher)
    if tokenizer_fingerprint(others) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"student {student!r} ({len(tokenizer)} tokens) and teacher {teacher!r} ({len(others)} tokens) have "
            f"different tokenizers; white-box distillation compares them token by token"
        )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end-of-text, and those that the model's own settings name."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({tokenizer.eos_token_id, *own})


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and a strided sample of every weight: cheap, and changes with any training step."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer layers: the one ModuleList with as many modules as the configuration has layers.

    Raises UserError if it is not the only one.
    """
    wanted = model.config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if len(stacks) != 1:
        raise UserError(f"{model.config.model_type} has {len(stacks)} stacks of {wanted} layers; expected one")
    return stacks[0]


def train_only_last_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Freeze all but the last ``num_layers`` layers and the final norm, so also a head tied to the embeddings.

    The backward pass then ends at the first of these layers.  Raises UserError if there are fewer layers.
    """
    stack = layer_stack(model)
    if num_layers > len(stack):
        raise UserError(f"--train-last-layers {num_layers}: the student has {len(stack)} layers")
    model.requires_grad_(False)
    stack[-num_layers:].requires_grad_(True)
    # A sibling of the layers, which OPT keeps one module deeper than other models; projections stay frozen.
    parent = next(module for module in model.modules() if any(child is stack for child in module.children()))
    for child in parent.children():
        if not any(True for _ in child.children()) and not isinstance(child, (nn.Embedding, nn.Linear, nn.ModuleList)):
            child.requires_grad_(True)  # the final norm


def count_parameters(model: nn.Module) -> int:
    """How many parameters the model has, counting tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_bytes(model: PreTrainedModel) -> int:
    """The bytes that the model's weights take, counting tied ones once."""
    return count_parameters(model) * model.dtype.itemsize
