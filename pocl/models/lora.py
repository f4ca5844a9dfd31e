"""LoRA (arXiv 2106.09685): adapters added to a model, saved in peft's format, merged; adapter folders read.

To all other code an adapted model stays what it was, e.g. a GPT2LMHeadModel with its trunk and head: only its linear
layers are peft's. Nothing is merged into a model in training; the merged weights are made beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numerize.numerize import numerize
from peft import LoraConfig, LoraModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl.common.console import say
from pocl.common.errors import UserError, closest, first_line
from pocl.common.files import read_json
from pocl.models.states import some_logits, text_config, trunk

ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's default adapter name
_PREFIX = "base_model.model."  # of every weight in its files
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapters(
    model: PreTrainedModel,
    base: str,
    *,
    lora_rank: int,
    lora_alpha: float | None,
    lora_dropout: float,
    lora_targets: Sequence[str],
    seed: int,
) -> None:
    """Add a fresh adapter to each targeted linear layer, and freeze all other weights.

    The model's outputs do not change before the first step. ``base`` is the folder or hub name that the model came
    from; ``lora_alpha`` None means twice the rank; the adapters depend on ``seed`` alone, so every rank has the same.
    Raises UserError for a target that names no linear layer of the trunk.
    """
    modules, parameters = lora_places(model, lora_targets)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in trunk(model).modules()),
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU, wherever the model is
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, model, _NAME)
    except ValueError as error:  # such as dropout before experts
        raise UserError(f"`lora_targets` of this {model.config.model_type}: {first_line(error)}") from error
    targets = sorted({_label(name) for name in (*modules, *parameters)})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"LoRA of rank {lora_rank} on {', '.join(targets)}: {numerize(trained)} trainable parameters")


def lora_places(model: PreTrainedModel, lora_targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Where adapters go, as peft names it: the linear layers of the trunk, and its experts' weights; the head gets
    none.

    Raises UserError for a target that names none.
    """
    inside, known = {id(module) for module in trunk(model).modules()}, dict(model.named_modules())
    layers = {name for name, module in known.items() if id(module) in inside and _is_linear(model, name, module)}
    experts = {
        f"{name}.{own}"
        for name, module in known.items()
        if id(module) in inside and not type(module).__module__.startswith("torch.")
        for own, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3  # [experts, ., .]
    }
    names = {_label(name) for name in layers | experts}
    targets = names if ALL_LINEAR in lora_targets else set(lora_targets)
    for name in sorted(targets - names):
        raise UserError(
            f"`lora_targets` {name!r} names no linear layer of the student{closest(name, names)} "
            f"(it has {', '.join(sorted(names))}; {ALL_LINEAR} means them all)"
        )
    chosen = {name for name in layers if _label(name) in targets}
    short = {_label(name) for name in chosen}
    if any(_label(name) in short for name in known.keys() - chosen):  # such as those of a part that reads pictures
        short = chosen
    parts = {".".join(name.split(".")[-2:]) for name in experts if _label(name) in targets}
    return sorted(short), sorted(parts)


def _is_linear(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear layer is that and nothing else (a router is more), and peft takes it."""
    if not isinstance(module, (nn.Linear, Conv1D)) or "Router" in type(module).__name__:
        return False
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, _label(name))
    except ValueError:
        return False
    return True


def _label(name: str) -> str:
    """What a user calls a layer or a weight: the last part of its name that says something."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoraLinear, ParamWrapper))}


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model that equals the adapted one; ``weights`` are all of the model's, by name.

    They are not modified: what changes is a new tensor. A model without adapters gets its own weights back.
    """
    layers = _adapted_layers(model)
    plain = {_plain(name): weight for name, weight in weights.items() if f".{_NAME}." not in name or not layers}
    for name, layer in layers.items():
        place = _plain(f"{name}.base_layer.{getattr(layer, 'parameter_name', 'weight')}")
        weight = plain[place]
        exact = torch.promote_types(weight.dtype, torch.float32)  # bf16: round once, at the end
        down, up = (weights[f"{name}.lora_{side}.{_NAME}.weight"].to(exact) for side in "AB")  # [r, in], [out, r]
        plain[place] = (weight + layer.scaling[_NAME] * _change(layer, down, up)).to(weight.dtype)
    return plain


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".base_layer.", ".")


def _change(layer: Any, down: Tensor, up: Tensor) -> Tensor:
    """What an adapter adds, before its scale, in the shape of the weight: [out, in], or [in, out] in a Conv1D."""
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return (up @ down).T if layer.fan_in_fan_out else up @ down
    down, up = down.reshape(experts, -1, down.shape[-1]), up.reshape(up.shape[0], -1, experts)
    return torch.einsum("ore,eri->eoi" if layer._did_swap_in_out_features else "ore,eri->eio", up, down)


def save_adapter(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> bool:
    """Write the adapter of a model into ``folder`` as peft does -> False if the model has none.

    ``weights`` are all of the model's, by name.
    """
    layers = _adapted_layers(model)
    if not layers:
        return False
    folder.mkdir(parents=True)
    adapter = {
        f"{_PREFIX}{name}.lora_{side}.weight": weights[f"{name}.lora_{side}.{_NAME}.weight"].contiguous()
        for name in layers
        for side in "AB"
    }
    save_file(adapter, folder / _WEIGHTS, metadata={"format": "pt"})
    model.peft_config[_NAME].save_pretrained(str(folder))
    return True


def adapter_chain(path: str) -> tuple[str, list[Path]]:
    """(the base model under a folder, the adapters on it, in the order in which they are merged).

    A model that is not an adapter folder is its own base, without adapters. The base that adapter_config.json names is
    looked up as given, then relative to the adapter's folder; it may be an adapter itself.  Raises UserError if an
    adapter is not LoRA, names no base or itself, or has no safetensors, or if a whole model is in its folder.
    """
    adapters: list[Path] = []
    while (Path(path) / _CONFIG).is_file():
        folder = Path(path).resolve()
        if folder in adapters:
            raise UserError(f"{path} is an adapter on itself; fix base_model_name_or_path in its {_CONFIG}")
        _check_folder(folder)
        adapters.insert(0, folder)
        path = _base(folder)
    return path, adapters


def _base(folder: Path) -> str:
    """The base that the folder's adapter_config.json names."""
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{folder / _CONFIG} describes an adapter of type {kind!r}; only LORA is supported here")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / _CONFIG} names no base model (base_model_name_or_path)")
    if config.get("revision"):
        raise UserError(
            f"{folder / _CONFIG} names revision {config['revision']!r} of {base}; download that revision to a folder, "
            f"name the folder there, and drop the revision"
        )
    return str(folder / base) if not Path(base).is_dir() and (folder / base).is_dir() else base


def _check_folder(folder: Path) -> None:
    if list(folder.glob("model*.safetensors")):
        raise UserError(f"{folder} holds a whole model and an adapter; give each a folder of its own")
    if (folder / _WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds pickled weights (adapter_model.bin), which may run code when loaded; "
            f"save the adapter again with save_pretrained, which writes safetensors"
        )
    raise UserError(f"{folder} holds an adapter's configuration, but no weights ({_WEIGHTS})")


@contextmanager
def about_base(path: str, base: str) -> Iterator[None]:
    """Add to a UserError that it is about the base of the adapter ``path``."""
    try:
        yield
    except UserError as error:
        if path == base:
            raise
        raise UserError(f"{error}; the adapter {path} uses it (base_model_name_or_path in {_CONFIG})") from error


def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Merge the LoRA adapter in ``folder`` into its base, which is then a plain model again.

    A head that is tied to the embeddings is untied where the adapter changes one of them.  Raises UserError if the
    adapter is damaged or does not fit the base, or if the merged model is not the adapted one.
    """
    try:
        # peft names the weights as its wrapper around a model sees them.
        weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(folder / _WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights in {folder} are damaged: {first_line(error)}") from error
    try:
        adapted = LoraModel(model, LoraConfig.from_pretrained(str(folder)), _NAME)
        keys: Any = set_peft_model_state_dict(model, weights)  # a named tuple whose names peft's types leave out
        missing = [key for key in keys.missing_keys if "lora_" in key or "modules_to_save" in key]
        if missing or keys.unexpected_keys:
            what = f"lacks {missing[0]}" if missing else f"holds {keys.unexpected_keys[0]}"
            raise UserError(f"the adapter in {folder} does not fit its base: it {what}")
        wanted = some_logits(model.eval())
        untied = _untie(model)
        adapted.merge_and_unload(safe_merge=True)
        if untied and _ends(model)[0].weight is not _ends(model)[1].weight:
            # transformers would tie them again when the model is loaded.
            model.config.tie_word_embeddings = text_config(model).tie_word_embeddings = False
        off = torch.norm(some_logits(model) - wanted) / torch.norm(wanted)
        if off > (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
            raise UserError(f"merged into its base, the adapter in {folder} gives logits that are {off:.1%} off")
    except UserError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, re.error) as error:
        raise UserError(
            f"the adapter in {folder} does not fit its base, or is damaged: {first_line(error)}"
        ) from error
    model.requires_grad_(True)


def _untie(model: PreTrainedModel) -> bool:
    """Give the head a weight of its own, if it shares the embeddings' and an adapter is on one of them -> whether."""
    ends = _ends(model)
    inner = [getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends]
    if inner[1] is None or inner[0].weight is not inner[1].weight or (inner[0] is ends[0] and inner[1] is ends[1]):
        return False
    inner[1].weight = nn.Parameter(inner[1].weight.detach().clone())
    return True


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()
