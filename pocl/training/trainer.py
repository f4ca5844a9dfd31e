"""The training loop: stages, epochs, optimiser steps, dev evaluation."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from signal import SIGTERM
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common import distributed
from pocl.common.console import Progressing, say
from pocl.common.errors import Interrupted, RunStopped
from pocl.common.files import write_json
from pocl.common.interrupt import Interrupt, StopRequested
from pocl.curriculum.pools import Pools
from pocl.curriculum.stages import Stage
from pocl.data.dataset import Split
from pocl.difficulty.forgetting import BucketProbe
from pocl.difficulty.ranker import Ranker, new_ranking
from pocl.difficulty.ranking import Ranking
from pocl.difficulty.training_losses import TrainingLosses
from pocl.evaluation.answers import evaluate, mean_scores
from pocl.evaluation.likelihood import mean_cross_entropy
from pocl.evaluation.sets import DevSet
from pocl.generation.decoding import BuiltIn
from pocl.models.student import Student
from pocl.models.teacher import TeacherSource
from pocl.training.batches import MicroBatchSource
from pocl.training.checkpoints import Checkpoints
from pocl.training.engine import Engine
from pocl.training.log import MetricsLog, peak_memory_gb
from pocl.training.on_policy import OnPolicy, OnPolicyState
from pocl.training.position import Position
from pocl.training.run_folder import RunFolder
from pocl.training.settings import TrainSettings
from pocl.training.step import Gradients


class Trainer:
    """One run: ``fit`` trains every stage, ``step`` is one optimiser step."""

    def __init__(
        self,
        recipe: TrainSettings,
        *,
        run: RunFolder,
        engine: Engine,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: TeacherSource | None,
        train: Split,
        pools: Pools,
        ranker: Ranker | None = None,
        dev: DevSet | None,
        on_policy: OnPolicy | None = None,
        device: torch.device,
    ) -> None:
        self.recipe, self.run, self.engine, self.device = recipe, run, engine, device
        self.checkpoints = Checkpoints(run, engine, tokenizer)
        self.student, self.tokenizer, self.teacher = student, tokenizer, teacher
        self.train, self.pools, self.ranker, self.dev = train, pools, ranker, dev
        self.snapshot = TrainingLosses(len(train))
        self.journal = MetricsLog(run, len(recipe.stages))
        self.probe: BucketProbe | None = None
        if pools.ranked is not None:
            self._probe_buckets(pools.ranked)
        self.batches = MicroBatchSource(
            train,
            tokenizer,
            on_policy=on_policy,
            student=self._gathered_student,
            max_tokens=recipe.max_tokens,
            batch_size=recipe.batch_size,
            packed=recipe.packed,
            max_new_tokens=recipe.max_new_tokens,
            total_steps=recipe.total_steps,
            device=device,
        )
        self.gradients = Gradients(self.batches, engine, teacher, self.snapshot, device)
        self.position = Position()
        self.saved: Position | None = None  # that of the last checkpoint
        self.interrupt = Interrupt()
        self.asked_to_stop = 0  # the signal that asked for it, on any rank
        self._teacher_reads = teacher is not None and teacher.online

    def fit(self) -> Position:
        """Train every stage, from the start or from the last checkpoint -> the final position.

        Raises Interrupted if a signal asked to stop: the step was finished and everything saved.
        """
        self.resume()
        if self.position.step == 0 and self.dev and self.batches.follows_dev_loss:
            self.batches.state = self.batches.state.after_dev_loss(self.dev_loss(self._gathered_student()))
        self.journal.open(self.position.step)
        with (
            self.interrupt,
            self._saving_what_is_done(),
            Progressing("training", self.recipe.total_steps, self.position.step) as progress,
        ):
            for stage in self.recipe.stages[self.position.stage :]:
                begins = self.position.epoch == self.position.step_in_epoch == 0
                if begins and stage.index > 0 and self.recipe.restart_optimizer:
                    self.engine.fresh_optimizer()
                for epoch in range(self.position.epoch, stage.epochs):
                    self.rank(stage, epoch)
                    self.train_epoch(stage, epoch, progress)
                    self.end_epoch(stage, epoch)
                    if self.position.stage > stage.index:  # its last epoch, or converged
                        left = stage.epochs - epoch - 1
                        progress.advance(left * stage.steps_per_epoch(self.recipe.global_batch_size))
                        break
        self.journal.close()
        return self.position

    @contextmanager
    def _saving_what_is_done(self) -> Iterator[None]:
        """If a signal asks to stop, write a checkpoint of the last step.  Raises Interrupted then."""
        try:
            yield
        except StopRequested as asked:
            if self.position != self.saved:
                self.save()
            raise Interrupted(
                f"asked to stop: saved at step {self.position.step} of {self.recipe.total_steps} in "
                f"{self.run.checkpoints}; the same command resumes",
                asked.signum,
            ) from None

    def resume(self) -> None:
        """Load the last checkpoint, if there is one, and the rankings in force at that point."""
        self.position, saved = self.checkpoints.resume()
        if saved is None:
            if self.ranker:
                self.ranker.forget_after(0, -1)
            return
        self.saved = self.position
        self.batches.state = OnPolicyState.from_json(saved["on_policy"])
        self.snapshot.restore(saved["losses"])
        self._write_ledger()  # the run may have ended between checkpoint and ledger
        say(f"resuming from step {self.position.step} of {self.recipe.total_steps}")
        for stage in self.recipe.stages[: self.position.stage + 1]:
            for epoch in range(stage.epochs if stage.index < self.position.stage else self.position.epoch):
                known = self.ranker and self.ranker.known(new_ranking(self.ranker.rerank, stage.index, epoch))
                if known:
                    self._follow(known, stage)
        if saved["other_ranks"] and self.ranker:
            begun = self.position.epoch if self.position.step_in_epoch else self.position.epoch - 1
            self.ranker.forget_after(self.position.stage, begun)

    def rank(self, stage: Stage, epoch: int) -> None:
        """Apply a new ranking of the examples if this epoch begins with one."""
        name = new_ranking(self.ranker.rerank, stage.index, epoch) if self.ranker else None
        if self.ranker is None or name is None:
            return
        ranking = self.ranker.known(name)
        if ranking is None and self.position.step_in_epoch == 0:  # else the epoch began without one
            ranking = self.ranker.rank(name, self._current_student, self.snapshot.values)
        if ranking is not None:
            self._follow(ranking, stage)

    def _follow(self, ranking: Ranking, stage: Stage) -> None:
        self._probe_buckets(ranking.order)
        self.pools = self.pools.rank(ranking.order, stage)

    def _probe_buckets(self, ranked: np.ndarray) -> None:
        """Track the quarters of the first ranking from stage to stage."""
        if self.probe is None and self.ranker and self.recipe.bucket_examples:
            self.probe = BucketProbe(
                self.train,
                ranked,
                examples_per_bucket=self.recipe.bucket_examples,
                settings=self.ranker.settings,
            )

    def train_epoch(self, stage: Stage, epoch: int, progress: Progressing) -> None:
        """One pass over the stage's pool in global batches; a last short batch is dropped."""
        self.student.train()
        size = self.recipe.global_batch_size
        examples = self.pools.examples(stage, epoch, seed=self.recipe.seed)
        steps = stage.steps_per_epoch(size)
        batches = examples[: steps * size].reshape(steps, size)
        for i in range(self.position.step_in_epoch, steps):
            lr = self.recipe.learning_rate(stage, epoch * steps + i)
            record = self.step(batches[i], stage, lr, following=batches[i + 1] if i + 1 < steps else None)
            if self.position.step % self.recipe.log_every == 0 or i == steps - 1:
                self.journal.record_step(stage, epoch, self.position.step, record)
            progress.advance(1, self.journal.note(stage, record, distils=self.teacher is not None))
            self.position = replace(self.position, step_in_epoch=i + 1)
            if self.asked_to_stop:
                raise StopRequested(self.asked_to_stop)

    def step(
        self, examples: np.ndarray, stage: Stage, lr: float, following: np.ndarray | None = None
    ) -> dict[str, float]:
        """One optimiser step over one global batch [G] -> its record for metrics.jsonl.

        The objective is summed over response tokens and divided once by their number in the whole step, so ranks and
        micro-batches of any size give the same gradient. ``following`` [G] is the next global batch, prepared while a
        GPU computes this one.  Raises RunStopped for a loss that is not finite.
        """
        started = time.perf_counter()
        whole, parts = self.gradients.add(
            examples, self.position.step, self.recipe.terms[stage.index], self.pools.factor
        )
        if following is not None:
            self.gradients.make_ready(following, self.position.step + 1)
        gradient_norm, applied = self.engine.step(lr)  # waits for the GPU, as nothing does between micro-batches
        sums = torch.stack(parts).tolist()
        signum = self.interrupt.signum  # if any rank received a signal, all ranks stop
        *totals, signums = distributed.sum_over_ranks([*map(sum, zip(*sums, strict=True)), signum], self.device)
        loss, cross_entropy, divergence = (total / whole.num_response_tokens for total in totals)
        # Decided by the sum alone: the other ranks do not know of a signal that came since.
        self.asked_to_stop = (self.interrupt.signum or SIGTERM) if signums else 0
        if not all(map(math.isfinite, totals)):
            pairs = zip(whole.micro_batches, sums, strict=True)
            bad = [micro.batch.example_ids for micro, part in pairs if not all(map(math.isfinite, part))]
            self._skip(f"loss is {loss}", stage, [i for ids in bad for i in ids.tolist()])
        elif not applied and not self.engine.scales_loss:  # an fp16 overflow is handled by the dynamic loss scale
            self._skip("gradient is not finite", stage, self.train.ids[examples].tolist())
        self.position = self.position.after_step(
            len(examples),
            tokens=whole.num_tokens,
            response_tokens=whole.num_response_tokens,
            student_texts=whole.num_student_texts,
            teacher_reads=self._teacher_reads,
        )
        return {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
            "lr": lr,
            "gradient_norm": gradient_norm,
            "skipped": not applied,
            "student_text": whole.num_student_texts / len(examples),
            "tokens_per_second": whole.num_tokens / (time.perf_counter() - started),
            "peak_memory_gb": peak_memory_gb(self.device),
        }

    def _skip(self, what: str, stage: Stage, offenders: list[int]) -> None:
        """Count a step that was not applied.  Raises RunStopped if --max-skipped-steps allows no more."""
        ids = sorted(distributed.gather_by_id(dict.fromkeys(offenders)))
        where = f"the {what} at step {self.position.step + 1}, stage {stage.index + 1}, in the batch of examples {ids}"
        if self.position.skipped_steps >= self.recipe.max_skipped_steps:
            before = f" after {self.position.skipped_steps} skipped steps" if self.position.skipped_steps else ""
            raise RunStopped(f"{where}{before}; {self._kept()}")
        self.position = replace(self.position, skipped_steps=self.position.skipped_steps + 1)
        say(f"{where}: skipped, {self.position.skipped_steps} of at most {self.recipe.max_skipped_steps}")

    def _kept(self) -> str:
        folder = self.run.checkpoints
        return f"the last good checkpoint is kept in {folder}" if folder.exists() else "no checkpoint was written yet"

    def end_epoch(self, stage: Stage, epoch: int) -> None:
        """Evaluate on dev and write checkpoints, if this epoch is due; move on to the next epoch or stage."""
        self.snapshot.share()
        last = epoch == stage.epochs - 1
        due = last or (epoch + 1) % self.recipe.eval_every == 0
        rouge_l = self.evaluate_dev(stage, epoch) if due else None
        if rouge_l is not None:
            self.position = self.position.after_dev(rouge_l)
        patience = self.recipe.patience
        converged = patience is not None and self.position.evaluations_without_rise >= patience
        if converged and not last:
            say(f"stage {stage.index + 1} ends: dev ROUGE-L has not risen for {patience} evaluations")
        best = self.position.best_rouge_l
        self.position = self.position.after_epoch(
            stage.index, epoch, stage_over=last or converged, last_stage=stage.index == len(self.recipe.stages) - 1
        )
        if self.recipe.keep_stages and (last or converged):
            self.checkpoints.save_stage(self.student, stage.index)
        if self.probe and (last or converged):
            self.journal.record(stage, epoch, self.position.step, self.probe.measure(self._current_student()))
        if not due:
            return
        if rouge_l is None or best is None or rouge_l > best:
            self.position = replace(self.position, best_rouge_l=rouge_l)
            self.checkpoints.save_best(self.student)
        self.save()

    def save(self) -> None:
        """Write what resuming needs, and the ledger of what the run has seen."""
        self.snapshot.share()
        state = {"on_policy": self.batches.state.as_json(), "losses": self.snapshot.as_json()}
        self.checkpoints.save_last(self.position, state)
        self.saved = self.position
        self._write_ledger()

    def _write_ledger(self) -> None:
        if distributed.is_main():
            write_json(self.run.path / "ledger.json", self.ledger())

    def dev_loss(self, student: PreTrainedModel) -> float:
        """Mean cross-entropy of the dev references [nats per response token]."""
        assert self.dev
        return mean_cross_entropy(
            student, self.dev.split, chunk_tokens=self.recipe.chunk_tokens, vocab_size=len(self.tokenizer)
        )

    def evaluate_dev(self, stage: Stage, epoch: int) -> float | None:
        """Mean ROUGE-L (0 to 100) of the student's answers to the dev prompts; None without a dev set."""
        if self.dev is None:
            return None
        started = time.perf_counter()
        student = self._gathered_student()
        loss = self.dev_loss(student)
        records = evaluate(
            BuiltIn(student, self.tokenizer, self.dev.batch_size),
            self.tokenizer,
            self.dev.examples,
            self.dev.prompts,
            sampling=self.dev.sampling,
            title=f"dev after stage {stage.index + 1}, epoch {epoch + 1}",
        )
        self.batches.state = self.batches.state.after_dev_loss(loss)  # after all answers, which a signal may interrupt
        scores = mean_scores(records)
        say(
            f"stage {stage.index + 1} epoch {epoch + 1}  step {self.position.step}  "
            f"dev ROUGE-L {scores['rouge_l']:.2f}  exact match {scores['exact_match']:.1f}"
        )
        values = {
            "dev_rouge_l": scores["rouge_l"],
            "dev_exact_match": scores["exact_match"],
            "dev_cross_entropy": loss,
            "dev_seconds": time.perf_counter() - started,
        }
        self.journal.record_dev(stage, epoch, self.position.step, values)
        return scores["rouge_l"]

    def _gathered_student(self) -> PreTrainedModel:
        return self.engine.gathered(self.student)

    def _current_student(self) -> Student:
        return Student(self._gathered_student(), self.tokenizer)

    def ledger(self) -> dict[str, Any]:
        """What the run has seen: the terms of a fair comparison."""
        position = self.position
        return {
            "samples": position.samples,
            "tokens": position.tokens,
            "response_tokens": position.response_tokens,
            "student_texts": position.student_texts,
            "optimizer_steps": position.step,
            "skipped_steps": position.skipped_steps,
            "global_batch_size": self.recipe.global_batch_size,
            "lr": self.recipe.lr,
            # A cache was made by reading every example once.
            "teacher_forward_passes": position.teacher_forward_passes
            + (len(self.train) if self.teacher and not self._teacher_reads else 0)
            + (self.ranker.teacher_passes() if self.ranker else 0),
            "world_size": distributed.world_size(),
            "finished": position.done,
        }
