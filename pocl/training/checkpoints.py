"""What a run needs to resume, and the best student so far: written whole or not at all."""

import copy
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import RankStopped, UserError, first_line
from pocl.common.files import check_object, recover_folder, replace_folder, write_json
from pocl.models.lora import merged_weights, save_adapter
from pocl.models.student import Student
from pocl.training.engine import Engine
from pocl.training.model_card import write_card
from pocl.training.position import Position
from pocl.training.run_folder import RunFolder
from pocl.training.statefile import load_state, save_state


class Checkpoints:
    """The folders best/ and checkpoints/ of a run, and stages/ if they are kept."""

    def __init__(self, run: RunFolder, engine: Engine, student: Student) -> None:
        self.run, self.engine, self.tokenizer, self.template = run, engine, student.tokenizer, student.template
        self.end_ids = student.end_ids

    def save_best(self, student: PreTrainedModel) -> None:
        """Save the student and its tokenizer to best/, a Hugging Face folder; its adapter, if any, to adapter/."""
        self._save_student(student, self.run.best, adapter=self.run.adapter)

    def save_stage(self, student: PreTrainedModel, stage: int) -> None:
        """Save the student at the end of ``stage``, counted from 0, to stages/stage-<its number from 1>/."""
        self._save_student(student, self.run.stages / f"stage-{stage + 1}")

    def _save_student(self, student: PreTrainedModel, folder: Path, *, adapter: Path | None = None) -> None:
        weights = self.engine.full_state_dict(student)
        if distributed.is_main():
            temporary = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            with self._writing(temporary):
                student.save_pretrained(temporary, state_dict=merged_weights(student, weights))
                self._save_ends(student, temporary)
                self.tokenizer.save_pretrained(temporary)
                self.template.save(temporary)
            if adapter:
                write_card(self.run, temporary)
                new_adapter = adapter.with_name(adapter.name + ".tmp")
                shutil.rmtree(new_adapter, ignore_errors=True)
                with self._writing(new_adapter):
                    adapted = save_adapter(student, weights, new_adapter)
                if adapted:
                    self.template.save(new_adapter)
                    replace_folder(new_adapter, adapter)
            replace_folder(temporary, folder)
        distributed.barrier()

    def _save_ends(self, student: PreTrainedModel, folder: Path) -> None:
        """Write what ends an answer into generation_config.json, so that other programs stop where this one does."""
        settings = copy.deepcopy(student.generation_config)
        settings.eos_token_id = self.end_ids if len(self.end_ids) > 1 else self.end_ids[0]
        settings.save_pretrained(folder)

    def save_last(self, position: Position, rank_state: Mapping[str, Any] | None = None) -> None:
        """Write everything needed to resume, then point last.json to it, then delete the previous checkpoint.

        ``rank_state`` is this rank's additional state (anything ``save_state`` can write).  Raises RankStopped if the
        disk refuses: the previous checkpoint stays.
        """
        rank = distributed.rank()
        # One step can have two: requested after an epoch's last step, and at the epoch's end. The first must not be
        # overwritten: last.json points to it.
        within = "-within" if position.step_in_epoch else ""
        folder = self.run.checkpoints / f"step-{position.step}{within}"
        weights = self.engine.trained_weights()
        state = {
            "optimizer": self.engine.optimizer_state(),
            "random": distributed.random_state(),
            "own": dict(rank_state or {}),
        }
        mine = {_rank_file(rank): state} | ({"weights.safetensors": weights} if distributed.is_main() else {})
        with self._writing(folder):
            for name, values in mine.items():
                save_state(folder / name, values)
            sizes = {name: (folder / name).stat().st_size for name in mine}
        files = {
            name: size
            for of_rank in distributed.gather_by_id({rank: sizes}).values()
            for name, size in of_rank.items()
        }
        if distributed.is_main():
            write_json(
                self.run.checkpoints / "last.json",
                {
                    "tag": folder.name,
                    "position": asdict(position),
                    "world_size": distributed.world_size(),
                    "files": files,  # bytes
                },
            )
            self._delete_others(folder)
        distributed.barrier()

    def resume(self) -> tuple[Position, dict[str, Any] | None]:
        """Load the last checkpoint, if there is one -> its position, and this rank's own state.

        A checkpoint from another number of ranks (allowed with --resume-weights) gives its weights and its
        position, and rank 0's own state.  Raises UserError for a damaged checkpoint.
        """
        if distributed.is_main():
            recover_folder(self.run.best)
            recover_folder(self.run.adapter)
        last = distributed.broadcast(self.run.last_checkpoint())  # another node may not see it yet
        if last is None:
            if distributed.is_main():
                self.run.metrics.unlink(missing_ok=True)
            distributed.barrier()
            return Position(), None
        position, folder = _position(last["position"], self.run.checkpoints), self.run.checkpoints / last["tag"]
        self._check_files(folder, last["files"])
        if position.best_score is not None and not self.run.best.is_dir():
            raise UserError(
                f"{self.run.best} is missing, the best student on dev ({position.best_score:.2f}); put it back, "
                f"or delete {self.run.checkpoints} to train again from the start"
            )
        other_ranks = last["world_size"] != distributed.world_size()
        state = load_state(folder / _rank_file(0 if other_ranks else distributed.rank()))
        self.engine.load(load_state(folder / "weights.safetensors"), None if other_ranks else state["optimizer"])
        if other_ranks:
            say(
                f"resuming from the weights of step {position.step}, which {last['world_size']} rank(s) trained; "
                f"AdamW's moments and the random states are lost"
            )
        else:
            distributed.set_random_state(state["random"])
        if distributed.is_main():
            self._delete_others(folder)
            self.run.truncate_metrics(position.step, within_epoch=position.step_in_epoch > 0)
        return position, state["own"] | {"other_ranks": other_ranks}

    def kept(self) -> str:
        """What is left of the run if it ends now, as a sentence says it."""
        folder = self.run.checkpoints
        return f"the last good checkpoint is kept in {folder}" if folder.exists() else "no checkpoint was written yet"

    def _delete_others(self, kept: Path) -> None:
        for other in self.run.checkpoints.glob("step-*"):
            # Keep what a person has copied there.
            if other != kept and re.fullmatch(r"step-\d+(-within)?", other.name):
                shutil.rmtree(other, ignore_errors=True)

    def _check_files(self, folder: Path, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} of {size} bytes"
                raise UserError(
                    f"{path} {what}: the last checkpoint is damaged. {self.run.best} is unaffected; delete "
                    f"{self.run.checkpoints} to train again from the start, or give another `run_name`"
                )

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Leave no half-written folder if the disk refuses.  Raises RankStopped then."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = first_line(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
            shutil.rmtree(folder, ignore_errors=True)
            last = self.run.last_checkpoint()
            kept = (
                f"the checkpoint of step {last['position']['step']} is kept" if last else "no checkpoint was kept yet"
            )
            raise RankStopped(f"cannot write {folder}: {reason}; {kept}; the same command resumes") from error


def _position(saved: Mapping[str, Any], folder: Path) -> Position:
    what = f"{folder / 'last.json'} is damaged: its position"
    kinds: dict[str, tuple[type, ...]] = {}
    for name, value in asdict(Position()).items():
        kinds[name] = (int, float, type(None)) if value is None else (type(value),)
    check_object(saved, kinds, what)
    if saved.keys() != kinds.keys():
        raise UserError(f"{what} has unknown fields {sorted(saved.keys() - kinds.keys())}")
    return Position(**saved)


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"
