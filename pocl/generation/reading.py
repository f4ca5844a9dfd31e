"""A model that reads its own answers: prompts of several lengths in one batch, and a cache of what it has read.

How a model can do so is found by trying, against the text of each prompt alone without a cache.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.common.console import say
from pocl.generation.kv_cache import roomy_cache
from pocl.models import attention
from pocl.models.attention import whole_mask
from pocl.models.states import text_config, trunk

_LENGTHS = (9, 5, 6)  # of the texts that are tried


@dataclass(frozen=True)
class Way:
    """How a model reads what it answers; the first that is right is taken."""

    whole_masks: bool = False  # takes a full attention mask (``whole_mask``) instead of a padding mask
    padded: bool = False  # prompts of several lengths in one batch
    cached: bool = False  # keeps keys and values, or what else its layers remember


_WAYS = (Way(True, True, True), Way(False, True, True), Way(cached=True), Way())
_FOUND: "WeakKeyDictionary[PreTrainedModel, Way]" = WeakKeyDictionary()


class Reader:
    """The states of the last tokens of a batch that grows by one column at a time, and may lose rows."""

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        self.trunk, self.way = trunk(model), way
        self.takes = inspect.signature(self.trunk.forward).parameters.keys()
        self.cache = roomy_cache(text_config(model)) if way.cached else None
        self.name = "past_key_values" if "past_key_values" in self.takes else "cache_params"

    def read(self, tokens: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """The last column's states.  tokens [B, T], where seen [B, T]; positions [B, new] of those not yet read ->
        [B, H]."""
        new = positions.shape[1] if self.way.cached else tokens.shape[1]
        inputs = {"input_ids": tokens[:, -new:].clamp(min=0)}
        if self.way.padded:
            inputs["attention_mask"] = whole_mask(seen, new) if self.way.whole_masks else seen
            if "position_ids" in self.takes:
                inputs["position_ids"] = positions
        others = {"use_cache": False} if self.cache is None else {self.name: self.cache, "use_cache": True}
        states: Tensor = self.trunk(**inputs, **others).last_hidden_state
        return states[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows of the batch."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def way_of(model: PreTrainedModel) -> Way:
    """How the model reads what it answers; tried once."""
    if model not in _FOUND:
        _FOUND[model] = _way(model)
        name, found = model.config.model_type, _FOUND[model]
        if not found.cached:
            say(f"{name} keeps no cache that is known here: it reads its whole text again for each token of an answer")
        elif not found.padded:
            say(f"{name} answers prompts of one length at a time: padding before a prompt would change its answer")
    return _FOUND[model]


def batches(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which prompts are answered together: all, or those of one length if padding would change an answer."""
    if way_of(model).padded:
        return [list(range(len(prompts)))]
    lengths = sorted({len(prompt) for prompt in prompts})
    return [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]


def takes_whole_masks(model: PreTrainedModel) -> bool:
    """Whether the model accepts a full attention mask (``whole_mask``) instead of a padding mask."""
    return way_of(model).whole_masks


@torch.no_grad()
def _way(model: PreTrainedModel) -> Way:
    config, exact = text_config(model), model.dtype in (torch.float32, torch.float64)
    windows = getattr(config, "sliding_window", None) or set(getattr(config, "layer_types", None) or ()) - {
        "full_attention"
    }
    whole = config._attn_implementation == attention.NAME and not windows
    num_rows = len(model.get_input_embeddings().weight)
    texts = [[(7 * i + length) % num_rows for i in range(length)] for length in _LENGTHS]
    wanted, wrong = (_states(model, Way(), [text[-kept:] for text in texts]) for kept in (max(_LENGTHS), 2))
    # Rounding, relative to the error of reading the last tokens alone.
    allowed = (1e-3 if exact else 0.25) * torch.norm(wrong - wanted) + (1e-5 if exact else 0.02) * torch.norm(wanted)
    for way in _WAYS[not whole : -1]:
        try:
            found = _states(model, way, texts)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            continue
        if not torch.norm(found - wanted) > allowed:  # so also where they are not finite, which is found out later
            return way
    return Way()


def _states(model: PreTrainedModel, way: Way, texts: list[list[int]]) -> Tensor:
    """The states of the last two tokens of each text, the very last read by itself.  -> [2, texts, H], float32."""
    groups = [texts] if way.padded else [[text] for text in texts]
    return torch.cat([_two_steps(model, way, group) for group in groups], dim=1).float()


def _two_steps(model: PreTrainedModel, way: Way, texts: list[list[int]]) -> Tensor:
    width, device = max(map(len, texts)), next(model.parameters()).device
    tokens = torch.tensor([[-1] * (width - len(text)) + text for text in texts]).to(device)
    seen, reader = tokens >= 0, Reader(model, way)
    positions = seen.cumsum(-1).sub_(1).clamp_(min=0)
    first = reader.read(tokens[:, :-1], seen[:, :-1], positions[:, :-1])
    reader.keep(torch.arange(len(texts), device=device))
    return torch.stack([first, reader.read(tokens, seen, positions[:, -1:])])
