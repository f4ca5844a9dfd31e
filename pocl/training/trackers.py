"""Where a run's curves go beside metrics.jsonl: accelerate's trackers, chosen by name, behind one small interface.

Projects, places and offline modes are those of each tracker's own environment variables.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError, first_line
from pocl.common.files import read_json, write_json
from pocl.training.run_folder import RunFolder

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # each by the name of its package
NONE = "none"
_PROJECT = "pocl"  # unless WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME says another


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is not installed, and for none together with another."""
    if NONE in names and len(set(names)) > 1:
        raise UserError(f"`report_to` {' '.join(names)}: none goes with no other")
    for name in names:
        if name != NONE and find_spec(name) is None:
            raise UserError(f"`report_to` {name}: its package is not installed; pip install {name}, or leave it out")


class Trackers:
    """Several trackers of one run. Only rank 0 opens them; one that fails is left out from then on, and it is said."""

    def __init__(self, names: Sequence[str], run: RunFolder) -> None:
        self.names = [name for name in dict.fromkeys(names) if name != NONE]
        self.run = run
        self._open: dict[str, Any] = {}
        self._ids = run.path / "trackers.json"  # what a resumed run goes on with

    def open(self, step: int) -> None:
        """Start, or resume after optimiser step ``step``.  Raises UserError where a tracker cannot start."""
        if not self.names or not distributed.is_main():
            return
        classes = _tracker_classes()
        ids = read_json(self._ids) if step > 0 and self._ids.is_file() else {}
        for name in self.names:
            try:
                tracker = classes[name](**_arguments(name, self.run, ids.get(name), step))
                tracker.start()
                if name != "tensorboard" and name not in ids:  # TensorBoard would make a run of its own for them
                    tracker.store_init_configuration(_options(self.run))
                    ids[name] = _id_of(name, tracker)
            except Exception as error:  # of other people's servers, accounts and clients
                raise UserError(
                    f"`report_to` {name} cannot start: {first_line(error)}; mend that, work offline "
                    f"(WANDB_MODE=offline, MLFLOW_TRACKING_URI=sqlite:///mlflow.db), or leave it out"
                ) from error
            self._open[name] = tracker
        write_json(self._ids, ids)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """One point for each value that is a number."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name in list(self._open):
            self._try(name, lambda tracker: tracker.log(numbers, step=step))

    def close(self) -> None:
        """Finish each."""
        for name in list(self._open):
            self._try(name, lambda tracker: tracker.finish())
        self._open.clear()

    def _try(self, name: str, call: Callable[[Any], None]) -> None:
        try:
            call(self._open[name])
        except Exception as error:  # a server that is away must not end a run
            del self._open[name]
            say(f"{name} failed and is left out from here on ({first_line(error)}); metrics.jsonl has everything")


def _tracker_classes() -> Mapping[str, Any]:
    import warnings

    import torch
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # Its trackers speak through a logger that wants to know the ranks; they are as the launcher made them. For several
    # on a CPU it would choose another number of threads, and with it another order of sums.
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PartialState()
    torch.set_num_threads(threads)
    return LOGGER_TYPE_TO_CLASS


def _arguments(name: str, run: RunFolder, known: str | None, step: int) -> dict[str, Any]:
    """What a tracker is made with; ``known`` is its own name of a run that is resumed."""
    title, project = "/".join(run.path.resolve().parts[-3:]), os.environ.get(f"{name.upper()}_PROJECT", _PROJECT)
    if name == "tensorboard":
        return {"run_name": "tensorboard", "logging_dir": str(run.path), "purge_step": step + 1}
    if name == "wandb":
        return {"run_name": project, "name": title, "dir": str(run.path), "id": known, "resume": "allow"}
    if name == "trackio":
        return {"run_name": project, "name": known or title, "resume": "allow"}
    return {"experiment_name": project, "run_name": title, "run_id": known}


def _id_of(name: str, tracker: Any) -> str:
    """What a tracker calls the run that it has begun."""
    run = tracker.tracker
    return str(run.info.run_id if name == "mlflow" else run.id if name == "wandb" else run.name)


def _options(run: RunFolder) -> dict[str, Any]:
    """The options of the run, as group.name; empty for a run that was begun without them."""
    groups = read_json(run.config)["options"] if run.config.is_file() else {}
    return {
        f"{group}.{name}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for group, options in groups.items()
        for name, value in options.items()
    }
