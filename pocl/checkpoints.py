"""What a run needs to go on, and the best student so far: written whole or not at all."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.engine import Engine
from pocl.files import read_json, recover_folder, replace_folder, write_json
from pocl.lora import merged_weights, save_adapter
from pocl.rundir import RunDir


@dataclass(frozen=True)
class Position:
    """Where a run stands: the epoch to go on with, and what has been seen. The whole resume state but for tensors."""

    stage: int = 0
    epoch: int = 0
    step_in_epoch: int = 0  # optimiser steps of that epoch that are done already
    step: int = 0  # of the whole run
    best_rouge_l: float | None = None  # on dev, of the whole run
    stage_best_rouge_l: float | None = None  # of the stage that is trained
    evaluations_without_rise: int = 0  # since then
    samples: int = 0
    tokens: int = 0  # real tokens through the student, without padding
    response_tokens: int = 0
    teacher_forward_passes: int = 0  # examples that the teacher's trunk has read
    student_texts: int = 0  # of the samples, those whose response the student wrote
    done: bool = False

    def after_dev(self, rouge_l: float) -> "Position":
        """The position behind a dev evaluation, as the stage counts it."""
        if self.stage_best_rouge_l is None or rouge_l > self.stage_best_rouge_l:
            return replace(self, stage_best_rouge_l=rouge_l, evaluations_without_rise=0)
        return replace(self, evaluations_without_rise=self.evaluations_without_rise + 1)

    def after_epoch(self, stage: int, epoch: int, *, stage_over: bool, last_stage: bool) -> "Position":
        """The position behind an epoch of a stage."""
        if not stage_over:
            return replace(self, stage=stage, epoch=epoch + 1, step_in_epoch=0)
        fresh = replace(
            self, stage=stage + 1, epoch=0, step_in_epoch=0, stage_best_rouge_l=None, evaluations_without_rise=0
        )
        return replace(fresh, done=last_stage)


class Checkpoints:
    """The folders best/ and checkpoints/ of a run."""

    def __init__(self, run: RunDir, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run, self.engine, self.tokenizer = run, engine, tokenizer

    def save_best(self, student: PreTrainedModel) -> None:
        """Put the student and its tokenizer into best/, a Hugging Face folder; its adapter, if any, into adapter/."""
        weights = self.engine.full_state_dict(student)
        if distributed.is_main():
            temporary, adapter = self.run.path / "best.tmp", self.run.path / "adapter.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(adapter, ignore_errors=True)
            student.save_pretrained(temporary, state_dict=merged_weights(student, weights))
            self.tokenizer.save_pretrained(temporary)
            if save_adapter(student, weights, adapter):
                replace_folder(adapter, self.run.adapter)
            replace_folder(temporary, self.run.best)
        distributed.barrier()

    def save_last(self, position: Position, rank_state: Mapping[str, Any] | None = None) -> None:
        """Write everything that going on needs, then point last.json to it, then delete the one before.

        ``rank_state`` is what this rank keeps besides, as JSON values.
        """
        tag, folder = f"step-{position.step}", self.run.checkpoints
        self.engine.save(folder, tag)
        torch.save(distributed.random_state(), folder / tag / f"random-{distributed.rank()}.pt")
        write_json(folder / tag / f"state-{distributed.rank()}.json", rank_state)
        distributed.barrier()
        if distributed.is_main():
            write_json(folder / "last.json", {"tag": tag, "position": asdict(position)})
            for old in folder.glob("step-*"):
                if old.name != tag:
                    shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()

    def resume(self) -> tuple[Position, dict[str, Any] | None]:
        """Take up the last checkpoint, where there is one -> where it was written, and this rank's own state."""
        last = self.run.checkpoints / "last.json"
        if distributed.is_main():
            recover_folder(self.run.best)
            recover_folder(self.run.adapter)
        if not last.is_file():
            if distributed.is_main():
                self.run.metrics.unlink(missing_ok=True)
                self.run.forget_rerankings()
            distributed.barrier()
            return Position(), None
        saved = read_json(last)
        position, folder = Position(**saved["position"]), self.run.checkpoints / saved["tag"]
        self.engine.load(self.run.checkpoints, saved["tag"])
        random_state = torch.load(folder / f"random-{distributed.rank()}.pt", weights_only=True)
        distributed.set_random_state(random_state)
        if distributed.is_main():
            self.run.truncate_metrics(position.step)
        return position, read_json(folder / f"state-{distributed.rank()}.json")
