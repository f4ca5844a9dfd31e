"""The parts of a report that belong to one run: what it came to, its curves, its stages, its ledger."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.reporting.charts import Curve, Panel, Points, finite, line_chart
from tools.reporting.curves import running_mean, stage_slices
from tools.reporting.data import Entry
from tools.reporting.html import Html, Node, count, definitions, join, note, number, table, tag

Record = Mapping[str, Any]


@dataclass(frozen=True)
class StepPanel:
    """A panel over optimiser steps. ``columns`` of metrics.jsonl -> what each is called."""

    title: str
    unit: str
    columns: Mapping[str, str]
    shape: str  # mean: every step faintly and the running mean of a stage; steps and line: as they are
    dev: Mapping[str, str] | None = None  # columns of the dev evaluations that belong in it
    always: bool = False  # also where all values are 0
    needs: str | None = None  # a column without which the panel says nothing


PANELS = (
    StepPanel("ROUGE-L on dev", "0 to 100", {}, "line", {"dev_rouge_l": "dev"}),
    StepPanel(
        "Cross-entropy", "nats a token", {"cross_entropy": "training"}, "mean", {"dev_cross_entropy": "dev"}, True
    ),
    StepPanel("Divergence", "nats a token, before T^k", {"divergence": "divergence"}, "mean"),
    StepPanel("Loss", "the objective, nats a token", {"loss": "loss"}, "mean", always=True),
    StepPanel("Pool", "examples", {"pool": "pool"}, "steps", always=True),
    StepPanel(
        "Temperature and KD ratio",
        "",
        {"temperature": "temperature T", "kd_ratio": "KD ratio r"},
        "steps",
        needs="kd_ratio",
    ),
    StepPanel("Learning rate", "", {"lr": "learning rate"}, "line", always=True),
    StepPanel("Gradient norm", "before clipping", {"gradient_norm": "gradient norm"}, "mean"),
    StepPanel("Speed", "training tokens a second", {"tokens_per_second": "speed"}, "mean"),
    StepPanel("Student's own text", "share of the micro-batches", {"student_text": "share"}, "mean"),
)


def figures(entry: Entry, test: tuple[str, float] | None) -> Html:
    """The few numbers that a reader asks for first; ``test`` is (the set's name, mean ROUGE-L)."""
    rows: list[tuple[str, Node, Node]] = []
    if test:
        rows.append((f"test ROUGE-L, {test[0]}", f"{test[1]:.2f}", None))
    if entry.best:
        where = f"step {count(entry.best['step'])}, stage {entry.best['stage'] + 1}"
        rows.append(("best dev ROUGE-L", f"{entry.best['dev_rouge_l']:.2f}", where))
    steps = last_step(entry)
    if steps is not None:
        rows.append(("optimiser steps", count(steps), progress(entry)))
    if entry.ledger:
        tokens = entry.ledger.get("tokens")
        rows.append(("examples seen", count(entry.ledger["samples"]), f"{short(tokens)} tokens" if tokens else None))
    memory = [record["peak_memory_gb"] for record in entry.steps if "peak_memory_gb" in record]
    if memory:
        speeds = [record["tokens_per_second"] for record in entry.steps if record.get("tokens_per_second")]
        said = f"{short(statistics.median(speeds))} tokens a second, median" if speeds else None
        rows.append(("peak memory of a rank", f"{max(memory):.1f} GB", said))
    boxes = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", more) if more else None))
        for name, value, more in rows
    ]
    return tag("dl", *boxes, class_="figures") if boxes else Html("")


def last_step(entry: Entry) -> int | None:
    """The last optimiser step that is recorded; None where nothing was trained."""
    if entry.steps:
        return entry.steps[-1]["step"]
    return entry.ledger.get("optimizer_steps")


def progress(entry: Entry) -> str:
    """How far the run is."""
    planned, steps = entry.planned_steps, last_step(entry)
    if entry.ledger.get("finished"):
        early = planned is not None and steps is not None and steps < planned
        return "finished, stages ended early" if early else "finished"
    return f"not finished, {count(planned)} planned" if planned else "not finished"


def short(value: float) -> str:
    """A large number with its unit prefix."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{number(value / (1e3 if letter == ' k' else size), 3)}{letter}"
    return count(value)


def sentence(entry: Entry) -> str | None:
    """What the run is, in one sentence."""
    options = entry.config.get("options")
    if not options:
        return None
    models, loss, curriculum = options["models"], options["loss"], options["curriculum"]
    first = f"{models['model']} trained as {loss['type']}"
    if models.get("teacher"):
        first += f" from the teacher {models['teacher']}"
    size = len(entry.stages[-1].pool) if entry.stages else options["data"].get("num_train")
    over = f", over {count(size)} examples" if size else ""
    stages = len(entry.stages) or curriculum["num_stages"]
    plural = "s" if stages > 1 else ""
    return (
        f"{first}{over} in {stages} stage{plural} ({curriculum['curriculum']}), seed {options['optimiser']['seed']}."
    )


def curves(entry: Entry) -> Html:
    """The panels over optimiser steps."""
    if not entry.steps and not entry.dev:
        return note("metrics.jsonl holds no optimiser step yet, so there is nothing to draw.")
    charts = [chart for panel in PANELS if (chart := step_chart(entry, panel)) is not None]
    words = "The numbered bands are the stages." if len(entry.stages) > 1 else ""
    if any(panel.shape == "mean" for panel in PANELS) and len(entry.steps) > 1:
        words += " Faint: every step; clear: its running mean within a stage."
    skipped = sum(bool(record.get("skipped")) for record in entry.steps)
    if skipped:
        words += f" {skipped} step(s) were skipped for gradients that were not finite."
    pointer = tag("span", " Point at a panel, or tap it, to read all of them at that step.", class_="with-js")
    return join(note(words, pointer), tag("div", *charts, class_="charts", data_linked=True))


def step_chart(entry: Entry, panel: StepPanel) -> Html | None:
    """One panel; None where the run has no such values, or only noughts that say nothing."""
    if panel.needs and not any(record.get(panel.needs) for record in entry.steps):
        return None
    made = []
    for i, (column, name) in enumerate(panel.columns.items()):
        values = [record.get(column) for record in entry.steps]
        if any(values) or (panel.always and any(value is not None for value in values)):
            made.append(_step_curve(entry.steps, column, name, shape=panel.shape, look=f"s{i + 1}"))
    for column, name in (panel.dev or {}).items():
        points = [(r["step"], r[column]) for r in entry.dev if r.get(column) is not None]
        if finite(points):
            made.append(Curve(name, [points], look="s2" if made else "s3", shape="dots"))
    if not made:
        return None
    frame = Panel(panel.title, panel.unit, bands=entry.bands)
    marked = None
    if "dev_rouge_l" in (panel.dev or {}) and entry.best:
        marked = (entry.best["step"], entry.best["dev_rouge_l"], f"best {entry.best['dev_rouge_l']:.1f}")
    return line_chart(frame, made, marked=marked)


def _step_curve(steps: Sequence[Record], column: str, name: str, *, shape: str, look: str) -> Curve:
    known = [record for record in steps if record.get(column) is not None]
    points = [(record["step"], float(record[column])) for record in known]
    pieces = [points[start:stop] for start, stop in stage_slices(known).values()]
    if shape == "steps":
        return Curve(name, [points], look, "steps")
    if shape == "line":
        return Curve(name, pieces, look)
    means = [_means(finite(piece)) for piece in pieces]  # a new pool and T: a mean must not run across
    return Curve(name, means, look, raw=points)


def _means(points: Points) -> Points:
    return list(zip([x for x, _ in points], running_mean([y for _, y in points]), strict=True))


def stage_table(entry: Entry) -> Html:
    """The plan of the curriculum, and how far each stage came."""
    if not entry.stages:
        return note("stages.json is not there.")
    slices, rows = stage_slices(entry.steps), []
    size = entry.option("optimiser", "global_batch_size") or entry.ledger.get("global_batch_size")
    for stage in entry.stages:
        ends = [record for record in entry.dev if record["stage"] == stage.index]
        start, stop = slices.get(stage.index, (0, 0))
        trained = entry.steps[stop - 1]["step"] - (entry.steps[start - 1]["step"] if start else 0) if stop else 0
        rows.append(
            [str(stage.index + 1), f"{count(stage.pool.start + 1)} to {count(stage.pool.stop)}", stage.epochs]
            + [f"{stage.temperature:.2f}", f"{stage.kd_ratio:.2f}", count(stage.steps(size)) if size else "–"]
            + [count(trained), f"{ends[-1]['dev_rouge_l']:.2f}" if ends else "–"]
            + [f"{max(r['dev_rouge_l'] for r in ends):.2f}" if ends else "–"]
        )
    examples = "examples, easy to hard" if entry.rankings else "examples"
    columns = ["stage", examples, "epochs", "T", "KD ratio", "steps planned", "steps trained"]
    return table([*columns, "dev ROUGE-L at its end", "highest"], rows, caption="stages")


def dev_table(entry: Entry) -> Html | None:
    """Every dev evaluation, to read the numbers behind the curve."""
    if not entry.dev:
        return None
    rows = [
        [count(r["step"]), r["stage"] + 1, r["epoch"] + 1, f"{r['dev_rouge_l']:.2f}"]
        + [f"{r['dev_exact_match']:.1f}" if "dev_exact_match" in r else "–"]
        + [f"{r['dev_cross_entropy']:.3f}" if "dev_cross_entropy" in r else "–"]
        for r in entry.dev
    ]
    columns = ["step", "stage", "epoch", "ROUGE-L", "exact match", "cross-entropy"]
    made = table(columns, rows, caption="dev evaluations")
    return tag("details", tag("summary", f"All {len(rows)} dev evaluations in numbers"), made)


# ledger.json -> (its name in words, how it is written)
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


def ledger_value(value: Any) -> str:
    """A value of a ledger in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return count(value) if isinstance(value, int) else str(value)


def ledger_list(entry: Entry) -> Html:
    """The ledger of one run."""
    if not entry.ledger:
        return note("ledger.json is not there: it is written with the first checkpoint.")
    names = LEDGER | {name: name.replace("_", " ") for name in entry.ledger if name not in LEDGER}
    return definitions({names[key]: ledger_value(entry.ledger[key]) for key in names if key in entry.ledger})


def ledger_table(entries: Sequence[Entry]) -> Html:
    """The ledgers of several runs beside each other: what a fair comparison needs."""
    kept = [entry for entry in entries if entry.ledger]
    if not kept:
        return note("None of these folders has a ledger.json.")
    names = [name for name in LEDGER if any(name in entry.ledger for entry in kept)]
    rows = [
        [entry.name, *(ledger_value(entry.ledger[name]) if name in entry.ledger else "–" for name in names)]
        for entry in kept
    ]
    return table(["row", *(LEDGER[name] for name in names)], rows, caption="ledgers")
