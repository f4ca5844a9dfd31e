"""What a report says of runs in words and numbers: a run in a sentence, its stages, quarters, rankings, ledger."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numerize.numerize import numerize

from pocl.difficulty.diagnostics import buckets, tau
from pocl.difficulty.ranking import column_named
from tools.reporting.data import Entry, Ranking
from tools.reporting.drawings import number
from tools.reporting.panels import QUARTERS

# ledger.json -> its name in words
LEDGER = {
    "samples": "examples seen",
    "tokens": "tokens seen",
    "response_tokens": "response tokens",
    "student_texts": "texts by the student",
    "optimizer_steps": "optimiser steps",
    "global_batch_size": "global batch",
    "lr": "learning rate",
    "teacher_forward_passes": "teacher passes",
    "world_size": "ranks",
    "finished": "finished",
}


@dataclass(frozen=True)
class Grid:
    """A table of the page. The first ``text_columns`` are text; a line break in a cell parts what stands smaller."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    text_columns: int = 1


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"


def sentence(entry: Entry) -> str | None:
    """What the run is, in one sentence; None where its options are not known."""
    options = entry.config.get("options")
    if not options:
        return None
    models, curriculum = options["models"], options["curriculum"]
    teacher = f" from the teacher {models['teacher']}" if models.get("teacher") else ""
    size = len(entry.stages[-1].pool) if entry.stages else options["data"].get("num_train")
    over = f", over {count(size)} examples" if size else ""
    stages = len(entry.stages) or curriculum["num_stages"]
    return (
        f"{models['model']} trained as {options['loss']['type']}{teacher}{over} in {stages} "
        f"stage{'s' if stages > 1 else ''} ({curriculum['curriculum']}), seed {options['optimiser']['seed']}."
    )


def figures(entry: Entry) -> list[tuple[str, str, str | None]]:
    """The few numbers that a reader asks for first: (name, value, what stands below it)."""
    rows: list[tuple[str, str, str | None]] = []
    if entry.best:
        where = f"step {count(entry.best['step'])}, stage {entry.best['stage'] + 1}"
        rows.append(("best dev ROUGE-L", f"{entry.best['dev_rouge_l']:.2f}", where))
    if entry.last_step is not None:
        rows.append(("optimiser steps", count(entry.last_step), progress(entry)))
    if entry.ledger:
        tokens = entry.ledger.get("tokens")
        rows.append(
            ("examples seen", count(entry.ledger["samples"]), f"{numerize(tokens)} tokens" if tokens else None)
        )
    memory = [record["peak_memory_gb"] for record in entry.steps if "peak_memory_gb" in record]
    if memory:
        speeds = [record["tokens_per_second"] for record in entry.steps if record.get("tokens_per_second")]
        said = f"{numerize(round(statistics.median(speeds)))} tokens a second, median" if speeds else None
        rows.append(("peak memory of a rank", f"{max(memory):.1f} GB", said))
    return rows


def progress(entry: Entry) -> str:
    """How far the run is."""
    planned, steps = entry.planned_steps, entry.last_step
    if entry.ledger.get("finished"):
        return "finished, stages ended early" if planned and steps and steps < planned else "finished"
    return f"not finished, {count(planned)} planned" if planned else "not finished"


def stage_grid(entry: Entry) -> Grid:
    """The plan of the curriculum, and how far each stage came."""
    ends, rows = {record["stage"]: record["step"] for record in entry.steps}, []
    for stage in entry.stages:
        dev = [record["dev_rouge_l"] for record in entry.dev if record["stage"] == stage.index]
        planned = count(stage.steps(entry.batch_size)) if entry.batch_size else "–"
        place = f"{count(stage.pool.start + 1)} to {count(stage.pool.stop)}"
        trained = ends[stage.index] - ends.get(stage.index - 1, 0) if stage.index in ends else 0
        scores = [f"{dev[-1]:.2f}", f"{max(dev):.2f}"] if dev else ["–", "–"]
        ramps = [f"{stage.temperature:.2f}", f"{stage.kd_ratio:.2f}"]
        rows.append([stage.index + 1, place, stage.epochs, *ramps, planned, count(trained), *scores])
    examples = "examples, easy to hard" if entry.rankings else "examples"
    head = ["stage", examples, "epochs", "T", "KD ratio", "steps planned", "steps trained"]
    return Grid("stages", [*head, "dev ROUGE-L at its end", "highest"], rows)


def dev_grid(entry: Entry) -> Grid:
    """Every dev evaluation, to read the numbers behind the curve."""
    columns = {"dev_rouge_l": "ROUGE-L", "dev_exact_match": "exact match", "dev_cross_entropy": "cross-entropy"}
    rows = [
        [count(r["step"]), r["stage"] + 1, r["epoch"] + 1, *(f"{r[c]:.2f}" if c in r else "–" for c in columns)]
        for r in entry.dev
    ]
    return Grid("dev evaluations", ["step", "stage", "epoch", *columns.values()], rows)


def quarter_grid(entry: Entry) -> Grid:
    """How each quarter of the first ranking ended."""
    rows = [
        [QUARTERS[b["bucket"]], f"{b['rouge_l'][-1]:.1f}", f"{b['rouge_l_forgotten']:.1f}"]
        + [f"{b['cross_entropy'][-1]:.2f}", f"{b['cross_entropy_risen']:+.2f}"]
        for b in buckets(entry.metrics)
    ]
    head = ["quarter", "ROUGE-L at the end", "below its best", "cross-entropy at the end", "above its lowest"]
    return Grid("quarters", head, rows)


def ranking_grid(entry: Entry) -> Grid:
    """What changed each time the student of that moment ranked again."""
    first, rows = entry.rankings[0], []
    for ranking in entry.rankings:
        shared = [i for i in first.places if i in ranking.places]
        found = tau([first.places[i] for i in shared], [ranking.places[i] for i in shared])
        means = []
        for column in first.columns:
            values = [r[column] for r in ranking.records if r.get(column) is not None]
            factor = 100 if column == "rouge_l" else 1
            means.append(f"{factor * statistics.fmean(values):.2f}" if values else "–")
        rows.append([ranking.place, "–" if found is None else f"{found:+.2f}", *means])
    means = [f"mean {column_named(column).label}" for column in first.columns]
    return Grid("rankings", ["ranking", "Kendall’s τ with the first", *means], rows)


def distinct(entries: Sequence[Entry]) -> list[tuple[list[Entry], Ranking]]:
    """The different first rankings, and whose they are: runs of one student often rank alike."""
    found: dict[tuple[Any, ...], tuple[list[Entry], Ranking]] = {}
    for entry in entries:
        if entry.rankings:
            ranking = entry.rankings[0]
            key = tuple((r["id"], r.get("answer")) for r in ranking.records)
            found.setdefault(key, ([], ranking))[0].append(entry)
    return list(found.values())


def ledger(entry: Entry) -> dict[str, str]:
    """A run's ledger, name -> value in words."""
    names = LEDGER | {name: name.replace("_", " ") for name in entry.ledger if name not in LEDGER}
    return {words: _in_words(entry.ledger[name]) for name, words in names.items() if name in entry.ledger}


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return count(value) if isinstance(value, int) else str(value)


def ledger_grid(entries: Sequence[Entry]) -> Grid:
    """The ledgers of several runs beside each other: what a fair comparison needs."""
    kept = {entry.name: ledger(entry) for entry in entries if entry.ledger}
    names = [name for name in LEDGER.values() if any(name in values for values in kept.values())]
    rows = [[name, *(values.get(key, "–") for key in names)] for name, values in kept.items()]
    return Grid("ledgers", ["row", *names], rows)
