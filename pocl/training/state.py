"""Everything of a run that changes and that a checkpoint keeps, besides weights and optimiser."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pocl.difficulty.training_losses import TrainingLosses
from pocl.training.batches import GlobalBatch, MicroBatch, Texts
from pocl.training.on_policy import OnPolicyState, StudentTexts
from pocl.training.position import Position


class RunState:
    """How far the run is, each example's training loss, and the on-policy schedule's memory. Saved whole."""

    def __init__(self, num_examples: int) -> None:
        self.position = Position()
        self.losses = TrainingLosses(num_examples)
        self.on_policy = OnPolicyState()
        self.saved: Position | None = None  # that of the last checkpoint

    def restore(self, position: Position, kept: Mapping[str, Any]) -> None:
        """Become the state that a checkpoint holds."""
        self.position = self.saved = position
        self.losses.restore(kept["losses"])
        self.on_policy = OnPolicyState.from_json(kept["on_policy"])

    def to_keep(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the position. Collective: the ranks share their losses."""
        self.losses.share()
        return {"on_policy": self.on_policy.as_json(), "losses": self.losses.as_json()}

    def was_saved(self) -> None:
        """The last checkpoint is of this position."""
        self.saved = self.position

    def choose_texts(self, source: StudentTexts, examples: Any) -> Texts:
        """The texts of this step's global batch, some of them the student's own."""
        texts, self.on_policy = source.choose(examples, self.position.step, self.on_policy)
        return texts

    def note_loss(self, micro: MicroBatch, cross_entropy: Tensor) -> None:
        """Record the cross-entropy of each response token [N] of a micro-batch."""
        self.losses.note(micro.positions, micro.of_student, micro.batch, cross_entropy)

    def step_done(self, batch: GlobalBatch, samples: int, *, teacher_reads: bool) -> None:
        """One optimiser step on ``samples`` examples was made."""
        self.position = self.position.after_step(batch, samples, teacher_reads=teacher_reads)

    def step_skipped(self) -> None:
        """The step's update was left out."""
        self.position = self.position.after_skip()

    def move_to(self, position: Position) -> None:
        """The run is at another position."""
        self.position = position

    def dev_loss_known(self, loss: float) -> None:
        """A dev evaluation found this cross-entropy [nats per token]."""
        self.on_policy = self.on_policy.after_dev_loss(loss)
