"""What one optimiser step trains on: this rank's micro-batches, with responses from the data or from the student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common import distributed
from pocl.data.batch import Batch
from pocl.data.dataset import Split
from pocl.data.micro_batches import OVERHEAD_TOKENS, MicroBatchLimits, micro_batches
from pocl.generation.decoding import generate
from pocl.generation.sampling import Sampling
from pocl.models.student import Student
from pocl.training.on_policy import OnPolicy, OnPolicyState, Response

_SEEDS_OF_A_STEP = 1_000_003  # a prime: the sampling seeds of two steps differ for any run seed below it


@dataclass(frozen=True)
class MicroBatch:
    """Some examples of a global batch: positions in the split [B], and whether the response is the student's [B]."""

    positions: np.ndarray
    of_student: np.ndarray
    batch: Batch


@dataclass(frozen=True)
class GlobalBatch:
    """One optimiser step's text: this rank's micro-batches, and counts over all ranks."""

    micro_batches: Sequence[MicroBatch]
    num_tokens: int  # inputs, without padding
    num_response_tokens: int
    num_student_texts: int  # responses that are the student's own


@dataclass(frozen=True)
class _Texts:
    """The examples of a global batch of G: positions [G], and the responses that are not the data's."""

    positions: np.ndarray
    responses: Sequence[Sequence[int] | None]

    @property
    def of_student(self) -> np.ndarray:
        return np.array([response is not None for response in self.responses])


class MicroBatchSource:
    """Cuts global batches into micro-batches; on-policy, some examples get responses that the student samples.

    ``state`` is the on-policy schedule's memory, which a checkpoint keeps.
    """

    def __init__(
        self,
        train: Split,
        tokenizer: PreTrainedTokenizerBase,
        *,
        on_policy: OnPolicy | None,
        student: Callable[[], PreTrainedModel],
        max_tokens: int,
        batch_size: int | None,
        packed: bool,
        max_new_tokens: int,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.train, self.tokenizer, self.device = train, tokenizer, device
        self.on_policy, self.state = on_policy, OnPolicyState()
        self.student, self.max_tokens, self.batch_size, self.packed = student, max_tokens, batch_size, packed
        self.max_new_tokens, self.total_steps = max_new_tokens, total_steps

    @property
    def student_cross_entropy(self) -> bool:
        """Whether the student's own text has a cross-entropy term."""
        return self.on_policy is not None and self.on_policy.cross_entropy

    @property
    def follows_dev_loss(self) -> bool:
        """Whether the schedule needs the dev loss, including the one before the first step."""
        return self.on_policy is not None and self.on_policy.mode == "adaptive"

    def of_step(self, examples: np.ndarray, step: int) -> GlobalBatch:
        """The global batch of these positions [G] at optimiser step ``step``, cut for this rank."""
        texts = _Texts(examples, [None] * len(examples))
        if self.on_policy:
            texts = self._on_policy(self.on_policy, examples, step)
        lengths, prompt_lengths = self._lengths(texts), self.train.prompt_lengths[texts.positions]
        cuts = micro_batches(
            np.arange(len(examples)),
            lengths,
            MicroBatchLimits(self.max_tokens, self.batch_size, OVERHEAD_TOKENS[self.device.type], self.packed),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        return GlobalBatch(
            [self._micro_batch(texts, rows) for rows in cuts],
            num_tokens=int(lengths.sum()),
            num_response_tokens=int((lengths + 1 - prompt_lengths).sum()),
            num_student_texts=int(texts.of_student.sum()),
        )

    def _micro_batch(self, texts: _Texts, rows: np.ndarray) -> MicroBatch:
        positions = texts.positions[rows]
        batch = self.train.batch(positions, [texts.responses[row] for row in rows])
        return MicroBatch(positions, texts.of_student[rows], batch.packed() if self.packed else batch)

    def _lengths(self, texts: _Texts) -> np.ndarray:
        """The number of input tokens of each text.  -> [G]."""
        lengths = self.train.lengths[texts.positions]
        for row, response in enumerate(texts.responses):
            if response is not None:
                total = self.train.prompt_lengths[texts.positions[row]] + len(response)
                lengths[row] = min(total, self.train.max_length) - 1
        return lengths

    def _on_policy(self, on_policy: OnPolicy, examples: np.ndarray, step: int) -> _Texts:
        """The examples, some of them with a response of the student: a new one, or one from the replay buffer.

        A response from the buffer brings its own prompt along.
        """
        full = len(self.state.buffer) >= on_policy.buffer_size
        sources = np.array(
            [
                on_policy.source(
                    step,
                    int(example_id),
                    progress=step / self.total_steps,
                    threshold=self.state.threshold,
                    buffer_full=full,
                )
                for example_id in self.train.ids[examples]
            ]
        )
        fresh = self._sample(on_policy, examples[sources == "sample"], step)
        self.state = self.state.add(fresh, on_policy.buffer_size)
        if on_policy.mode == "mixed" and on_policy.buffer_size:  # new ones go through the buffer
            fresh, from_buffer = [], len(fresh)
        else:
            from_buffer = int((sources == "replay").sum())
        if from_buffer:
            fresh = [*fresh, *self.state.draw(from_buffer, [on_policy.seed, step])]
        gold = examples[sources == "gold"]
        positions = np.concatenate([gold, np.array([position for position, _ in fresh], dtype=gold.dtype)])
        return _Texts(positions, [None] * len(gold) + [tokens for _, tokens in fresh])

    def _sample(self, on_policy: OnPolicy, positions: np.ndarray, step: int) -> list[Response]:
        """The student's own answers to these prompts, at temperature 1; each rank samples a share of them."""
        if len(positions) == 0:
            return []
        student = self.student()  # on every rank, even one without a prompt: ZeRO-3 gathers the weights
        mine = distributed.my_share(positions)
        answers: list[list[int]] = []
        if len(mine):
            rows = self.train.table[mine.tolist()]
            seed = _SEEDS_OF_A_STEP * (step + 1) + on_policy.seed
            sampling = Sampling(self.max_new_tokens, no_repeat_ngram=0, seed=seed)
            answers = generate(Student(student, self.tokenizer), rows["prompt_ids"], rows["id"], sampling=sampling)
        found = distributed.gather_by_id(dict(zip(mine.tolist(), answers, strict=True)))
        end = [self.tokenizer.eos_token_id]
        # An answer cut at max_new_tokens did not end: it gets no end-of-text token.
        return [
            (position, found[position] + end if len(found[position]) < self.max_new_tokens else found[position])
            for position in positions.tolist()
        ]
