"""The training loop: stages, epochs, optimiser steps, dev evaluation."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from pocl.common import distributed
from pocl.common.console import Progressing, say
from pocl.common.errors import Interrupted, RunStopped
from pocl.common.files import write_json
from pocl.common.interrupt import StopRequested
from pocl.curriculum.schedule import Schedule, Update
from pocl.curriculum.stages import Stage
from pocl.data.dataset import Split
from pocl.difficulty.forgetting import BucketProbe
from pocl.difficulty.pass_rate import paced_weights
from pocl.difficulty.ranker import Ranker, new_ranking
from pocl.difficulty.ranking import Ranking
from pocl.evaluation.metrics import METRICS
from pocl.evaluation.sets import DevSet
from pocl.losses import DistillationLoss
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from pocl.training.batches import BatchCutter
from pocl.training.checkpoints import Checkpoints
from pocl.training.dev import dev_loss, evaluate_dev
from pocl.training.log import MetricsLog
from pocl.training.on_policy import StudentTexts
from pocl.training.position import DevScores, Position, after_epoch, is_due
from pocl.training.run_folder import RunFolder
from pocl.training.settings import TrainSettings
from pocl.training.state import RunState
from pocl.training.step import NotFinite, Stepper, StepResult
from pocl.training.student import Factors, StudentInTraining


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, what chooses the best student (None: the newest is kept), and what ranks again."""

    train: Split
    dev: DevSet | None = None
    ranker: Ranker | None = None


def follow(schedule: Schedule, ranking: Ranking, before: Stage | None = None) -> Schedule:
    """The schedule under a new ranking, made before a stage is trained (None: before the first), and the weights that
    it gives where the schedule weighs by them."""
    schedule = schedule.rank(ranking.order, before)
    if not schedule.weighs:
        return schedule
    trained = schedule.order[: max(stage.pool.stop for stage in schedule.stages)]
    return replace(schedule, weights=paced_weights(ranking.by_position("pass_rate"), trained))


class Trainer:
    """One run: ``fit`` trains every stage of a schedule, ``step`` is one optimiser step."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        schedule: Schedule,
        loss: DistillationLoss,
        *,
        data: TrainingData,
        run: RunFolder,
        settings: TrainSettings,
    ) -> None:
        self.schedule, self.run, self.settings = schedule, run, settings
        self.train, self.dev, self.ranker = data.train, data.dev, data.ranker
        student = student.asked_by(data.train.template)
        self.student = StudentInTraining(student, teacher, loss, settings)
        self.state = RunState(len(data.train))
        self.student_texts = self._student_texts()
        batches = BatchCutter(data.train, teacher, settings.limits, student.device)
        self.stepper = Stepper(self.student, loss, batches, self.student_texts, self.state, settings.max_skipped_steps)
        self.checkpoints = Checkpoints(run, self.student.engine, student)
        self.log = MetricsLog(run, len(schedule.stages), distils=teacher is not None, report_to=settings.report_to)
        self.probe = self._probe()

    @property
    def selected(self) -> str:
        """What the metric is called that chooses the best student."""
        return METRICS[self.dev.select_by if self.dev else "rouge_l"].name

    def fit(self) -> Position:
        """Train every stage, from the start or from the last checkpoint -> the final position.

        Raises Interrupted if a signal asked to stop: the step was finished and everything saved.
        """
        self.resume()
        position = self.state.position
        on_policy = self.settings.on_policy
        if position.step == 0 and self.dev and on_policy and on_policy.mode == "adaptive":  # it follows the dev loss
            loss = dev_loss(self.student.gathered(), self.dev, self.student.chunk_tokens)
            self.state.on_policy = self.state.on_policy.after_dev_loss(loss)
        self.log.open(position.step)
        with (
            closing(self.log),
            self.stepper.interrupt,
            self._saving_what_is_done(),
            Progressing("training", self.schedule.total_steps, position.step) as progress,
        ):
            for stage in self.schedule.stages[position.stage :]:
                self.train_stage(stage, progress)
        return self.state.position

    def train_stage(self, stage: Stage, progress: Progressing) -> None:
        """The epochs of one stage that are left, until its last or until it has converged."""
        for epoch in range(self.state.position.epoch, stage.epochs):
            self.rank(stage, epoch)
            self.train_epoch(stage, epoch, progress)
            self.end_epoch(stage)
            if self.state.position.stage > stage.index:
                done = self.schedule.starts[stage.index] + (epoch + 1) * self.schedule.steps_per_epoch(stage)
                progress.advance(max(0, self.schedule.starts[stage.index + 1] - done))
                return

    def train_epoch(self, stage: Stage, epoch: int, progress: Progressing) -> None:
        """One pass over the stage's pool in global batches."""
        self.student.model.train()
        updates = list(self.schedule.epoch(stage, epoch, done=self.state.position.step_in_epoch))
        for update, following in zip_longest(updates, updates[1:]):
            if update.restarts and self.schedule.rate.restarts:
                self.student.engine.fresh_optimizer()
            result = self.step(update, following)
            if self.state.position.step % self.settings.log_every == 0 or following is None:
                self.log.record_step(update, self.state.position.step, result.record)
            progress.advance(1, self.log.note(stage, result.record))
            if result.asked_to_stop:
                raise StopRequested(result.asked_to_stop)

    def step(self, update: Update, following: Update | None = None) -> StepResult:
        """One optimiser step, the ``following`` one prepared meanwhile.

        Raises RunStopped, which says what was kept, for a loss or gradient that is not finite.
        """
        try:
            return self.stepper.step(update, following, self._factors())
        except NotFinite as error:
            raise RunStopped(f"{error}; {self.checkpoints.kept()}") from error

    def _factors(self) -> Factors | None:
        ratio, loss = self.schedule.ratio_factors, self.schedule.weights
        return None if ratio is None and loss is None else Factors(ratio, loss)

    def end_epoch(self, stage: Stage) -> None:
        """Evaluate on dev and write checkpoints, if this epoch is due; move on to the next epoch or stage."""
        position, settings = self.state.position, self.settings
        self.state.losses.share()
        due = is_due(stage, position.epoch, settings.eval_every)
        if due and self.dev:
            self.save()  # answering takes long and may fail: the epoch is not to be lost
        dev = self.evaluate_dev(stage, position.epoch) if due else None
        last_stage = stage.index == len(self.schedule.stages) - 1
        end = after_epoch(position, stage, dev, patience=settings.patience, last_stage=last_stage)
        if end.converged:
            say(f"stage {stage.index + 1} ends: dev {self.selected} has not risen for {settings.patience} evaluations")
        self.state.position = end.position
        if end.stage_over and settings.keep_stages:
            self.checkpoints.save_stage(self.student.model, stage.index)
        if end.stage_over and self.probe:
            self.log.record(stage, position.epoch, position.step, self.probe.measure(self.student.gathered()))
        if not due:
            return
        if end.is_best:
            self.state.position = end.position.with_best(dev)
            self.checkpoints.save_best(self.student.model)
        self.save()

    def evaluate_dev(self, stage: Stage, epoch: int) -> DevScores | None:
        """How the student does on the dev prompts; None without a dev set."""
        if self.dev is None:
            return None
        where, step = f"stage {stage.index + 1}, epoch {epoch + 1}", self.state.position.step
        scores = evaluate_dev(self.student.gathered(), self.dev, self.student.chunk_tokens, where=where)
        # After all answers, which a signal may interrupt.
        self.state.on_policy = self.state.on_policy.after_dev_loss(scores["dev_cross_entropy"])
        say(
            f"stage {stage.index + 1} epoch {epoch + 1}  step {step}  "
            f"dev ROUGE-L {scores['dev_rouge_l']:.2f}  exact match {scores['dev_exact_match']:.1f}"
            + ("" if self.selected == "ROUGE-L" else f"  {self.selected} {scores[f'dev_{self.dev.select_by}']:.2f}")
        )
        self.log.record_dev(stage, epoch, step, scores)
        return DevScores(scores[f"dev_{self.dev.select_by}"], scores["dev_cross_entropy"])

    def rank(self, stage: Stage, epoch: int) -> None:
        """Apply a new ranking of the examples if this epoch begins with one."""
        name = new_ranking(self.ranker.rerank, stage.index, epoch) if self.ranker else None
        if self.ranker is None or name is None:
            return
        ranking = self.ranker.known(name)
        if ranking is None and self.state.position.step_in_epoch == 0:  # else the epoch began without one
            ranking = self.ranker.rank(name, self.student.gathered, self.state.losses.values)
        self._follow(ranking, stage)

    def _follow(self, ranking: Ranking | None, stage: Stage) -> None:
        if ranking is not None:
            self.schedule = follow(self.schedule, ranking, stage)
            self.probe = self.probe or self._probe()

    def _probe(self) -> BucketProbe | None:
        """The probe of the quarters of the first ranking; None before there is one, and where none is wanted."""
        if self.schedule.ranked is None or self.ranker is None or not self.settings.bucket_examples:
            return None
        return BucketProbe(
            self.train,
            self.schedule.ranked,
            examples_per_bucket=self.settings.bucket_examples,
            settings=self.ranker.settings,
        )

    def _student_texts(self) -> StudentTexts | None:
        """What chooses the student's own responses; None if it is trained on the data's alone."""
        plan, most = self.settings.on_policy, self.settings.max_new_tokens
        if plan is None:
            return None
        total_steps = self.schedule.total_steps
        return StudentTexts(plan, self.train, self.student.gathered, max_new_tokens=most, total_steps=total_steps)

    def resume(self) -> None:
        """Load the last checkpoint, if there is one, and the rankings in force at that point."""
        position, kept = self.checkpoints.resume()
        if kept is None:
            if self.ranker:
                self.ranker.forget_after(0, -1)
            return
        self.state.restore(position, kept)
        self._write_ledger()  # the run may have ended between checkpoint and ledger
        say(f"resuming from step {position.step} of {self.schedule.total_steps}")
        for stage in self.schedule.stages[: position.stage + 1]:
            for epoch in range(stage.epochs if stage.index < position.stage else position.epoch):
                if self.ranker:
                    self._follow(self.ranker.known(new_ranking(self.ranker.rerank, stage.index, epoch)), stage)
        if kept["other_ranks"] and self.ranker:
            self.ranker.forget_after(position.stage, position.epoch if position.step_in_epoch else position.epoch - 1)

    @contextmanager
    def _saving_what_is_done(self) -> Iterator[None]:
        """If a signal asks to stop, write a checkpoint of the last step.  Raises Interrupted then."""
        try:
            yield
        except StopRequested as asked:
            if self.state.position != self.state.saved:
                self.save()
            raise Interrupted(
                f"asked to stop: saved at step {self.state.position.step} of {self.schedule.total_steps} in "
                f"{self.run.checkpoints}; the same command resumes",
                asked.signum,
            ) from None

    def save(self) -> None:
        """Write what resuming needs, and the ledger of what the run has seen."""
        self.checkpoints.save_last(self.state.position, self.state.to_keep())
        self.state.saved = self.state.position
        self._write_ledger()

    def _write_ledger(self) -> None:
        if distributed.is_main():
            write_json(self.run.path / "ledger.json", self.ledger())

    def ledger(self) -> dict[str, Any]:
        """What the run has seen: the terms of a fair comparison."""
        position, teacher = self.state.position, self.student.teacher
        to_cache = len(self.train) if teacher and not teacher.online else 0  # it read every example once
        to_rank = self.ranker.teacher_passes() if self.ranker else 0
        return {
            "samples": position.samples,
            "tokens": position.tokens,
            "response_tokens": position.response_tokens,
            "student_texts": position.student_texts,
            "optimizer_steps": position.step,
            "skipped_steps": position.skipped_steps,
            "global_batch_size": self.schedule.global_batch_size,
            "lr": self.schedule.rate.peak,
            "ranking_passes": self.ranker.student_passes() if self.ranker else 0,
            "teacher_forward_passes": position.teacher_forward_passes + to_cache + to_rank,
            "world_size": distributed.world_size(),
            "finished": position.done,
        }
