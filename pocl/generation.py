"""Prompts to answers: prompts sorted by length, a cache of keys and values, finished rows leave the batch.

A sampled answer depends on the seed and the example id only, not on the batch, the order or the number of ranks: each
example draws its own uniform numbers, which pick tokens from the cumulative distribution.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.batching import blocks_by_length
from pocl.console import Progressing
from pocl.kv_cache import roomy_cache
from pocl.models import end_ids, make_head, trunk
from pocl.sampling import NgramBan, Sampling, example_uniforms, next_tokens

# Rows are dropped once this share of the batch is done: dropping copies the cache.
_COMPACT_AT = 0.125


class Generator(Protocol):
    """What answers prompts, such as the built-in loop or vLLM. All of them choose tokens by ``pocl.sampling``."""

    @property
    def name(self) -> str:
        """What answers, for records."""

    def blocks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Prompts of these lengths [N], cut into what one call should be given: positions, shared out over ranks."""

    def __call__(
        self, prompts: Sequence[list[int]], example_ids: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One answer per prompt, as token ids without the end-of-text token, in the order of the prompts."""


@dataclass(frozen=True)
class BuiltIn:
    """The project's own decoding loop, on the model as it is in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    name: ClassVar[str] = "builtin"

    def blocks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Batches of neighbours in length, about equal, and as many for each rank."""
        return even_blocks(lengths, self.batch_size)

    def __call__(
        self, prompts: Sequence[list[int]], example_ids: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One answer per prompt; padded vocabulary entries are never an answer."""
        return generate(
            self.model,
            prompts,
            example_ids,
            sampling=sampling,
            eos_ids=end_ids(self.model, self.tokenizer),
            vocab_size=len(self.tokenizer),
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    example_ids: Sequence[int],
    *,
    sampling: Sampling,
    eos_ids: Sequence[int],
    vocab_size: int | None = None,
) -> list[list[int]]:
    """One answer per prompt of one batch, as token ids without the end-of-text token, in the order of the prompts."""
    was_training = model.training
    model.eval()
    answers = _Decoder(model, prompts, example_ids, sampling, eos_ids).run(make_head(model, vocab_size))
    model.train(was_training)
    return answers


def even_blocks(lengths: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Prompts of these lengths [N] in blocks of neighbours in length, about equal, and as many for each rank."""
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
    """The answers of all prompts by example id, shared out over the ranks, on every rank; ``title`` names the bar."""
    blocks = generator.blocks(np.array([len(prompt) for prompt in prompts], dtype=np.int64))
    mine = {}
    with Progressing(title, len(blocks), transient=True) as progress:
        for block in distributed.my_share(blocks):
            ids = [int(example_ids[i]) for i in block]
            tokens = generator([prompts[i] for i in block], ids, sampling)
            mine.update(zip(ids, decode(tokenizer, tokens), strict=True))
            progress.advance(min(distributed.world_size(), len(blocks) - progress.done))
    return distributed.gather_by_id(mine)


def decode(tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]) -> list[str]:
    """Token ids to text, without special tokens and outer white space."""
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


class _Decoder:
    """One batch of prompts being answered. ``rows`` are the prompts that are still unfinished."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        example_ids: Sequence[int],
        sampling: Sampling,
        eos_ids: Sequence[int],
    ) -> None:
        self.model, self.sampling, self.eos_ids = model, sampling, set(eos_ids)
        self.device = next(model.parameters()).device
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))
        self.takes_positions = "position_ids" in inspect.signature(trunk(model).forward).parameters
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left: every row's next token is in the last column
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self.input_ids, self.mask = ids.to(self.device), mask.to(self.device)
        self.cache = roomy_cache()
        self.bans = [NgramBan(prompt, sampling.no_repeat_ngram) for prompt in prompts]
        uniforms = np.stack([example_uniforms(int(example_id), sampling) for example_id in example_ids])
        self.uniforms = torch.from_numpy(uniforms).to(self.device)  # [B, max_new_tokens]

    def run(self, head: Callable[[Tensor], Tensor]) -> list[list[int]]:
        """Decode until every row is done -> answers in the order of the prompts."""
        active = [True] * len(self.rows)
        for step in range(self.sampling.max_new_tokens):
            logits = self._forward(head)
            bans = [self.bans[row] for row in self.rows]
            tokens = next_tokens(logits, bans, self.uniforms[:, step], self.sampling)
            for i, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
                if not active[i]:
                    continue
                if token in self.eos_ids:
                    active[i] = False
                else:
                    self.answers[row].append(token)
                    self.bans[row].append(token)
            if not any(active):
                break
            self.input_ids = tokens[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)
            if active.count(False) >= _COMPACT_AT * len(active):
                self._drop_finished([i for i, goes_on in enumerate(active) if goes_on])
                active = [True] * len(self.rows)
        return self.answers

    def _forward(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of the next token.  -> [B, V], float32."""
        positions = {}
        if self.takes_positions:
            all_positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
            positions["position_ids"] = all_positions[:, -self.input_ids.shape[1] :]
        output = trunk(self.model)(
            input_ids=self.input_ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **positions
        )
        self.cache = output.past_key_values
        return head(output.last_hidden_state[:, -1]).float()

    def _drop_finished(self, kept: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in kept]
        keep = torch.tensor(kept, device=self.device)
        self.cache.batch_select_indices(keep)
        self.input_ids, self.mask, self.uniforms = self.input_ids[keep], self.mask[keep], self.uniforms[keep]
