"""Token lists to batches: padded on the right, or packed into one row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where the examples of a packed row are."""

    lengths: tuple[int, ...]  # of B examples
    offsets: Tensor  # [B + 1], int32, on the device of the row: where each begins, and where the last ends

    @staticmethod
    def of(lengths: Tensor) -> "Segments":
        """From the examples' lengths [B], on the CPU."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = lengths.cumsum(0)
        return Segments(tuple(lengths.tolist()), offsets)

    def to(self, device: torch.device) -> "Segments":
        """The same with the offsets on another device."""
        return replace(self, offsets=send(self.offsets, device))


IGNORE = -100  # the label of a position that is no response token


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B examples: T positions a row, padded on the right to the longest, or packed into one row.

    What the program itself must know stays on the CPU, so that a device is never waited for.
    """

    example_ids: Tensor  # [B], on the CPU
    num_labels: Tensor  # [B], on the CPU: how many response tokens each example has
    input_ids: Tensor  # [B, T]; packed [1, T]
    attention_mask: Tensor  # likewise
    labels: Tensor  # likewise, the next token; -100 where it is no response token
    response_positions: Tensor  # [N]: where the response tokens are, counted through the rows
    position_ids: Tensor | None = None  # packed: [1, T], 0 where an example begins
    segments: Segments | None = None  # packed: where the examples are

    @staticmethod
    def of(
        example_ids: Tensor,
        num_labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        segments: Segments | None = None,
    ) -> "Batch":
        """A batch from tensors on the CPU."""
        response_positions = (labels != IGNORE).flatten().nonzero().flatten()
        return Batch(
            example_ids, num_labels, input_ids, attention_mask, labels, response_positions, position_ids, segments
        )

    @property
    def num_response_tokens(self) -> int:
        """N: how many positions have a label."""
        return len(self.response_positions)

    def response_labels(self) -> Tensor:
        """The labels at the response positions, in order.  -> [N]."""
        return self.labels.flatten().index_select(0, self.response_positions)

    def packed(self) -> "Batch":
        """The same examples one behind the other in one row, without padding."""
        kept = self.attention_mask.bool()
        positions = self.attention_mask.cumsum(-1) - 1
        input_ids, attention_mask, labels, position_ids = (
            part[kept][None] for part in (self.input_ids, self.attention_mask, self.labels, positions)
        )
        segments = Segments.of(self.attention_mask.sum(-1))
        return Batch.of(self.example_ids, self.num_labels, input_ids, attention_mask, labels, position_ids, segments)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with what models read on another device."""
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            attention_mask=send(self.attention_mask, device),
            labels=send(self.labels, device),
            response_positions=send(self.response_positions, device),
            position_ids=None if self.position_ids is None else send(self.position_ids, device),
            segments=None if self.segments is None else self.segments.to(device),
        )

    def sum_by_example(self, values: Tensor) -> Tensor:
        """The sum of a value of each response token over each example, in float64.  [N] -> [B]."""
        example = torch.arange(len(self.num_labels)).repeat_interleave(self.num_labels)
        sums = torch.zeros(len(self.num_labels), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, send(example, values.device), values.detach().double())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for what that still has to do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def collate(
    example_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    max_length: int,
) -> Batch:
    """Token lists -> a right-padded Batch with next-token labels; masks come from lengths, never from token ids."""
    firsts = [len(prompt) - 1 for prompt in prompts]  # this position predicts the first response token
    totals = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [min(total, max_length) - 1 for total in totals]
    shape = (len(lengths), max(lengths))
    input_ids = np.zeros(shape, dtype=np.int64)  # id 0 is in every vocabulary; no position with it is read
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        sequence = np.concatenate([np.asarray(part[row], dtype=np.int64) for part in (prompts, responses)])
        sequence = sequence[: length + 1]
        input_ids[row, :length] = sequence[:-1]
        attention_mask[row, :length] = 1
        labels[row, first:length] = sequence[first + 1 :]
    num_labels = (torch.tensor(lengths) - torch.tensor(firsts)).clamp_(min=0)
    return Batch.of(
        torch.tensor(example_ids),
        num_labels,
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.from_numpy(labels),
    )
