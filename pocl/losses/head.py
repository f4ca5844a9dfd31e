"""Hidden states and the head of a model that turns them into logits, and its padding for tensor-core alignment."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# A head's rows are padded to a multiple of this, for a GPU's tensor cores: with 50,257 cuBLAS has to use a kernel for
# unaligned sizes, which others found to take three times as long (DeepSpeed warns of it). Not measured here yet.
HEAD_ROWS = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Head:
    """The head of a model as a function [N, H] -> [N, V], with the scales and caps that some models apply after it."""

    module: nn.Linear  # call it, do not use its weight: ZeRO-3 gathers that only for the call
    scale: float = 1.0
    cap: float | None = None
    vocab_size: int | None = None  # cuts off padded vocabulary entries

    def __call__(self, states: Tensor) -> Tensor:
        return self.logits(self.module(states))

    def logits(self, product: Tensor) -> Tensor:
        """The logits from the module's output; the very same tensor if there is nothing to apply.  [N, V]."""
        logits = product
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits[..., : self.vocab_size] if self.vocab_size else logits

    @property
    def num_logits(self) -> int:
        """V, without what is cut off."""
        return min(self.shape[0], self.vocab_size or self.shape[0])

    @property
    def shape(self) -> torch.Size:
        """[V, H] of the weight, also where ZeRO-3 holds a part of it; the layer's own numbers may be out of date."""
        shape: torch.Size = getattr(self.module.weight, "ds_shape", self.module.weight.shape)
        return shape

    @property
    def only_cuts(self) -> bool:
        """Whether ``logits`` are simply the first entries of the module's output."""
        return self.scale == 1.0 and self.cap is None

    def trained_parameters(self) -> list[nn.Parameter]:
        """The head's trainable parameters."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class HiddenStates:
    """What a model makes of N response tokens: the last hidden states, and the head that turns them into logits."""

    states: Tensor  # [N, H]
    head: Head

    def __len__(self) -> int:
        return len(self.states)


@torch.no_grad()
def aligned(head: Head) -> Head:
    """A head with the same logits, from a copy of the weight that is zero-padded to its device's alignment.

    The head itself if there is nothing to pad, or if the weight is not there, as between calls under ZeRO-3.
    """
    weight, bias = head.module.weight, head.module.bias
    if weight.dim() != 2:
        return head
    num_rows, width = weight.shape
    extra = -num_rows % HEAD_ROWS.get(weight.device.type, 1)
    if extra == 0:
        return head
    module = nn.Linear(width, num_rows + extra, bias=bias is not None, device="meta")
    module.weight = nn.Parameter(nn.functional.pad(weight, (0, 0, 0, extra)), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(nn.functional.pad(bias, (0, extra)), requires_grad=False)
    return replace(head, module=module, vocab_size=head.vocab_size or num_rows)
