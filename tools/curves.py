"""What every picture of a run needs from its metrics: the run's name, a running mean, where its stages lie (pure)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_title(path: Path) -> str:
    """What the run is called: the last folders of its path, which say family, method, type and name."""
    return " / ".join(path.resolve().parts[-4:])


def running_mean(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """The exponentially weighted mean up to each value, without the bias of its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def stage_slices(steps: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """Stage -> where its records start and stop."""
    slices: dict[int, tuple[int, int]] = {}
    for i, record in enumerate(steps):
        slices[record["stage"]] = (slices.get(record["stage"], (i, i))[0], i + 1)
    return slices
