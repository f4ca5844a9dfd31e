"""On-policy distillation (GKD, arXiv 2306.13649): some examples get a response that the student samples itself.

Which ones is decided example by example from the run's seed, the step and the example's id, so it depends neither on
the number of ranks nor on how a global batch is cut. ``mixed`` samples with a fixed probability; ``adaptive`` is
DistiLLM's schedule (arXiv 2402.03898): the probability rises when the dev loss does, and as the run progresses more of
these responses come from a replay buffer instead of being sampled anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pocl.common import distributed
from pocl.data.dataset import Split
from pocl.generation.decoding import generate
from pocl.generation.sampling import Sampling
from pocl.models.student import Student
from pocl.training.batches import Texts

Response = tuple[int, list[int]]  # position in the training split, response tokens
Source = Literal["gold", "sample", "replay"]

THRESHOLD_STEP = 0.1  # how far the adaptive probability rises at a time
LOSS_MARGIN = 0.1  # nats per token by which the dev loss must have risen for that
_SEEDS_OF_A_STEP = 1_000_003  # a prime: the sampling seeds of two steps differ for any run seed below it


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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "OnPolicyState":
        """What a checkpoint holds of a state, its fields as JSON values, as a state again."""
        buffer = tuple((int(position), list(tokens)) for position, tokens in value["buffer"])
        return cls(value["threshold"], value["last_dev_loss"], buffer)


class StudentTexts:
    """Chooses the responses of a global batch: the data's, new ones of the student, or some of its earlier ones."""

    def __init__(
        self,
        plan: OnPolicy,
        train: Split,
        student: Callable[[], Student],
        *,
        max_new_tokens: int,
        total_steps: int,
    ) -> None:
        self.plan, self.train, self.student = plan, train, student
        self.max_new_tokens, self.total_steps = max_new_tokens, total_steps

    def choose(self, examples: np.ndarray, step: int, state: OnPolicyState) -> tuple[Texts, OnPolicyState]:
        """The texts of a global batch [G] at an optimiser step, and the state behind it.

        A response from the replay buffer brings its own prompt along. Collective: every rank must call it.
        """
        sources = self._sources(examples, step, state)
        fresh = self._sample(examples[sources == "sample"], step)
        state = state.add(fresh, self.plan.buffer_size)
        if self.plan.mode == "mixed" and self.plan.buffer_size:  # new ones go through the buffer
            fresh, from_buffer = [], len(fresh)
        else:
            from_buffer = int((sources == "replay").sum())
        if from_buffer:
            fresh = [*fresh, *state.draw(from_buffer, [self.plan.seed, step])]
        gold = examples[sources == "gold"]
        positions = np.concatenate([gold, np.array([position for position, _ in fresh], dtype=gold.dtype)])
        return Texts(positions, [None] * len(gold) + [tokens for _, tokens in fresh]), state

    def _sources(self, examples: np.ndarray, step: int, state: OnPolicyState) -> np.ndarray:
        """Where the response of each example comes from.  [G] -> [G]."""
        full = len(state.buffer) >= self.plan.buffer_size
        return np.array(
            [
                self.plan.source(
                    step,
                    int(example_id),
                    progress=step / self.total_steps,
                    threshold=state.threshold,
                    buffer_full=full,
                )
                for example_id in self.train.ids[examples]
            ]
        )

    def _sample(self, positions: np.ndarray, step: int) -> list[Response]:
        """The student's own answers to these prompts, at temperature 1; each rank samples a share of them."""
        if len(positions) == 0:
            return []
        student = self.student()  # on every rank, even one without a prompt: ZeRO-3 gathers the weights
        mine = distributed.my_share(positions.tolist())
        answers: list[list[int]] = []
        if mine:
            rows = self.train.table[list(mine)]
            seed = _SEEDS_OF_A_STEP * (step + 1) + self.plan.seed
            sampling = Sampling(self.max_new_tokens, no_repeat_ngram=0, seed=seed)
            answers = generate(student, rows["prompt_ids"], rows["id"], sampling)
        found = distributed.gather_by_id(dict(zip(mine, answers, strict=True)))
        end = [self.train.template.end_id(student.tokenizer)]
        # An answer cut at max_new_tokens did not end: it gets no end.
        return [
            (position, found[position] + end if len(found[position]) < self.max_new_tokens else found[position])
            for position in positions.tolist()
        ]
