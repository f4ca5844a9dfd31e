"""The student as judge: it answers every prompt greedily and reads every reference.

ROUGE-L of the answers and mean cross-entropy per response token of the references are POCL's two measures of
difficulty.  Source: POCL, arXiv 2506.05695, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl.common.errors import UserError
from pocl.difficulty.measuring import Column, Request, ScoringSettings, Values

if TYPE_CHECKING:
    from pocl.data.dataset import Split
    from pocl.generation.decoding import Generator
    from pocl.models.student import Student

# All but cross_entropy are keys of METRICS in pocl.evaluation.metrics: of the greedy answer against the reference.
COLUMNS = {
    "rouge_l": Column("ROUGE-L", "0 to 1", "student", highest_is_easiest=True),
    "cross_entropy": Column("cross-entropy", "nats/token", "student"),
    "chrf": Column("chrF", "0 to 1", "student", highest_is_easiest=True),
    "token_f1": Column("token F1", "0 to 1", "student", highest_is_easiest=True),
}
SIGNALS = {
    "student": ("rouge_l", "cross_entropy"),  # POCL
    "rouge-l": ("rouge_l",),
    "cross-entropy": ("cross_entropy",),
    "chrf": ("chrf",),
    "token-f1": ("token_f1",),
}


def needs_answers(columns: Sequence[str]) -> bool:
    """Whether the student has to answer for one of these columns."""
    return any(column in COLUMNS and column != "cross_entropy" for column in columns)


def add_metric(signal: str) -> None:
    """Make a metric of answers a signal: a key of METRICS, or MODULE:FUNCTION.  Raises UserError for another name."""
    from pocl.evaluation.metrics import METRICS, metric_named

    column = metric_named(signal)
    COLUMNS.setdefault(column, Column(METRICS[column].name, "0 to 1", "student", highest_is_easiest=True))
    SIGNALS[signal] = (column,)


def measure(request: Request, columns: Sequence[str]) -> Values:
    """The student's ``cross_entropy`` of every example and, if a measure of answers is asked for, that and ``answer``.

    Collective: the ranks share the work, and each gets all of it.
    """
    from pocl.evaluation.words import check_readable
    from pocl.generation.vllm_backend import BackendSettings, open_generator

    student, train, settings = request.student, request.train, request.settings
    if student is None:
        raise UserError(f"`signals` {' '.join(columns)} are the student's; give `student`")
    student = student.asked_by(train.template)
    was_training = student.model.training
    student.model.train(False)
    answers, others = needs_answers(columns), [name for name in columns if name not in ("rouge_l", "cross_entropy")]
    if "rouge_l" in columns:
        check_readable(train.column("response"), settings.rouge_tokenizer, "the training examples")
    # Another backend reads the weights from their folder, which must hold those in memory.
    backend = settings.backend if answers and student.path else "builtin"
    how = BackendSettings(backend, train.max_length, settings.batch_size, student.device)
    with open_generator(student, how) as generator:
        key = settings.key() | {"dtype": str(student.model.dtype), "answers": generator.name if answers else None}
        key |= {"metrics": others} if others else {}
        with request.resumable("student", student=student.fingerprint(), **key) as scoring:
            found = scoring.fill(
                generator.blocks(train.prompt_lengths),
                train.ids,
                lambda block: score_block(
                    student, train, block, settings, generator if answers else None, metrics=("rouge_l", *others)
                ),
                title="scoring",
            )
    student.model.train(was_training)
    return found


def score_block(
    student: Student,
    train: Split,
    block: np.ndarray,
    settings: ScoringSettings,
    generator: Generator | None,
    *,
    metrics: Sequence[str] = ("rouge_l",),
) -> list[dict[str, Any]]:
    """The records of one block of positions in the split; see ``measure``. No ``generator``: no answers."""
    from pocl.data.blocks import blocks_to_read
    from pocl.evaluation.likelihood import example_cross_entropy
    from pocl.evaluation.metrics import METRICS
    from pocl.generation.decoding import decode
    from pocl.generation.sampling import Sampling

    rows = train.table[[int(i) for i in block]]
    losses = np.zeros(len(block))
    for part in blocks_to_read(train.lengths[block], student.device):
        batch = train.batch(block[part]).to(student.device)
        sums = example_cross_entropy(student, batch, chunk_tokens=settings.chunk_tokens)
        losses[part] = [total / count for total, count in sums]
    records: list[dict[str, Any]] = [
        {"id": example_id, "cross_entropy": loss} for example_id, loss in zip(rows["id"], losses.tolist(), strict=True)
    ]
    if generator:
        sampling = Sampling(settings.max_new_tokens, temperature=0.0, no_repeat_ngram=settings.no_repeat_ngram)
        tokens = generator(rows["prompt_ids"], rows["id"], sampling)
        for record, text, reference in zip(records, decode(student.tokenizer, tokens), rows["response"], strict=True):
            scores = {name: METRICS[name].score(text, [reference], settings.rouge_tokenizer) for name in metrics}
            record |= scores | {"answer": text}
    return records
