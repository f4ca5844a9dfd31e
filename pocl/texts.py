"""What one optimiser step trains on: this rank's micro-batches, with responses from the data or from the student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.batching import OVERHEAD_TOKENS, cut_rows, micro_batches
from pocl.data import Batch, Split
from pocl.generation import generate
from pocl.on_policy import OnPolicy, OnPolicyState, Response
from pocl.sampling import Sampling


@dataclass(frozen=True)
class Text:
    """One micro-batch of a rank: which examples, their batch, and whether the student wrote the responses."""

    positions: np.ndarray
    batch: Batch
    of_student: bool


class TextSource:
    """Cuts a global batch into micro-batches; on-policy, some of them get responses that the student samples.

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
        """Whether text of the student has a cross-entropy term."""
        return self.on_policy is not None and self.on_policy.cross_entropy

    def of_step(self, examples: np.ndarray, step: int) -> list[Text]:
        """This rank's micro-batches of the global batch ``examples`` [G] at optimiser step ``step``."""
        shares = micro_batches(
            examples,
            self.train.lengths,
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            overhead=OVERHEAD_TOKENS[self.device.type],
            packed=self.packed,
        )
        return [text for number, positions in enumerate(shares) for text in self._texts(positions, step, number)]

    def sizes(self, texts: Sequence[Text], examples: np.ndarray) -> tuple[int, int, int]:
        """(response tokens, input tokens, texts of the student) of the whole step, over all ranks."""
        if self.on_policy is None:  # known beforehand, without asking the other ranks
            return int(self.train.num_labels[examples].sum()), int(self.train.lengths[examples].sum()), 0
        counts = [
            sum(text.batch.num_response_tokens for text in texts),
            sum(int(text.batch.attention_mask.sum()) for text in texts),
            sum(len(text.positions) for text in texts if text.of_student),
        ]
        response_tokens, inputs, student_texts = distributed.sum_over_ranks(counts, self.device)
        return int(response_tokens), int(inputs), int(student_texts)

    def _texts(self, positions: np.ndarray, step: int, number: int) -> list[Text]:
        """One micro-batch with its gold responses, or what the student wrote instead, cut anew by its lengths."""
        source = "gold"
        if self.on_policy:
            source = self.on_policy.source(
                step,
                number,
                progress=step / self.total_steps,
                threshold=self.state.threshold,
                buffer_full=len(self.state.buffer) >= self.on_policy.buffer_size,
            )
        if self.on_policy is None or source == "gold":
            return [Text(positions, self._laid_out(self.train.batch(positions)), of_student=False)]
        responses = self._sample(positions, step) if source == "sample" else []
        if self.on_policy.buffer_size:
            self.state = self.state.add(responses, self.on_policy.buffer_size)
            responses = self.state.draw(len(positions), [self.on_policy.seed, step, number, distributed.rank()])
        return [self._of_student(part) for part in self._cut(responses)]

    def _of_student(self, responses: Sequence[Response]) -> Text:
        drawn = np.array([position for position, _ in responses])
        batch = self.train.batch_of(drawn, [tokens for _, tokens in responses])
        return Text(drawn, self._laid_out(batch), of_student=True)

    def _laid_out(self, batch: Batch) -> Batch:
        return batch.packed() if self.packed else batch

    def _cut(self, responses: Sequence[Response]) -> list[list[Response]]:
        """The responses in micro-batches by their own lengths, which nobody knew before: as many on every rank."""
        totals = [int(self.train.prompt_lengths[position]) + len(tokens) for position, tokens in responses]
        lengths = np.minimum(totals, self.train.max_length) - 1
        order = np.argsort(-lengths, kind="stable")
        widths = distributed.gather_by_id({distributed.rank(): lengths[order]})
        longest = np.max(list(widths.values()), axis=0)  # of each place in the order, over all ranks
        limits = {"max_tokens": self.max_tokens, "batch_size": self.batch_size}
        cuts = cut_rows(longest, **limits, overhead=OVERHEAD_TOKENS[self.device.type], packed=self.packed)
        return [[responses[i] for i in order[rows]] for rows in cuts]

    def _sample(self, positions: np.ndarray, step: int) -> list[Response]:
        """The student's own answers to these prompts, at temperature 1, others at every step."""
        end = self.tokenizer.eos_token_id
        rows = self.train.table[[int(position) for position in positions]]
        seed = 1_000_003 * (step + 1) + (self.on_policy.seed if self.on_policy else 0)
        answers = generate(
            self.student(),
            rows["prompt_ids"],
            rows["id"],
            sampling=Sampling(self.max_new_tokens, no_repeat_ngram=0, seed=seed),
            eos_ids=[end],
            vocab_size=len(self.tokenizer),
        )
        # An answer that was cut at its longest did not end: it gets no end-of-text token.
        ended = [answer + [end] if len(answer) < self.max_new_tokens else answer for answer in answers]
        return [(int(position), answer) for position, answer in zip(positions, ended, strict=True)]
