"""The scores that evaluations left behind, row by row, where all rows answered the same prompts."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pocl.common.errors import UserError
from pocl.common.files import read_json, read_jsonl


def comparable_scores(
    rows: Mapping[str, Sequence[Path]], metrics: Sequence[str]
) -> list[dict[str, dict[str, np.ndarray]]]:
    """The scores as [metric][row][set], each [T, S, P], of rows made of T runs.

    Raises UserError where rows, or runs of one, answered other prompts of a set or under other seeds.
    """
    read = {name: read_runs(name, folders, metrics) for name, folders in rows.items()}
    scores = [{name: row[metric] for name, row in read.items()} for metric in metrics]
    _check_prompts(scores[0])
    _check_sets([(name, folder) for name, folders in rows.items() for folder in folders])
    return scores


def read_runs(name: str, folders: Sequence[Path], metrics: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Metric -> set -> scores [T, S, P] of a row's runs, one a training seed, of the sets that all of them have.

    Raises UserError where they were not evaluated alike.
    """
    runs = [read_scores(folder, metrics) for folder in folders]
    sets = [key for key in runs[0][metrics[0]] if all(key in run[metrics[0]] for run in runs)]
    for key in sets:
        shapes = {run[metrics[0]][key].shape for run in runs}
        if len(shapes) > 1:
            said = ", ".join(f"{seeds} seed(s) of {prompts} prompts" for seeds, prompts in sorted(shapes))
            raise UserError(f"the runs of {name} answered {key} differently ({said}); evaluate them alike")
    return {metric: {key: np.stack([run[metric][key] for run in runs]) for key in sets} for metric in metrics}


def read_scores(folder: Path, metrics: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Metric -> set -> scores [seeds, prompts] of an eval folder, or of a run folder's eval/.

    Raises UserError where there is none, or a seed lacks prompts of another.
    """
    place = evaluation_of(folder)
    found: dict[str, dict[str, np.ndarray]] = {metric: {} for metric in metrics}
    for name, summary in read_json(place / "summary.json").items():
        paths = [answers_file(place, name, seed) for seed in summary["rouge_l"]["seeds"]]
        seeds = [{record["id"]: record for record in read_jsonl(path)} for path in paths]
        if any(set(seed) != set(seeds[0]) for seed in seeds):
            raise UserError(f"{place / name} holds seeds of different prompts; evaluate again")
        ids = sorted(seeds[0])
        for metric in metrics:
            if metric not in seeds[0][ids[0]]:
                raise UserError(f"{place / name} was evaluated without {metric}; evaluate again")
            found[metric][name] = np.array([[seed[i][metric] for i in ids] for seed in seeds], dtype=np.float64)
    return found


def read_cross_entropies(rows: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, float]]:
    """Row -> set -> cross-entropy of the references [nats a token], the mean of its runs where all of them say it."""
    found: dict[str, dict[str, float]] = {}
    for name, folders in rows.items():
        runs = [read_json(evaluation_of(folder) / "summary.json") for folder in folders]
        for key in runs[0]:
            values = [run[key]["cross_entropy"] for run in runs if "cross_entropy" in run.get(key, ())]
            if len(values) == len(runs):
                found.setdefault(name, {})[key] = statistics.fmean(values)
    return found


def find_evaluation(folder: Path) -> Path | None:
    """The folder that evaluate.py wrote: this one, or eval/ of a run folder; None where neither is one."""
    return next((place for place in (folder, folder / "eval") if (place / "summary.json").is_file()), None)


def evaluation_of(folder: Path) -> Path:
    """``find_evaluation``.  Raises UserError where there is none."""
    place = find_evaluation(folder)
    if place is None:
        raise UserError(f"{folder} holds no evaluation (summary.json); run evaluate.py first")
    return place


def answers_file(evaluation: Path, name: str, seed: str | int) -> Path:
    """The records of a set under a seed, or of the answers that evaluate.py was given."""
    path = evaluation / name / f"{seed}.jsonl"
    return path if path.is_file() else path.with_name("answers.jsonl")


def _check_prompts(scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for key in dict.fromkeys(key for row in scores.values() for key in row):
        counts = {name: row[key].shape[-1] for name, row in scores.items() if key in row}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(f"the rows answered different numbers of prompts of {key} ({said}); evaluate them alike")


def _check_sets(rows: Sequence[tuple[str, Path]]) -> None:
    """Raise UserError where two rows were asked other prompts under a set's name, by the fingerprints of the sets."""
    first: dict[str, tuple[str, str]] = {}  # set -> fingerprint, row
    for row, folder in rows:
        for name, summary in read_json(evaluation_of(folder) / "summary.json").items():
            if "set" in summary and first.setdefault(name, (summary["set"], row))[0] != summary["set"]:
                raise UserError(f"{first[name][1]} and {row} answered other prompts of {name}; evaluate them alike")
