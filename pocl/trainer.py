"""The training loop: stages, epochs, optimiser steps, dev evaluation."""

import math
import time
from dataclasses import replace
from signal import SIGTERM
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.buckets import BucketProbe
from pocl.checkpoints import Checkpoints, Position
from pocl.console import Progressing, say
from pocl.curriculum import Stage
from pocl.data import Batch, Split, send
from pocl.difficulty import Ranker
from pocl.engine import Engine
from pocl.errors import Interrupted, RunStopped
from pocl.evaluation import DevSet, evaluate, mean_cross_entropy, mean_scores
from pocl.files import write_json
from pocl.generation import BuiltIn
from pocl.interrupt import Interrupt
from pocl.journal import Journal, peak_memory_gb
from pocl.lora import merged_weights
from pocl.on_policy import OnPolicy, OnPolicyState
from pocl.pools import Pools
from pocl.recipe import Recipe
from pocl.rundir import RunDir
from pocl.snapshot import Snapshot
from pocl.teacher import TeacherSource
from pocl.texts import Text, TextSource
from pocl.token_objective import Term


class Trainer:
    """One run: ``fit`` trains every stage, ``step`` is one optimiser step."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        run: RunDir,
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
        self.snapshot = Snapshot(len(train))
        self.journal = Journal(run, len(recipe.stages))
        self.probe: BucketProbe | None = None
        self.texts = TextSource(
            train,
            tokenizer,
            on_policy=on_policy,
            student=self._whole_student,
            max_tokens=recipe.max_tokens,
            batch_size=recipe.batch_size,
            packed=recipe.packed,
            max_new_tokens=recipe.max_new_tokens,
            total_steps=recipe.total_steps,
            device=device,
        )
        self.position = Position()
        self.interrupt = Interrupt()
        self.asked_to_stop = 0  # the signal that asked for it, on any rank
        self._teacher_reads = teacher is not None and teacher.online

    def fit(self) -> Position:
        """Train every stage, from the start or from the last checkpoint -> where the run ended.

        Raises Interrupted where a signal asked for the end: the step was finished and everything saved.
        """
        self.resume()
        self.journal.open(self.position.step)
        with self.interrupt, Progressing("training", self.recipe.total_steps, self.position.step) as progress:
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

    def resume(self) -> None:
        """Take up the last checkpoint, where there is one, and the rankings that were in force then."""
        self.position, saved = self.checkpoints.resume()
        if saved is None:
            return
        texts = OnPolicyState.from_json(saved["texts"])
        self.texts.state = replace(texts, buffer=()) if saved["other_ranks"] else texts
        self.snapshot = Snapshot(len(self.train), saved["losses"])
        self._write_ledger()  # it may have been cut off behind the checkpoint
        say(f"going on from step {self.position.step} of {self.recipe.total_steps}")
        for stage in self.recipe.stages[: self.position.stage + 1]:
            for epoch in range(stage.epochs if stage.index < self.position.stage else self.position.epoch):
                if self.ranker and self.ranker.made(self.ranker.place(stage, epoch)):
                    self.rank(stage, epoch)

    def rank(self, stage: Stage, epoch: int) -> None:
        """Put a new ranking of the examples in force, where this epoch begins with one."""
        place = self.ranker.place(stage, epoch) if self.ranker else None
        if self.ranker is None or place is None:
            return
        if self.position.step_in_epoch and not self.ranker.made(place):
            return  # the epoch began without one
        ranked = self.ranker.rank(place, self._whole_student, self.snapshot.values)
        if ranked is None:
            return
        if self.probe is None and self.recipe.bucket_examples:
            self.probe = BucketProbe(
                self.train,
                self.tokenizer,
                ranked,
                examples_per_bucket=self.recipe.bucket_examples,
                limits=self.ranker.limits,
            )
        self.pools = self.pools.rank(ranked, stage)

    def train_epoch(self, stage: Stage, epoch: int, progress: Progressing) -> None:
        """One pass over the stage's pool in global batches; a last short batch is dropped."""
        self.student.train()
        size = self.recipe.global_batch_size
        examples = self.pools.examples(stage, epoch, seed=self.recipe.seed)
        steps = stage.steps_per_epoch(size)
        for i in range(self.position.step_in_epoch, steps):
            lr = self.recipe.learning_rate(stage, epoch * steps + i)
            record = self.step(examples[i * size : (i + 1) * size], stage, lr)
            if self.position.step % self.recipe.log_every == 0 or i == steps - 1:
                self.journal.record_step(stage, epoch, self.position.step, record)
            progress.advance(1, self.journal.note(stage, record, distils=self.teacher is not None))
            if self.asked_to_stop:
                self.position = replace(self.position, step_in_epoch=i + 1)
                self.save()
                raise Interrupted(
                    f"asked to stop: saved at step {self.position.step} of {self.recipe.total_steps} in "
                    f"{self.run.checkpoints}; the same command goes on",
                    self.asked_to_stop,
                )

    def step(self, examples: np.ndarray, stage: Stage, lr: float) -> dict[str, float]:
        """One optimiser step over one global batch -> what metrics.jsonl says of it.

        The objective is summed over response tokens and divided once by their number in the whole step, so ranks and
        micro-batches of any size give the same gradient.  Raises RunStopped for a loss that is not finite.
        """
        started = time.perf_counter()
        texts = self.texts.of_step(examples, self.position.step)
        num_tokens, num_inputs, num_student_texts = self.texts.sizes(texts, examples)
        parts: list[torch.Tensor] = []
        for text in texts:
            batch = text.batch.to(self.device)
            term = self.recipe.terms[stage.index]
            if text.of_student:
                term = replace(term, cross_entropy=self.texts.student_cross_entropy)
            parts.append(self._forward_backward(batch, term, num_tokens, text))
        sums = torch.stack(parts).tolist()  # a GPU is waited for here, and not between micro-batches
        signum = self.interrupt.signum  # one rank's wish is every rank's
        *totals, signums = distributed.sum_over_ranks([*map(sum, zip(*sums, strict=True)), signum], self.device)
        loss, cross_entropy, divergence = (total / num_tokens for total in totals)
        # By the sum alone: a signal that came since is not known to the other ranks.
        self.asked_to_stop = (self.interrupt.signum or SIGTERM) if signums else 0
        gradient_norm, applied = self.engine.step(lr)
        if not all(map(math.isfinite, totals)):
            bad = [text.batch for text, part in zip(texts, sums, strict=True) if not all(map(math.isfinite, part))]
            self._skip(f"loss is {loss}", stage, [i for batch in bad for i in batch.example_ids.tolist()])
        elif not applied and not self.engine.scales_loss:  # else an overflow of fp16, which its loss scale answers
            ids = self.train.column("id")
            self._skip("gradient is not finite", stage, [ids[i] for i in examples])
        self._count(len(examples), num_inputs, num_tokens, num_student_texts)
        return {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
            "lr": lr,
            "gradient_norm": gradient_norm,
            "skipped": not applied,
            "student_text": num_student_texts / len(examples),
            "tokens_per_second": num_inputs / (time.perf_counter() - started),
            "peak_memory_gb": peak_memory_gb(self.device),
        }

    def _forward_backward(self, batch: Batch, term: Term, num_tokens: int, text: Text) -> torch.Tensor:
        """Add one micro-batch's gradient -> its summed (objective, cross-entropy, divergence).  -> [3], float64."""
        teacher_states = self.teacher.states(batch) if self.teacher else None
        loss, cross_entropy, divergence = self.engine.forward(
            batch,
            term,
            teacher_states,
            self.teacher.head if self.teacher else None,
            self._kd_ratio(text.positions, term),
        )
        sums = torch.stack([loss.detach().double(), cross_entropy.double().sum(), divergence.double().sum()])
        # NaN everywhere where anything is not finite: the step is left out then, on every rank.
        self.engine.backward(loss * (1.0 + 0.0 * sums.sum()).to(loss.dtype), num_tokens)
        if not text.of_student:  # the loss of the reference is what ranks
            self.snapshot.note(text.positions, batch, cross_entropy)
        return sums

    def _kd_ratio(self, positions: np.ndarray, term: Term) -> torch.Tensor | None:
        """The KD ratio of each example of a micro-batch; None where it is the stage's for all.  -> [B]."""
        if self.pools.factor is None:
            return None
        ratios = torch.as_tensor(term.kd_ratio * self.pools.factor[positions], dtype=torch.float32)
        return send(ratios, self.device)

    def _skip(self, what: str, stage: Stage, offenders: list[int]) -> None:
        """Count a step that was not applied.  Raises RunStopped where --max-skipped-steps allows no more."""
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

    def _count(self, samples: int, inputs: int, response_tokens: int, student_texts: int) -> None:
        before = self.position
        self.position = replace(
            before,
            step=before.step + 1,
            samples=before.samples + samples,
            tokens=before.tokens + inputs,
            response_tokens=before.response_tokens + response_tokens,
            teacher_forward_passes=before.teacher_forward_passes + (samples if self._teacher_reads else 0),
            student_texts=before.student_texts + student_texts,
        )

    def end_epoch(self, stage: Stage, epoch: int) -> None:
        """Evaluate on dev and write checkpoints, where this epoch is due; move on to the next epoch or stage."""
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
            self.journal.record(stage, epoch, self.position.step, self.probe.measure(self._whole_student()))
        if not due:
            return
        if rouge_l is None or best is None or rouge_l > best:
            self.position = replace(self.position, best_rouge_l=rouge_l)
            self.checkpoints.save_best(self.student)
        self.save()

    def save(self) -> None:
        """Write what going on needs, and what the run has seen."""
        self.snapshot.share()
        state = {"texts": self.texts.state.as_json(), "losses": self.snapshot.as_json()}
        self.checkpoints.save_last(self.position, state)
        self._write_ledger()

    def _write_ledger(self) -> None:
        if distributed.is_main():
            write_json(self.run.path / "ledger.json", self.ledger())

    def evaluate_dev(self, stage: Stage, epoch: int) -> float | None:
        """Mean ROUGE-L (0 to 100) of the student's answers to the dev prompts; None without a dev set."""
        if self.dev is None:
            return None
        started = time.perf_counter()
        student = self._whole_student()
        loss = mean_cross_entropy(student, self.dev.split, chunk_tokens=self.recipe.chunk_tokens)
        self.texts.state = self.texts.state.after_dev_loss(loss)
        records = evaluate(
            BuiltIn(student, self.tokenizer, self.dev.batch_size),
            self.tokenizer,
            self.dev.examples,
            self.dev.prompts,
            sampling=self.dev.sampling,
            title=f"dev after stage {stage.index + 1}, epoch {epoch + 1}",
        )
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

    def _whole_student(self) -> PreTrainedModel:
        """The student with all of its weights here: itself, or a copy where ZeRO-3 has shared them out."""
        if self.engine.zero_stage < 3:
            return self.student
        model = AutoModelForCausalLM.from_config(self.student.config, dtype=self.student.dtype)
        weights = merged_weights(self.student, self.engine.full_state_dict(self.student))
        model.load_state_dict(weights, strict=False)
        model.generation_config = self.student.generation_config
        return model.to(self.device).eval()

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
