"""Whether a model reads examples packed into one row, found by trying."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl.common.errors import first_line
from pocl.data.batch import Batch, Segments, collate
from pocl.models.states import response_states, text_config, trunk


def never_packed(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why a model of this type cannot read packed batches on this device; None if it may."""
    name = model.config.model_type
    if "position_ids" not in inspect.signature(trunk(model).forward).parameters:
        return f"{name} takes no position_ids"
    kinds = set(getattr(text_config(model), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{name} has layers of {', '.join(sorted(kinds))}"
    if device.type == "cuda" and model.dtype not in (torch.bfloat16, torch.float16):
        return "flash attention needs `dtype` bf16 or fp16"
    return None


def why_not_packed(model: PreTrainedModel, device: torch.device, *, learns: bool = True) -> str | None:
    """Why the model cannot read packed batches: its type, or two short examples give other states when packed (and,
    if it ``learns``, another gradient). None if it can.
    """
    name, never = model.config.model_type, never_packed(model, device)
    if never is not None:
        return never
    padded = collate([0, 1], [[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [2, 3, 1]], max_length=16)
    packed = padded.packed()
    length = packed.input_ids.shape[1]
    mixed = replace(packed, position_ids=torch.arange(length)[None], segments=Segments.of(torch.tensor([length])))
    try:
        with _narrow_windows(model):
            wanted, found, wrong = (
                _states_and_gradient(model, batch.to(device), learns=learns) for batch in (padded, packed, mixed)
            )
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{name} with {model.config._attn_implementation} fails: {first_line(error)}"
    # Rounding, relative to the error of reading both examples as one.
    allowed = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    for a, b, c in zip(wanted, found, wrong, strict=True):
        if not torch.norm(b - a) <= allowed * torch.norm(c - a):
            return f"{name} with {model.config._attn_implementation} does not keep packed examples apart"
    return None


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Attention windows of 3 tokens, so that two short examples tell whether packed ones keep to them."""
    holders = [holder for holder in (text_config(model), *model.modules()) if _window(holder)]
    widths = [_window(holder) for holder in holders]
    try:
        for holder in holders:
            holder.sliding_window = 3
        yield
    finally:
        for holder, width in zip(holders, widths, strict=True):
            holder.sliding_window = width


def _window(holder: Any) -> int | None:
    window = getattr(holder, "sliding_window", None)
    return window if isinstance(window, int) else None


def _states_and_gradient(model: PreTrainedModel, batch: Batch, *, learns: bool) -> list[Tensor]:
    """The states of a batch [N, H]; if the model ``learns``, also the gradient of a sum of them w.r.t. the embeddings'
    output, without padding.
    """
    if not learns:  # an offloaded model could not keep what the backward pass needs
        with torch.no_grad():
            return [response_states(model, batch).float()]
    given: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            states = response_states(model, batch)
            weights = torch.linspace(-1.0, 1.0, states.numel(), device=states.device).reshape(states.shape)
            (gradient,) = torch.autograd.grad((states.float() * weights).sum(), given[:1])
    finally:
        hook.remove()
    return [states.detach().float(), gradient[batch.attention_mask.bool()].float()]
