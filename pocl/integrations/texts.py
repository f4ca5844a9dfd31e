"""The texts of a step in TRL's GKDTrainer and GOLDTrainer: which the student wrote, and how many tokens they have.

Both trainers count a step's tokens from the data's labels, then sample other texts. Here sampled tokens are counted.
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pocl.common import distributed
from pocl.data.batch import IGNORE

_TEXT = ("input_ids", "attention_mask", "labels")


class SampledFirst:
    """GKDTrainer's: it samples a micro-batch when its turn comes. Here all of a step's are sampled, then counted.

    ``lmbda`` and ``seq_kd`` are read at every step, by the same random numbers as GKDTrainer draws.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._read, self._train = trainer, trainer.get_batch_samples, trainer.training_step
        self._by_student: deque[bool] = deque()  # of the micro-batches to come
        trainer.get_batch_samples, trainer.training_step = self.read, self.train

    def written_by_student(self) -> bool:
        """Whether the student has sampled the micro-batch that comes now; once for each."""
        return bool(self._by_student) and self._by_student.popleft()

    def num_tokens(self, counted: Tensor | int) -> Tensor | float:
        """The response tokens of the step, on all processes."""
        return counted

    def read(self, iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Tensor | int | None]:
        """In the place of ``get_batch_samples``: a step's micro-batches, sampled, and their tokens."""
        batches, num_tokens = self._read(iterator, num_batches, device)
        self._by_student = deque(map(self._sample, batches))
        if self._trainer.lmbda > 0 or self._trainer.seq_kd:
            num_tokens = self._trainer._get_num_items_in_batch(batches, device)
        return batches, num_tokens

    def train(self, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of ``training_step``, which would sample again."""
        trainer = self._trainer
        kept = trainer.lmbda, trainer.seq_kd
        trainer.lmbda, trainer.seq_kd = -1.0, False
        try:
            loss: Tensor = self._train(*args, **kwargs)
            return loss
        finally:
            trainer.lmbda, trainer.seq_kd = kept

    def _sample(self, batch: dict[str, Tensor]) -> bool:
        """Let student or teacher write a micro-batch's answers anew, or neither; True if it was the student."""
        from trl.models.utils import unwrap_model_for_generation

        trainer = self._trainer
        by_student = random.random() <= trainer.lmbda
        if by_student or trainer.seq_kd:
            writer = trainer.model_wrapped if by_student else trainer.teacher_model
            ways = {"generation_kwargs": trainer.generation_kwargs}
            if trainer.args.gradient_checkpointing_kwargs:
                ways["gradient_checkpointing_kwargs"] = trainer.args.gradient_checkpointing_kwargs
            with unwrap_model_for_generation(writer, trainer.accelerator, **ways) as model:
                texts = trainer.generate_on_policy_outputs(model, batch, trainer.generation_config)
            batch.update(zip(_TEXT, texts, strict=True))
        return by_student


class Buffered:
    """GOLDTrainer's: it samples a step's micro-batches at once, and keeps them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def written_by_student(self) -> bool:
        """Whether the student has sampled the micro-batch that comes now."""
        by_student: Sequence[bool] = self._trainer._buffered_on_policy
        return by_student[(self._trainer._step - 1) % len(by_student)]

    def num_tokens(self, counted: Tensor | int) -> Tensor | float:
        """The response tokens of the step, on all processes.

        GOLDTrainer reads its window of micro-batches as often as it accumulates, and has ``counted`` each time.
        """
        kept = self._trainer._buffered_inputs
        if not all("labels" in batch for batch in kept):  # images, which are collated when their turn comes
            return counted / len(kept)
        labels = [batch["labels"][:, 1:] for batch in kept]
        num_tokens = float(sum(int((each != IGNORE).sum()) for each in labels))
        return int(distributed.sum_over_ranks([num_tokens], labels[0].device)[0])
