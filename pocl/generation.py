"""Prompts to answers: prompts sorted by length, a cache of keys and values, finished rows leave the batch.

A sampled answer depends on the seed and the example id only, not on the batch, the order or the number of ranks: each
example draws its own uniform numbers, which pick tokens from the cumulative distribution.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.console import Progressing
from pocl.data import blocks_by_length
from pocl.models import end_ids, make_head, trunk

# Rows are dropped once this share of the batch is done: dropping copies the cache.
_COMPACT_AT = 0.125


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``no_repeat_ngram`` 0 bans nothing."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram: int = 6
    seed: int = 10


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


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    example_ids: Sequence[int],
    *,
    sampling: Sampling,
    batch_size: int,
    title: str,
) -> dict[int, str]:
    """The answers of all prompts by example id, shared out over the ranks, on every rank; ``title`` names the bar."""
    eos_ids = end_ids(model, tokenizer)
    vocab_size = len(tokenizer)  # padded vocabulary entries are never an answer
    blocks = blocks_by_length(np.array([len(prompt) for prompt in prompts], dtype=np.int64), batch_size)
    mine = {}
    with Progressing(title, len(blocks), transient=True) as progress:
        for block in distributed.my_share(blocks):
            ids = [int(example_ids[i]) for i in block]
            tokens = generate(
                model, [prompts[i] for i in block], ids, sampling=sampling, eos_ids=eos_ids, vocab_size=vocab_size
            )
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
        self.cache = DynamicCache()
        self.bans = [_NgramBan(prompt, sampling.no_repeat_ngram) for prompt in prompts]
        self.uniforms = _uniforms(example_ids, sampling).to(self.device)  # [B, max_new_tokens]

    def run(self, head: Callable[[Tensor], Tensor]) -> list[list[int]]:
        """Decode until every row is done -> answers in the order of the prompts."""
        active = torch.ones(len(self.rows), dtype=torch.bool)
        for step in range(self.sampling.max_new_tokens):
            logits = self._forward(head)
            for i, row in enumerate(self.rows):
                if active[i] and (banned := self.bans[row].next_tokens()):
                    logits[i, banned] = -torch.inf
            tokens = choose_tokens(logits, self.uniforms[:, step], self.sampling)
            for i, token in enumerate(tokens.tolist()):
                if not active[i]:
                    continue
                if token in self.eos_ids:
                    active[i] = False
                else:
                    self.answers[self.rows[i]].append(token)
                    self.bans[self.rows[i]].append(token)
            if not active.any():
                break
            self.input_ids = tokens[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)
            if (~active).float().mean() >= _COMPACT_AT:
                active = self._drop_finished(active)
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

    def _drop_finished(self, active: Tensor) -> Tensor:
        keep = active.nonzero().flatten()
        self.rows = [self.rows[i] for i in keep.tolist()]
        keep = keep.to(self.device)
        self.cache.batch_select_indices(keep)
        self.input_ids, self.mask, self.uniforms = self.input_ids[keep], self.mask[keep], self.uniforms[keep]
        return torch.ones(len(self.rows), dtype=torch.bool)


def _uniforms(example_ids: Sequence[int], sampling: Sampling) -> Tensor:
    """Each example's own uniform numbers, one per new token.  -> [B, max_new_tokens], float64."""
    if sampling.temperature == 0:
        return torch.zeros(len(example_ids), sampling.max_new_tokens, dtype=torch.float64)
    rows = [np.random.default_rng([sampling.seed, int(i)]).random(sampling.max_new_tokens) for i in example_ids]
    return torch.from_numpy(np.stack(rows))


def choose_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row: the likeliest, or the one at ``uniforms`` of the cumulative distribution.

    [B, V], [B] -> [B].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1.0:
        logits = _keep_nucleus(logits, sampling.top_p)
    cumulative = logits.softmax(-1).double().cumsum(-1)  # float64: 50,000 float32 terms lose the tail
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Mask all but the smallest set of likeliest tokens that holds ``top_p`` of the probability.  [B, V] -> [B, V]."""
    values, order = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)


class _NgramBan:
    """Which tokens would repeat an n-gram of prompt and answer; grows with the answer, one lookup a step."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        self.size = size
        self.tail: list[int] = []
        self.followers: dict[tuple[int, ...], list[int]] = {}
        if size:
            for token in tokens:
                self.append(token)

    def append(self, token: int) -> None:
        if not self.size:
            return
        if len(self.tail) == self.size - 1:
            self.followers.setdefault(tuple(self.tail), []).append(token)
        self.tail = [*self.tail, token][-(self.size - 1) :] if self.size > 1 else []

    def next_tokens(self) -> list[int]:
        if not self.size or len(self.tail) < self.size - 1:
            return []
        return self.followers.get(tuple(self.tail), [])
