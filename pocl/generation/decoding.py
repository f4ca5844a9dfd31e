"""Prompts to answers: prompts sorted by length, a KV cache, finished rows leave the batch.

A sampled answer depends on the seed and the example id only, not on the batch, the order or the number of ranks: each
example draws its own uniform numbers, which pick tokens from the cumulative distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common import distributed
from pocl.common.console import Progressing
from pocl.common.errors import RankStopped
from pocl.common.interrupt import requested, stop_if_requested
from pocl.data.batch import send
from pocl.data.blocks import blocks_by_length
from pocl.generation.reading import Reader, batches, way_of
from pocl.generation.sampling import (
    Sampling,
    ban_repeated,
    can_choose,
    choose_tokens,
    example_uniforms,
    not_finite,
)
from pocl.losses.head import aligned
from pocl.models.student import Student

# Rows are dropped once this share of the batch is done: dropping copies the cache.
_COMPACT_AT = 0.125


class Generator(Protocol):
    """What answers prompts, such as the built-in loop or vLLM. All choose tokens by ``sampling``."""

    @property
    def name(self) -> str:
        """What generates, for records."""

    def blocks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Prompts of these lengths [N], cut into what one call should be given: positions, to be split among ranks."""

    def __call__(
        self, prompts: Sequence[list[int]], example_ids: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One answer per prompt, as token ids without the end-of-text token, in the order of the prompts."""


@dataclass(frozen=True)
class BuiltIn:
    """The project's own decoding loop, on the student as it is in memory."""

    student: Student
    batch_size: int  # prompts that are answered together
    name: ClassVar[str] = "builtin"

    def blocks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Batches of neighbours in length, about equal in size, as many for each rank."""
        return even_blocks(lengths, self.batch_size)

    def __call__(
        self, prompts: Sequence[list[int]], example_ids: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One answer per prompt; padded vocabulary entries are never chosen."""
        return generate(self.student, prompts, example_ids, sampling)


@torch.no_grad()
def generate(
    student: Student, prompts: Sequence[list[int]], example_ids: Sequence[int], sampling: Sampling
) -> list[list[int]]:
    """One answer per prompt of one batch, as token ids without the token that ended it, in the order of the prompts.

    Any of the student's ``end_ids`` ends an answer.
    """
    model, was_training = student.model, student.model.training
    model.eval()
    head, answers = aligned(student.head), [[0]] * len(prompts)
    for rows in batches(model, prompts):
        these, ids = [prompts[row] for row in rows], [example_ids[row] for row in rows]
        found = Decoder(model, these, ids, sampling, student.end_ids).run(head)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    model.train(was_training)
    return answers


def even_blocks(lengths: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Prompts of these lengths [N] in blocks of neighbours in length, about equal in size, as many for each rank."""
    ranks = distributed.world_size()
    rounds = math.ceil(len(lengths) / (ranks * block_size))
    return blocks_by_length(lengths, math.ceil(len(lengths) / (ranks * rounds))) if rounds else []


def answer_prompts(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    example_ids: Sequence[int],
    *,
    sampling: Sampling,
    title: str,
) -> dict[int, str]:
    """The answers to all prompts by example id, on every rank, which share the work; ``title`` labels the bar.

    Raises StopRequested on every rank if one of them received a signal.
    """
    blocks = generator.blocks(np.array([len(prompt) for prompt in prompts], dtype=np.int64))
    mine: dict[int, str] = {}
    with Progressing(title, len(blocks), transient=True) as progress:
        for block in distributed.my_share(blocks):
            ids = [int(example_ids[i]) for i in block]
            tokens = generator([prompts[i] for i in block], ids, sampling)
            mine.update(zip(ids, decode(tokenizer, tokens), strict=True))
            progress.advance(min(distributed.world_size(), len(blocks) - progress.done))
            if requested():
                break
    stop_if_requested()
    return distributed.gather_by_id(mine)


def decode(tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]) -> list[str]:
    """Token ids to text, without special tokens and outer white space."""
    return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]


class Decoder:
    """One batch of prompts being answered: one column of tokens per round, for the rows not yet known to be done.

    What the rounds need is on the device, and they do not wait for it (``_Watch``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        example_ids: Sequence[int],
        sampling: Sampling,
        eos_ids: Sequence[int],
    ) -> None:
        self.model, self.sampling, self.eos_ids = model, sampling, sorted(eos_ids)
        device = next(model.parameters()).device
        self.length = max(len(prompt) for prompt in prompts)  # columns that are filled
        tokens = torch.full((len(prompts), self.length + sampling.max_new_tokens), -1)
        for row, prompt in enumerate(prompts):  # padded on the left: every row's next token is in the same column
            tokens[row, self.length - len(prompt) : self.length] = torch.tensor(prompt)
        seen = tokens >= 0
        seen[:, self.length :] = True
        uniforms = np.stack([example_uniforms(int(example_id), sampling) for example_id in example_ids])
        # Of the remaining rows: prompt and answer [B, columns], which entries are tokens, and what is drawn with.
        self.tokens, self.seen = send(tokens, device), send(seen, device)
        self.uniforms = send(torch.from_numpy(uniforms), device)  # [B, max_new_tokens]
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)  # whether a row had no token to choose
        self.rows = send(torch.arange(len(prompts)), device)  # which prompts these are
        self.positions = self.seen[:, : self.length].cumsum(-1).sub_(1).clamp_(min=0)
        self.ends = send(torch.tensor(self.eos_ids, dtype=torch.long), device)
        self.answers = torch.full((len(prompts), sampling.max_new_tokens), -1, device=device)
        self.reader, self.watch = Reader(model, way_of(model)), _Watch(device)

    def run(self, head: Callable[[Tensor], Tensor]) -> list[list[int]]:
        """Decode until every row is done -> answers in the order of the prompts.

        Raises RankStopped for logits that are not finite.
        """
        for step in range(self.sampling.max_new_tokens):
            self.add_column(head, step)
            done = self.watch.look(self.done)
            if all(done):
                break
            if sum(done) >= _COMPACT_AT * len(done):
                self._keep([i for i, is_done in enumerate(done) if not is_done])
        if self.broken:  # looked at once, behind all rounds, which do not wait for the device
            raise RankStopped(not_finite(self.model.dtype))
        ends = {-1, *self.eos_ids}
        return [list(takewhile(lambda token: token not in ends, answer)) for answer in self.answers.tolist()]

    def add_column(self, head: Callable[[Tensor], Tensor], step: int) -> None:
        """One more token for every row, including the done ones."""
        logits = self._forward(head)
        stuck = ~can_choose(logits)
        self.broken |= (stuck & ~self.done).any()
        if self.sampling.no_repeat_ngram:
            ban_repeated(logits, self.tokens[:, : self.length], self.sampling.no_repeat_ngram)
        chosen = choose_tokens(logits, self.uniforms[:, step], self.sampling)
        self.answers[self.rows, step] = chosen
        self.tokens[:, self.length] = chosen
        self.length += 1
        self.positions = self.positions[:, -1:] + 1
        self.done |= (chosen[:, None] == self.ends).any(-1) | stuck

    def _forward(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of the next token.  -> [B, V], float32."""
        tokens, seen = self.tokens[:, : self.length], self.seen[:, : self.length]
        return head(self.reader.read(tokens, seen, self.positions)).float()

    def _keep(self, kept: Sequence[int]) -> None:
        """Drop the other rows from the batch."""
        self.watch.forget()
        keep = send(torch.tensor(kept), self.rows.device)
        self.reader.keep(keep)
        for name in ("tokens", "seen", "uniforms", "done", "rows", "positions"):
            setattr(self, name, getattr(self, name)[keep])


class _Watch:
    """Which rows of a batch are done. On a GPU, as of one round ago, so that the next round is queued while this one
    is computed."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type != "cuda"
        self.copied: tuple[Tensor, torch.cuda.Event] | None = None

    def look(self, done: Tensor) -> list[bool]:
        """Which are known to be done.  [B] -> B booleans."""
        if self.waits:
            return done.tolist()
        before = self.copied
        here, event = torch.empty(done.shape, dtype=done.dtype, pin_memory=True), torch.cuda.Event()
        here.copy_(done, non_blocking=True)
        event.record()
        self.copied = here, event
        if before is None:
            return [False] * len(done)
        before[1].synchronize()
        return before[0].tolist()

    def forget(self) -> None:
        """Forget the last round: the rows have changed."""
        self.copied = None
