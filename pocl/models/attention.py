"""Attention over packed examples: each attends only to itself, without a mask and without padding.

transformers' ``sdpa`` separates packed examples with a mask of all tokens by all tokens, which costs more than the
padding did. Here the CPU runs that same ``sdpa`` on one example after the other, and a GPU handles all of them in one
call of torch's own flash attention. What is not packed (generation, padded batches) goes to ``sdpa`` unchanged.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pocl.data.batch import Segments

NAME = "by_example"  # what --attention auto chooses wherever transformers would use sdpa


def attend_by_example(model: PreTrainedModel) -> None:
    """Make each packed example attend only to itself, if the model's attention is sdpa."""
    if model.config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(NAME)


@cache
def _register() -> None:
    """Make the attention known to transformers, under its name."""
    AttentionInterface.register(NAME, attention_by_example)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for what is not packed


def attention_by_example(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a packed row.

    [1, heads, N, D], [1, key heads, N, D], [1, key heads, N, D] -> ([1, N, heads, D], None), as transformers expects.
    Without ``segments`` this is ``sdpa``.  Raises ValueError if the scores are more than scaled dot products.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"attention with {name} is not supported for packed examples")
    window = options.pop("sliding_window", None)  # tokens that each token sees: itself and those before it
    if query.device.type == "cpu":
        return _one_by_one(module, query, key, value, segments, window, options), None
    return _at_once(query, key, value, segments, window, **options), None


def _one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    queries, keys, values = (states.split(segments.lengths, dim=2) for states in (query, key, value))
    attended = []
    for q, k, v, length in zip(queries, keys, values, segments.lengths, strict=True):
        mask = None if window is None or length <= window else _band(length, window, query.device)
        attended.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(attended, dim=1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length]: True for the token itself and the ``window`` - 1 before it."""
    ones = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


def _at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> Tensor:
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # [N, heads, D]
    longest = max(segments.lengths)
    left = -1 if window is None or longest <= window else window - 1  # tokens before the current one; -1: all
    attended: Tensor
    attended, *_others = torch.ops.aten._flash_attention_forward(
        *rows,
        segments.offsets,
        segments.offsets,
        longest,
        longest,
        dropout,
        left < 0,  # causal; a window is so by itself
        False,  # do not return the dropout mask, which is for debugging
        scale=scaling,
        window_size_left=left,
        window_size_right=0,
    )
    return attended[None]


def whole_mask(seen: Tensor, num_queries: int) -> Tensor:
    """The attention mask of the last ``num_queries`` of T tokens.  [B, T] -> [B, 1, num_queries, T], bool.

    ``seen`` is False for padding, which attends to itself, since attention to nothing gives NaN. transformers would
    build the same mask from ``seen``, but wait for the device to learn whether there is padding.
    """
    if num_queries == 1:
        return seen[:, None, None]
    length = seen.shape[1]
    behind = torch.ones(num_queries, length, dtype=torch.bool, device=seen.device).tril_(length - num_queries)
    oneself = torch.zeros_like(behind).diagonal_scatter(behind.new_ones(num_queries), length - num_queries)
    return (seen[:, None] & behind | oneself)[:, None]
