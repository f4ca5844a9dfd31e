"""The table that evaluate.py prints."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pocl.common.console import say, show_table
from pocl.evaluation.metrics import METRICS, SHOWN

Scores = Mapping[str, Any]  # of one set, as summary.json has them


def show_evaluation(summary: Mapping[str, Scores], title: str, metrics: Sequence[str] = SHOWN) -> None:
    """Print mean and spread over seeds by set; beside them the clean protocol, and the mean without known prompts."""
    columns: dict[str, Callable[[Scores], object]] = {"seeds": lambda scores: len(scores["rouge_l"]["seeds"])}
    columns |= {METRICS[metric].name: partial(_with_spread, metric=metric) for metric in metrics}
    notes = []
    if any("cross_entropy" in scores for scores in summary.values()):
        columns["cross-entropy"] = _cross_entropy
        notes.append("cross-entropy: nats per token of the reference, of several the first")
    if any("clean" in scores for scores in summary.values()):
        columns["clean"] = _clean
        notes.append("clean: ROUGE-L of greedy answers without the ban of repeated n-grams")
    known = {name: len(scores.get("contaminated", {}).get("ids", ())) for name, scores in summary.items()}
    if any(known.values()):
        columns["unseen"] = _unseen
        counts = ", ".join(f"{name} {count}" for name, count in known.items() if count)
        notes.append(f"unseen: ROUGE-L less the prompts that stand in the training data ({counts})")
    rows = [[name, *(cell(scores) for cell in columns.values())] for name, scores in summary.items()]
    show_table(title, ["set", *columns], rows)
    for note in notes:
        say(note)


def _with_spread(scores: Scores, metric: str) -> str:
    """The mean of a metric, and its standard deviation where there is more than one seed."""
    over = scores[metric]
    return f"{over['mean']:.2f}" + (f" ±{over['std']:.2f}" if len(over["seeds"]) > 1 else "")


def _cross_entropy(scores: Scores) -> str:
    return f"{scores['cross_entropy']:.3f}" if "cross_entropy" in scores else "–"


def _clean(scores: Scores) -> str:
    return _beside(scores.get("clean", {}).get("rouge_l", {}).get("mean"), scores)


def _unseen(scores: Scores) -> str:
    contaminated = scores.get("contaminated", {})
    if not contaminated.get("ids"):
        return _beside(scores["rouge_l"]["mean"], scores)
    return _beside((contaminated["without"] or {}).get("rouge_l"), scores)


def _beside(value: float | None, scores: Scores) -> str:
    """A ROUGE-L and how far it is from the one of the protocol."""
    return "–" if value is None else f"{value:.2f} ({value - scores['rouge_l']['mean']:+.2f})"
