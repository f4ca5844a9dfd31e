"""What a report reads of one row: its run, its evaluation, the texts behind its examples. Any may be missing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pocl.common.errors import UserError
from pocl.common.files import ROOT, read_json, read_jsonl
from pocl.curriculum.stages import Stage
from pocl.difficulty.forgetting import NUM_BUCKETS
from pocl.difficulty.ranking import ranked_columns
from pocl.evaluation.sets import Example, load_set
from pocl.training.run_folder import RunFolder
from tools.reporting.scores import answers_file, find_evaluation
from tools.show_answers import question

Record = Mapping[str, Any]
WITHOUT_WORDS = ", so the examples have ids and no words."


@dataclass(frozen=True)
class Ranking:
    """The records of one difficulty file, easiest first."""

    place: str  # difficulty, difficulty-stage2, ...
    records: Sequence[Record]

    @cached_property
    def columns(self) -> list[str]:
        """What ranked."""
        return ranked_columns(self.records)

    @cached_property
    def places(self) -> dict[int, int]:
        """Example id -> place, 0 the easiest."""
        return {record["id"]: place for place, record in enumerate(self.records)}

    @cached_property
    def quarters(self) -> list[int]:
        """The quarter of each place, 1 the easiest, as the buckets of the trainer have them."""
        parts = np.array_split(np.arange(len(self.records)), NUM_BUCKETS)
        return [number for number, part in enumerate(parts, start=1) for _ in part]

    @property
    def has_lengths(self) -> bool:
        """Whether the records say how long the examples are; an order from elsewhere does not."""
        return "response_tokens" in self.records[0]

    def chosen_places(self, most: int) -> list[int]:
        """The places of the ``most`` easiest and hardest examples, each once, easiest first."""
        size = len(self.records)
        return sorted({*range(min(most, size)), *range(max(0, size - most), size)})


@dataclass(frozen=True)
class Texts:
    """The training examples in words: id -> (question, reference); ``problem`` says why there are none."""

    by_id: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Entry:
    """One row of the report. ``run`` is None for an evaluation without a run, ``evaluation`` for the opposite."""

    name: str
    run: RunFolder | None
    evaluation: Path | None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.run.path if self.run else self.evaluation or Path()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or nothing."""
        return self._json("config.json") or {}

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """ledger.json, or nothing."""
        return self._json("ledger.json") or {}

    @cached_property
    def commands(self) -> dict[str, str]:
        """The script calls that tools/reproduce.py left beside the run and its evaluation, or nothing."""
        beside = [folder / "reproduce.json" for folder in (self.folder, self.evaluation) if folder]
        return {name: line for path in beside if path.is_file() for name, line in read_json(path).items()}

    @cached_property
    def stages(self) -> list[Stage]:
        """The planned stages."""
        path = self.folder / "stages.json"
        return read_stages(path) if self.run and path.is_file() else []

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self.run.read_metrics() if self.run else []

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of optimiser steps."""
        return [record for record in self.metrics if "loss" in record]

    @cached_property
    def dev(self) -> list[dict[str, Any]]:
        """The lines of dev evaluations."""
        return [record for record in self.metrics if "dev_rouge_l" in record]

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The dev evaluation that chose best/: the highest ROUGE-L, where equal the lowest cross-entropy."""
        return max(self.dev, key=lambda record: (record["dev_rouge_l"], -record["dev_cross_entropy"]), default=None)

    @cached_property
    def bands(self) -> list[tuple[int, float, float]]:
        """The stages as far as they were trained: (number from 1, where it starts, where it ends), in steps."""
        starts = {record["stage"]: record["step"] for record in reversed(self.steps)}
        places = sorted(starts.items())
        stops = [start for _, start in places[1:]] + [self.steps[-1]["step"] + 1] if places else []
        return [(stage + 1, start - 0.5, stop - 0.5) for (stage, start), stop in zip(places, stops, strict=True)]

    @property
    def last_step(self) -> int | None:
        """The last optimiser step that is recorded; None where nothing was trained."""
        return self.steps[-1]["step"] if self.steps else self.ledger.get("optimizer_steps")

    @property
    def batch_size(self) -> int | None:
        """Examples of an optimiser step."""
        return self.option("optimiser", "global_batch_size") or self.ledger.get("global_batch_size")

    @property
    def planned_steps(self) -> int | None:
        """Optimiser steps of all stages, had each its full number of epochs."""
        size = self.batch_size
        return sum(stage.steps(size) for stage in self.stages) if self.stages and size else None

    @cached_property
    def rankings(self) -> list[Ranking]:
        """The rankings, earliest first."""
        first = self.run.first_ranking() if self.run else None
        if self.run is None or first is None:
            return []
        later = set(self.run.path.glob("difficulty-*.jsonl")) - {first}
        paths = [first, *sorted(later, key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])]
        return [Ranking(path.stem, read_jsonl(path)) for path in paths]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json of the evaluation, by set."""
        return read_json(self.evaluation / "summary.json") if self.evaluation else {}

    @cached_property
    def data(self) -> Path | None:
        """The folder of the processed data, where it is still there."""
        given = self.option("data", "data_dir")
        return next((folder for folder in (Path(given), ROOT / given) if folder.is_dir()), None) if given else None

    @cached_property
    def texts(self) -> Texts:
        """The training examples in words."""
        given = self.option("data", "data_dir")
        if given is None:
            return Texts(problem=f"config.json, which names the data, is not there{WITHOUT_WORDS}")
        if self.data is None:
            return Texts(problem=f"The processed data ({given}) is not here{WITHOUT_WORDS}")
        return _read_texts(self.data / "train")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json of the processed data, or nothing."""
        path = self.data / "manifest.json" if self.data else None
        return read_json(path) if path and path.is_file() else {}

    def option(self, group: str, name: str) -> Any:
        """A resolved option of the run; None where it is not known."""
        return self.config.get("options", {}).get(group, {}).get(name)

    def answers(self, name: str, seed: str) -> dict[int, Record]:
        """The answers to a set under a seed, by id; empty where there are none."""
        if self.evaluation is None:
            return {}
        path = answers_file(self.evaluation, name, seed)
        return {record["id"]: record for record in read_jsonl(path)} if path.is_file() else {}

    def _json(self, name: str) -> Any:
        path = self.folder / name
        return read_json(path) if self.run and path.is_file() else None


@cache
def _read_texts(folder: Path) -> Texts:
    try:
        table = datasets.load_from_disk(str(folder)).select_columns(["id", "prompt", "response"])
    except (OSError, ValueError) as error:
        return Texts(problem=f"{folder} cannot be read ({error}){WITHOUT_WORDS}")
    return Texts({row["id"]: (question(row["prompt"], "\n"), row["response"]) for row in table})


def open_entry(name: str, folders: Sequence[Path]) -> Entry:
    """An entry from its folders: a run, a folder that evaluate.py wrote, or one of each.

    Raises UserError where a folder holds neither.
    """
    run, evaluation = None, None
    for folder in folders:
        is_run = any((folder / file).is_file() for file in ("config.json", "metrics.jsonl"))
        found = find_evaluation(folder)
        if not is_run and not found:
            raise UserError(
                f"{folder} holds neither a run (config.json, metrics.jsonl) nor an evaluation (summary.json)"
            )
        run = RunFolder(folder) if is_run else run
        evaluation = found or evaluation
    return Entry(name, run, evaluation)


def read_set(data_root: Path, name: str) -> dict[int, Example]:
    """The prompts and references of an evaluation set by id; empty where the set is not under ``data_root``."""
    try:
        return {example.id: example for example in load_set(data_root, name)}
    except UserError:
        return {}


def run_title(path: Path) -> str:
    """What the run is called: the last folders of its path, which say family, method, type and name."""
    return " / ".join(path.resolve().parts[-4:])


def read_stages(path: Path) -> list[Stage]:
    """The planned stages that a run's stages.json holds.  Raises UserError where it is damaged."""
    try:
        return [_stage(**record) for record in read_json(path)]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} holds no list of stages; start the run's own command again to write it") from error


def _stage(*, pool: Sequence[int], temperature: float, kd_ratio: float, **others: Any) -> Stage:
    start, stop = pool
    stage = Stage(pool=range(start, stop), temperature=float(temperature), kd_ratio=float(kd_ratio), **others)
    for number in (stage.index, start, stop, stage.epochs, *(() if stage.max_steps is None else (stage.max_steps,))):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no count")
    if not isinstance(stage.loss, str | None):
        raise TypeError(f"{stage.loss!r} is no name")
    len(range(start, stop))  # raises OverflowError
    return stage
