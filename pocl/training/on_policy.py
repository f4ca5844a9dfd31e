"""On-policy distillation (GKD, arXiv 2306.13649): some examples get a response that the student samples itself.

Which ones is decided example by example from the run's seed, the step and the example's id, so it depends neither on
the number of ranks nor on how a global batch is cut. ``mixed`` samples with a fixed probability; ``adaptive`` is
DistiLLM's schedule (arXiv 2402.03898): the probability rises when the dev loss does, and as the run progresses more of
these responses come from a replay buffer instead of being sampled anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Response = tuple[int, list[int]]  # position in the training split, response tokens
Source = Literal["gold", "sample", "replay"]

THRESHOLD_STEP = 0.1  # how far the adaptive probability rises at a time
LOSS_MARGIN = 0.1  # nats per token by which the dev loss must have risen for that


@dataclass(frozen=True)
class OnPolicy:
    """The schedule: which response an example is trained on."""

    mode: Literal["mixed", "adaptive"]
    mixed_alpha: float  # probability of student text in ``mixed``
    buffer_size: int  # responses kept to train on again; 0: none
    cross_entropy: bool  # whether student text has a cross-entropy term as well
    seed: int

    def source(self, step: int, example_id: int, *, progress: float, threshold: float, buffer_full: bool) -> Source:
        """Where the response of an example comes from: the data, a new sample, or the buffer.

        A pure function of its arguments; ``progress`` is the share of the run that is done, ``threshold`` the
        adaptive probability.
        """
        chance = np.random.default_rng([self.seed, step, example_id]).random()
        if self.mode == "mixed":
            return "sample" if chance < self.mixed_alpha else "gold"
        if chance >= threshold:
            return "gold"
        fresh = chance < threshold * (1.0 - progress) or not buffer_full or not self.buffer_size
        return "sample" if fresh else "replay"


@dataclass(frozen=True)
class OnPolicyState:
    """What the schedule has learnt so far, the same on every rank: part of a checkpoint."""

    threshold: float = 0.0
    last_dev_loss: float | None = None
    buffer: tuple[Response, ...] = field(default=())

    def add(self, responses: Sequence[Response], buffer_size: int) -> "OnPolicyState":
        """The state with these responses in the buffer; the oldest leave it."""
        return replace(self, buffer=(*self.buffer, *responses)[-buffer_size:] if buffer_size else ())

    def draw(self, count: int, seed: Sequence[int]) -> list[Response]:
        """``count`` responses of the buffer, without repetition if it holds that many."""
        chosen = np.random.default_rng(seed).choice(len(self.buffer), count, replace=len(self.buffer) < count)
        return [self.buffer[i] for i in chosen]

    def after_dev_loss(self, loss: float) -> "OnPolicyState":
        """The state after a dev evaluation: the threshold rises if the loss has risen since its last rise."""
        if self.last_dev_loss is None:
            return replace(self, last_dev_loss=loss)
        if loss < self.last_dev_loss + LOSS_MARGIN:
            return self
        return replace(self, threshold=min(1.0, self.threshold + THRESHOLD_STEP), last_dev_loss=loss)

    def as_json(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            "threshold": self.threshold,
            "last_dev_loss": self.last_dev_loss,
            "buffer": [list(response) for response in self.buffer],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "OnPolicyState":
        """What ``as_json`` returned, as a state again."""
        buffer = tuple((int(position), list(tokens)) for position, tokens in value["buffer"])
        return cls(value["threshold"], value["last_dev_loss"], buffer)
