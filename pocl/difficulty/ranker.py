"""How hard each training example is: the signals that are measured, and the order that they give when fused.

``ranking`` names the signals and fuses their ranks; here each is measured. The student ranks by default, as in
POCL (arXiv 2506.05695, section 3); it may rank again between stages, and so may the training losses, which need no
pass of their own.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common import distributed
from pocl.common.errors import RunStopped, UserError
from pocl.common.files import read_jsonl, write_json, write_jsonl
from pocl.common.resumable_pass import ResumablePass
from pocl.curriculum.stages import Curriculum, Stage
from pocl.data.dataset import Split
from pocl.data.micro_batches import blocks_to_read
from pocl.difficulty.diagnostics import diagnose, summary
from pocl.difficulty.ranking import COLUMNS, Source, columns_of, rank_examples, sources_of
from pocl.difficulty.student import ScoringSettings, score_examples
from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective
from pocl.models.identity import weights_fingerprint
from pocl.models.states import response_labels
from pocl.models.teacher import TeacherSource
from pocl.training.position import Position
from pocl.training.run_folder import RunFolder

FIRST = "difficulty"  # the ranking before any training


@dataclass(frozen=True)
class Ranker:
    """Orders the training examples from easy to hard, before the run and, if requested, again between its stages.

    Each ranking is a file in the run folder; an existing one is read instead of made again.
    """

    signals: Sequence[str]
    rerank: str  # off, stage or epoch
    run: RunFolder
    train: Split
    tokenizer: PreTrainedTokenizerBase
    teacher: TeacherSource | None
    limits: ScoringSettings
    key: Mapping[str, Any]  # what every measure depends on: the data, the precision
    adopted: bool = False  # whether the first ranking is another run's

    def _asks(self, source: Source) -> bool:
        return source in sources_of(self.signals)

    def teacher_passes(self) -> int:
        """How many examples the trunk of an online teacher has read to rank them."""
        if self.teacher is None or not self.teacher.online or not self._asks("teacher"):
            return 0
        rankings = len(list(self.run.path.glob("difficulty-*.jsonl")))
        rankings += self.run.ranking(FIRST).is_file() and not self.adopted
        return rankings * len(self.train)

    def easy_to_hard(self, student: PreTrainedModel) -> np.ndarray | None:
        """The order before any training: positions from the easiest to the hardest.  -> [N], int64.

        None if nothing is known yet, as with training losses.
        """
        return self.rank(FIRST, lambda: student)

    def new_ranking(self, stage: Stage, epoch: int) -> str | None:
        """The name of the ranking that this epoch begins with; None if it keeps the earlier one."""
        if stage.index == epoch == 0:
            return None
        if self.rerank == "epoch":
            return f"difficulty-stage{stage.index + 1}-epoch{epoch + 1}"
        return f"difficulty-stage{stage.index + 1}" if self.rerank == "stage" and epoch == 0 else None

    def made(self, name: str | None) -> bool:
        """Whether the ranking of this name exists already."""
        return distributed.broadcast(name is not None and self.run.ranking(name).is_file())

    def forget_after(self, position: Position, stages: Curriculum) -> None:
        """Delete the rankings that were made after this position: the student trained from there on is another one."""
        begun = (position.stage, position.epoch if position.step_in_epoch else position.epoch - 1)
        later = [(s, e) for s in stages for e in range(s.epochs) if (s.index, e) > begun]
        for name in [self.new_ranking(stage, epoch) for stage, epoch in later] if distributed.is_main() else []:
            if name:
                self.run.ranking(name).unlink(missing_ok=True)
        distributed.barrier()

    def rank(
        self, name: str, student: Callable[[], PreTrainedModel], losses: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Positions from the easiest to the hardest.  -> [N], int64; None if no signal has a value yet.

        ``losses`` [N] are those of the student's training, NaN where an example had none.
        """
        path = self.run.ranking(name)
        if not self.made(name):
            columns = columns_of(self.signals)
            if losses is None or np.isnan(losses).all():
                columns = [column for column in columns if COLUMNS[column].source != "training"]
            if not columns:
                return None
            records = self._measure(columns, name, student, losses)
            _check_finite(records, columns)
            if distributed.is_main():
                write_jsonl(path, rank_examples(records, columns))
                shutil.rmtree(self.run.path / "scoring", ignore_errors=True)  # what a resumed pass would read
            distributed.barrier()
        return read_order(path, self.train)

    def _measure(
        self, columns: Sequence[str], name: str, student: Callable[[], PreTrainedModel], losses: np.ndarray | None
    ) -> list[dict[str, Any]]:
        """One record per example, sorted by id, with what the columns need."""
        parts_dir, records = self.run.path / "scoring" / name, plain_records(self.train)
        measures: list[Mapping[int, Mapping[str, Any]]] = []
        sources = {COLUMNS[column].source for column in columns}
        if "student" in sources:
            model = student()
            # The weights on disk are those of the first ranking only.
            limits = self.limits if name == FIRST else replace(self.limits, backend="builtin")
            passed = score_examples(
                model,
                self.tokenizer,
                self.train,
                limits=limits,
                answers="rouge_l" in columns,
                parts_dir=parts_dir / "student",
                key=dict(self.key) | {"student": weights_fingerprint(model)},
            )
            measures.append(passed)
        if "teacher" in sources and self.teacher:
            measures.append(self._teacher_losses(self.teacher, parts_dir / "teacher"))
        if "training" in sources and losses is not None:
            known = [None if np.isnan(loss) else float(loss) for loss in losses]
            measures.append(self._column("snapshot_cross_entropy", known))
        for measure in measures:
            for example_id, values in measure.items():
                records[example_id] |= values
        return list(records.values())

    def _column(self, name: str, values: Sequence[Any]) -> dict[int, dict[str, Any]]:
        """Values in the order of the split, by example id."""
        return {int(i): {name: value} for i, value in zip(self.train.ids, values, strict=True)}

    @torch.no_grad()
    def _teacher_losses(self, teacher: TeacherSource, parts_dir: Path) -> dict[int, dict[str, Any]]:
        """Mean cross-entropy of each reference under the teacher; its trunk runs only if it is not cached."""

        def read(block: np.ndarray) -> list[dict[str, Any]]:
            batch = self.train.batch(block).to(teacher.device)
            labels = response_labels(batch)
            result = distillation_objective(
                HiddenStates(teacher.states(batch), teacher.head),
                None,
                labels,
                StageObjective(),
                num_chunks=chunks_needed(len(labels), self.limits.chunk_tokens),
            )
            losses = batch.sum_by_example(result.cross_entropy).cpu() / batch.num_labels
            return [
                {"id": int(i), "teacher_cross_entropy": loss}
                for i, loss in zip(self.train.ids[block], losses.tolist(), strict=True)
            ]

        with ResumablePass(parts_dir, dict(self.key) | {"teacher": teacher.fingerprint}) as parts:
            blocks = blocks_to_read(self.train.lengths, teacher.device)
            return parts.fill(blocks, self.train.ids, read, title="the teacher's confidence")


def _check_finite(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Raise RunStopped for a measure that is not finite: it cannot be ordered."""
    for column in columns:
        bad = [record["id"] for record in records if record[column] is not None and not math.isfinite(record[column])]
        if bad:
            raise RunStopped(
                f"{COLUMNS[column].label} is not finite for {len(bad)} of {len(records)} examples, such as "
                f"{bad[:5]}: check the {COLUMNS[column].source}'s weights and `dtype`"
            )


def write_diagnostics(run: RunFolder) -> list[str]:
    """Write diagnostics.json of a run that has ranked -> its summary, line by line."""
    path = run.first_ranking()
    if path is None:
        return []
    found = diagnose(read_jsonl(path), run.read_metrics())
    write_json(run.path / "diagnostics.json", found)
    return summary(found)


def plain_records(train: Split) -> dict[int, dict[str, Any]]:
    """What is known of each example without a model, by id, sorted by id."""
    rows = zip(
        train.ids.tolist(),
        train.prompt_lengths.tolist(),
        train.num_labels.tolist(),
        train.column("category"),
        strict=True,
    )
    names = ("id", "prompt_tokens", "response_tokens", "category")
    return {row[0]: dict(zip(names, row, strict=True)) for row in sorted(rows)}


def adopt_ranking(path: Path, run: RunFolder, train: Split) -> None:
    """Make another run's difficulty.jsonl this run's first ranking; a record needs only its ``id``.

    Raises UserError if it ranks other examples.
    """
    read_order(path, train)
    if distributed.is_main():
        known = plain_records(train)
        write_jsonl(run.ranking(FIRST), [known[record["id"]] | record for record in read_jsonl(path)])
    distributed.barrier()


def read_order(path: Path, split: Split) -> np.ndarray:
    """Positions in ``split`` from the easiest to the hardest, as a difficulty.jsonl says.  -> [N], int64.

    Raises UserError if the file ranks other examples than those of the split.
    """
    records = read_jsonl(path)
    position_of = {int(example_id): position for position, example_id in enumerate(split.ids)}
    ids = [record.get("id") for record in records]
    if len(ids) != len(position_of) or set(ids) != set(position_of):
        raise UserError(
            f"{path} ranks {len(ids)} examples, but the training split holds {len(position_of)} (or others); "
            f"score again without `difficulty_file`"
        )
    return np.array([position_of[example_id] for example_id in ids], dtype=np.int64)
