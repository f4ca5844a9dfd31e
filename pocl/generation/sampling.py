"""How the next token of an answer is chosen from logits: one rule for the built-in loop and vLLM.

Needs torch and numpy only: the vLLM worker, which may run in an environment of its own, imports it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``no_repeat_ngram`` 0 bans nothing."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram: int = 6
    seed: int = 10


class NgramBan:
    """Which tokens would repeat an n-gram of prompt and answer; grows with the answer, one lookup per step."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        self.size = size
        self.tail: tuple[int, ...] = ()  # the last size - 1 tokens
        self.followers: dict[tuple[int, ...], list[int]] = {}
        for token in tokens if size else ():
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token of the answer."""
        if not self.size:
            return
        if len(self.tail) < self.size - 1:  # no whole n-gram yet
            self.tail += (token,)
            return
        known = self.followers.get(self.tail)
        if known is None:
            self.followers[self.tail] = [token]
        else:
            known.append(token)
        if self.size > 1:
            self.tail = (*self.tail[1:], token)

    def banned(self) -> list[int]:
        """The tokens that would end a repeated n-gram now."""
        return self.followers.get(self.tail, []) if self.size else []


def is_banned(prompt: Sequence[int], response: Sequence[int], size: int) -> bool:
    """Whether this response cannot be written under the ban: it would repeat an n-gram of prompt and response."""
    ban = NgramBan(prompt, size)
    for token in response:
        if token in ban.banned():
            return True
        ban.append(token)
    return False


def ban_repeated(logits: Tensor, tokens: Tensor, size: int) -> None:
    """``NgramBan`` for a whole batch, on its device: sets -inf in ``logits`` where a token would repeat an n-gram.

    [B, V], [B, T]; -1 in ``tokens`` is padding on the left, which is in no n-gram.
    """
    length = tokens.shape[1]
    if length < size:
        return
    after = tokens[:, size - 1 :]  # what followed each run of size - 1 tokens
    repeats, tail = after >= 0, tokens[:, length - size + 1 :]
    if size > 1:
        repeats &= tail[:, :1] >= 0
    for i in range(size - 1):
        repeats &= tokens[:, i : i + after.shape[1]] == tail[:, i : i + 1]
    bound = torch.where(repeats, -torch.inf, torch.inf).to(logits.dtype)
    logits.scatter_reduce_(1, after.clamp(min=0), bound, "amin")


def example_uniforms(example_id: int, sampling: Sampling) -> np.ndarray:
    """The uniform numbers with which one example's tokens are drawn: its own, whatever its batch.

    -> [max_new_tokens], float64; zeros if nothing is drawn.
    """
    if sampling.temperature == 0:
        return np.zeros(sampling.max_new_tokens)
    return np.random.default_rng([sampling.seed, example_id]).random(sampling.max_new_tokens)


def can_choose(logits: Tensor) -> Tensor:
    """Which rows a token can be chosen from: none of their logits is NaN, the largest is finite.  [B, V] -> [B]."""
    return logits.amax(-1).isfinite()  # amax hands a NaN on


def not_finite(dtype: object) -> str:
    """What is said where a model that computes in this dtype gave logits that no token can be chosen from."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"the model's logits are not finite (NaN or infinite) in {name}: its weights are damaged, or {name} is too "
        f"narrow for it; check the weights, or give another `dtype`"
    )


def next_tokens(logits: Tensor, bans: Sequence[NgramBan], uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row under its own ban, which modifies ``logits``.  [B, V], [B] -> [B].

    For vLLM, whose requests come and go one by one.
    """
    banned = [(row, token) for row, ban in enumerate(bans) for token in ban.banned()]
    if banned:
        rows, tokens = torch.tensor(banned, device=logits.device).T
        logits[rows, tokens] = -torch.inf
    return choose_tokens(logits, uniforms, sampling)


def choose_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row: the most likely, or the one at ``uniforms`` of the cumulative distribution.

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
    """Mask all but the smallest set of top tokens that holds ``top_p`` of the probability.  [B, V] -> [B, V]."""
    values, order = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)
