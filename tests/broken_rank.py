"""train.py in which rank 1 has a bug that shows in the third step."""

import os
from typing import Any
from unittest import mock

import train


def main() -> None:
    """Train until then."""
    whole = train.Trainer.step

    def step(self: train.Trainer, *arguments: Any, **more: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.position.step == 2:
            raise ZeroDivisionError("a bug")
        return whole(self, *arguments, **more)

    with mock.patch.object(train.Trainer, "step", step):
        train.main()
