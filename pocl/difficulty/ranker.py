"""From a student and its training examples to an easy-to-hard order: ``rank`` once, ``Ranker`` in the course of a run.

The student ranks by default, as in POCL (arXiv 2506.05695, section 3); it may rank again between stages, and so may
the training losses, which need no pass of their own.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import RunStopped, UserError
from pocl.data.dataset import Split
from pocl.data.processing import encode
from pocl.data.records import load_records
from pocl.difficulty.measuring import Request, ScoringSettings
from pocl.difficulty.ranking import COLUMNS, FILES, Ranking, columns_of, ensure_signals, rank_examples, sources_of
from pocl.difficulty.ranking_file import read_ranking, write_ranking
from pocl.models.student import Student
from pocl.models.teacher import Teacher

FIRST = "difficulty"  # the ranking before any training
_NAME = re.compile(r"difficulty(?:-stage(\d+)(?:-epoch(\d+))?)?")
_DEFAULTS = ScoringSettings()


def rank(
    train: Split | Any,
    student: Student | None,
    *,
    signals: Sequence[str] = ("student",),
    teacher: Teacher | None = None,
    losses: np.ndarray | None = None,
    settings: ScoringSettings = _DEFAULTS,
    folder: str | Path | None = None,
) -> Ranking:
    """The training examples from easy to hard, by these signals (``SIGNALS``) fused. Collective.

    ``train`` is a Split, or what ``load_records`` reads: a ``datasets.Dataset``, a file, a list of rows. Such rows are
    encoded for the student (``encode``; the last answer of a conversation counts), and the ranking has the ids of
    their column ``id``, or else their numbers from 0.

    ``student``, ``teacher`` and ``losses`` ([N] nats per response token in training, NaN where an example had none)
    may be None if no signal asks for them. With a ``folder`` an interrupted pass resumes there; nothing is left in
    it at the end.  Raises UserError for an unknown signal or one that lacks what it is measured with, StopRequested
    if a rank was asked to stop (``pocl.common.interrupt``), and RunStopped for a measure that is not finite.
    """
    folder = None if folder is None else Path(folder)
    split, ids = (train, None) if isinstance(train, Split) else _encoded(train, student)
    ranking = _measured(Request(split, student, teacher, losses, settings, folder), signals)
    ranking = ranking if ids is None else _renamed(ranking, ids)
    if folder is not None and distributed.is_main():
        for source in sources_of(signals):
            shutil.rmtree(folder / source, ignore_errors=True)
        with suppress(OSError):  # something else is there, or nothing ever was
            folder.rmdir()
    return ranking


def new_ranking(rerank: str, stage_index: int, epoch: int) -> str | None:
    """The name of the ranking with which an epoch begins; None if it keeps the earlier one.

    ``rerank`` is off, stage or epoch.
    """
    if stage_index == epoch == 0:
        return None
    if rerank == "epoch":
        return f"{FIRST}-stage{stage_index + 1}-epoch{epoch + 1}"
    return f"{FIRST}-stage{stage_index + 1}" if rerank == "stage" and epoch == 0 else None


class Ranker:
    """The rankings of a run: each is made once, and kept as ``name``.jsonl in the run's folder.

    Which are known is read from the folder when the ranker is made; afterwards only ``rank`` and ``forget_after``
    change it. Collective: every rank makes one and calls it alike.
    """

    def __init__(
        self,
        folder: Path,
        train: Split,
        *,
        signals: Sequence[str],
        rerank: str = "off",
        teacher: Teacher | None = None,
        settings: ScoringSettings = _DEFAULTS,
        given: Path | None = None,
    ) -> None:
        """``given`` is a difficulty.jsonl that becomes the first ranking.  Raises UserError if it ranks other
        examples."""
        self.folder, self.train, self.signals, self.rerank = folder, train, signals, rerank
        self.teacher, self.settings = teacher, settings
        names = [path.stem for path in folder.glob(f"{FIRST}*.jsonl") if _NAME.fullmatch(path.stem)]
        self._known = set(distributed.broadcast(names))  # as rank 0 sees them
        self._measured_first = given is None
        if given is not None:
            known = plain_records(train)
            records = [known[record["id"]] | dict(record) for record in read_ranking(given, train).records]
            self._keep(FIRST, Ranking.of(records, train.ids))

    def known(self, name: str | None) -> Ranking | None:
        """The ranking of this name, if it was made."""
        return read_ranking(self._path(name), self.train) if name is not None and name in self._known else None

    def rank(self, name: str, student: Callable[[], Student], losses: np.ndarray | None = None) -> Ranking | None:
        """The ranking of this name, made now unless it is known; None if no signal has a value yet.

        ``student`` is called if a signal asks for it; for ``losses`` see ``rank``, which also says what is raised.
        """
        if name in self._known:
            return self.known(name)
        signals = self.signals
        if losses is None or np.isnan(losses).all():
            signals = [signal for signal in signals if sources_of([signal]) != {"training"}]
        if not signals:
            return None
        asked = student() if "student" in sources_of(signals) else None
        passes = self.folder / "scoring" / name
        ranking = _measured(Request(self.train, asked, self.teacher, losses, self.settings, passes), signals)
        self._keep(name, ranking)
        return ranking

    def forget_after(self, stage_index: int, epoch: int) -> None:
        """Delete the rankings with which later epochs than this one began: another student is trained from here on.

        Epoch -1 of stage 0 is before the first.
        """
        for name in self._known - {FIRST}:
            if _place(name) > (stage_index, epoch):
                self._known.remove(name)
                if distributed.is_main():
                    self._path(name).unlink(missing_ok=True)
        distributed.barrier()

    def teacher_passes(self) -> int:
        """How many examples the trunk of an online teacher has read to rank them."""
        return self._num_measured("teacher") if self.teacher is not None and self.teacher.online else 0

    def student_passes(self) -> int:
        """How many examples the student has read to rank them, and answered where ROUGE-L is a signal."""
        return self._num_measured("student")

    def _num_measured(self, source: str) -> int:
        """Examples, over all rankings that were measured here by this source."""
        measured = self._known if self._measured_first else self._known - {FIRST}
        return len(measured) * len(self.train) if source in sources_of(self.signals) else 0

    def _keep(self, name: str, ranking: Ranking) -> None:
        if distributed.is_main():
            write_ranking(self._path(name), ranking)
            shutil.rmtree(self.folder / "scoring", ignore_errors=True)  # what a resumed pass would read
        distributed.barrier()
        self._known.add(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


def _encoded(rows: Any, student: Student | None) -> tuple[Split, list[Any]]:
    """Rows as a split, whose ids are their numbers, and the ids that they have."""
    if student is None:
        raise UserError("`student` is None, but its tokenizer encodes the rows; give it, or an encoded Split")
    records = load_records(rows)
    split = encode(records, student.tokenizer, turns="last")
    if len(split) < len(records):
        say(f"{len(records) - len(split)} of {len(records)} examples are not ranked: their prompts are too long")
    if hasattr(rows, "column_names") and "id" in rows.column_names:
        return split, list(rows["id"])
    return split, list(range(len(records)))


def _renamed(ranking: Ranking, ids: Sequence[Any]) -> Ranking:
    """The ranking with the ids of the rows that the examples were made from; positions count the rows."""
    numbers = [record["id"] for record in ranking.records]
    records = [dict(record) | {"id": ids[record["id"]]} for record in ranking.records]
    return Ranking(np.array(numbers), ranking.scores, records)


def plain_records(train: Split) -> dict[int, dict[str, Any]]:
    """What is known of each example without a model, by id, sorted by id; of a conversation's its record and turn."""
    columns = {
        "id": train.ids.tolist(),
        "prompt_tokens": train.prompt_lengths.tolist(),
        "response_tokens": train.num_labels.tolist(),
        "category": train.column("category"),
    }
    columns |= {name: train.column(name) for name in ("record_id", "turn") if name in train.table.column_names}
    rows = zip(*columns.values(), strict=True)
    return {row[0]: dict(zip(columns, row, strict=True)) for row in sorted(rows)}


def _measured(request: Request, signals: Sequence[str]) -> Ranking:
    """The ranking by what the signals' files measure; an interrupted pass stays in the request's folder."""
    ensure_signals(signals)
    columns, records = columns_of(signals), plain_records(request.train)
    for file in FILES:
        asked = [column for column in columns if column in file.COLUMNS]
        for example_id, values in (file.measure(request, asked) if asked else {}).items():
            records[example_id] |= values
    _check_finite(list(records.values()), columns)
    warning = measures_nothing(list(records.values()))
    if warning and "rouge_l" in columns:
        say(warning)
    return Ranking.of(rank_examples(list(records.values()), columns), request.train.ids)


# Below this share of different answers, or above that share of equal ROUGE-L, the student's answers rank nothing.
_FEW_ANSWERS, _EQUAL_SCORES, _ENOUGH = 0.1, 0.9, 20


def measures_nothing(records: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say where the student's answers tell no example from another; None where they do, or are too few."""
    answers = [record["answer"] for record in records if "answer" in record]
    if len(answers) < _ENOUGH:
        return None
    distinct = len(set(answers))
    score, count = Counter(round(record["rouge_l"], 6) for record in records if "answer" in record).most_common(1)[0]
    if distinct >= _FEW_ANSWERS * len(answers) and count <= _EQUAL_SCORES * len(answers):
        return None
    return (
        f"the ranking by ROUGE-L means little: {len(answers)} prompts got {distinct} different answers, and {count} "
        f"of them have ROUGE-L {score:.2f}; warm the student up first (`type` sft, one short pass), or give "
        "`difficulty` cross-entropy"
    )


def _check_finite(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Raise RunStopped for a measure that is not finite: it cannot be ordered."""
    for column in columns:
        bad = [record["id"] for record in records if record[column] is not None and not math.isfinite(record[column])]
        if bad:
            raise RunStopped(
                f"{COLUMNS[column].label} is not finite for {len(bad)} of {len(records)} examples, such as "
                f"{bad[:5]}: check the {COLUMNS[column].source}'s weights and `dtype`"
            )


def _place(name: str) -> tuple[int, int]:
    """(stage, epoch) that begins with the ranking of this name, from 0."""
    numbers = [int(number) - 1 for number in re.findall(r"\d+", name)]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0
