"""What a run needs to go on, and the best student so far: written whole or not at all."""

import shutil
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.engine import Engine
from pocl.files import read_json, recover_folder, replace_folder, write_json
from pocl.rundir import RunDir


@dataclass(frozen=True)
class Position:
    """Where a run stands: the epoch to train next, and what has been seen. The whole resume state but for tensors."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best_rouge_l: float | None = None
    samples: int = 0
    tokens: int = 0  # real tokens through the student, without padding
    response_tokens: int = 0
    teacher_forward_passes: int = 0  # examples that the teacher's trunk has read
    done: bool = False


class Checkpoints:
    """The folders best/ and checkpoints/ of a run."""

    def __init__(self, run: RunDir, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run, self.engine, self.tokenizer = run, engine, tokenizer

    def save_best(self, student: PreTrainedModel) -> None:
        """Put the student and its tokenizer into best/, a Hugging Face folder."""
        weights = self.engine.full_state_dict(student)
        if distributed.is_main():
            temporary = self.run.path / "best.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            student.save_pretrained(temporary, state_dict=weights)
            self.tokenizer.save_pretrained(temporary)
            replace_folder(temporary, self.run.best)
        distributed.barrier()

    def save_last(self, position: Position) -> None:
        """Write everything that going on needs, then point last.json to it, then delete the one before."""
        tag, folder = f"step-{position.step}", self.run.checkpoints
        self.engine.save(folder, tag)
        torch.save(distributed.random_state(), folder / tag / f"random-{distributed.rank()}.pt")
        distributed.barrier()
        if distributed.is_main():
            write_json(folder / "last.json", {"tag": tag, "position": asdict(position)})
            for old in folder.glob("step-*"):
                if old.name != tag:
                    shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()

    def resume(self) -> Position:
        """Take up the last checkpoint -> where it was written; the start where there is none."""
        last = self.run.checkpoints / "last.json"
        if distributed.is_main():
            recover_folder(self.run.best)
        if not last.is_file():
            if distributed.is_main():
                self.run.metrics.unlink(missing_ok=True)
            return Position()
        saved = read_json(last)
        position = Position(**saved["position"])
        self.engine.load(self.run.checkpoints, saved["tag"])
        random_path = self.run.checkpoints / saved["tag"] / f"random-{distributed.rank()}.pt"
        distributed.set_random_state(torch.load(random_path, weights_only=True))
        if distributed.is_main():
            self.run.truncate_metrics(position.step)
        return position
