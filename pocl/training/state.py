"""Everything of a run that changes and that a checkpoint keeps, besides weights and optimiser."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pocl.difficulty.training_losses import TrainingLosses
from pocl.training.on_policy import OnPolicyState
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
        return {"on_policy": asdict(self.on_policy), "losses": self.losses.as_json()}
