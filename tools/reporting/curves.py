"""What every picture of a run needs: its place, the run's name, a running mean, the stages and where they lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.common.errors import UserError
from pocl.common.files import read_json
from pocl.curriculum.stages import Stage

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".webp", ".eps")  # endings that matplotlib writes without other programs


def picture_path(given: str | None, usual: Path) -> Path:
    """Where a picture is written: the file that was given, or the usual one.

    Raises UserError where its ending is no picture's, or its folder is a file.
    """
    path = Path(given) if given else usual
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--output {path} does not end as a picture does; give it one of {' '.join(PICTURES)}")
    in_the_way = next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None)
    if in_the_way or path.is_dir():
        raise UserError(f"cannot write {path}: {in_the_way or path} is {'no' if in_the_way else 'a'} folder")
    return path


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


def read_stages(path: Path) -> list[Stage]:
    """The planned stages that a run's stages.json holds.  Raises UserError where it is damaged."""
    try:
        return [_stage(**record) for record in read_json(path)]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} holds no list of stages; start the run's own command again to write it") from error


def _stage(*, index: int, pool: Sequence[int], epochs: int, temperature: float, kd_ratio: float) -> Stage:
    start, stop = pool
    for number in (index, start, stop, epochs):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no count")
    len(range(start, stop))  # raises OverflowError
    return Stage(index, range(start, stop), epochs, float(temperature), float(kd_ratio))
