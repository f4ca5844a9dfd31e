"""results/<family>/<method>/<type>/<run>/: what a run writes, and whether it may resume."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import ROOT, check_object, read_lines, read_object, write_json, write_text
from pocl.common.lock import FolderLock
from pocl.curriculum.stages import Curriculum

_PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "peft", "accelerate", "rouge-score", "numpy")


@dataclass(frozen=True)
class Origin:
    """What a run is made from."""

    options: Mapping[str, Any]  # that define it, by group
    fingerprints: Mapping[str, str]  # of student, data, teacher, ranking
    has_cache: bool | None = None  # whether the teacher's states come from a cache; None without a teacher
    cpu_matmul: str = "torch"  # the library of this process's matmuls on the CPU


class RunFolder:
    """The folder of one run. Only rank 0 calls the methods that write."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.best = path / "best"
        self.adapter = path / "adapter"  # of a LoRA run: what was merged into best/
        self.checkpoints = path / "checkpoints"
        self.stages = path / "stages"  # with --keep-stages
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here. The system releases the lock however the process ends.

        A run that ends before it has written anything leaves no folder. Collective: every rank must call it.
        Raises UserError if another process trains here.
        """
        with FolderLock(self.path) as lock:
            try:
                holder = distributed.broadcast(lock.take() if distributed.is_main() else None)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; give another `output_dir`") from error
            if holder:
                raise UserError(
                    f"{self.path} is being trained by {holder}; wait until it ends, or give another `run_name`"
                )
            yield

    def last_checkpoint(self) -> dict[str, Any] | None:
        """What checkpoints/last.json says (tag, position, world_size, files); None before the first."""
        path = self.checkpoints / "last.json"
        if not path.is_file():
            return None
        last = read_object(path, {"tag": (str,), "position": (dict,), "world_size": (int,), "files": (dict,)})
        names = [last["tag"], *last["files"]]
        if not all(re.fullmatch(r"[\w.-]{1,99}", name, re.ASCII) for name in names):
            raise UserError(f"{path} is damaged: it names files that no checkpoint has")
        check_object(last["files"], {name: (int,) for name in last["files"]}, f"{path} is damaged: 'files'")
        return last

    def begun_with(self) -> dict[str, Any] | None:
        """The options of the run that this folder holds, by group; None if it holds none."""
        saved = self._saved_config()
        return saved["options"] if saved else None

    def begun_with_cache(self) -> bool | None:
        """Whether the run that this folder holds reads the teacher's states from a cache; None if it holds none."""
        saved = self._saved_config()
        return saved.get("teacher_cache") if saved else None

    def check_options(self, options: Mapping[str, Any], world_size: int, *, weights_only: bool = False) -> None:
        """Raise UserError if this folder holds a run with other options, or with another number of ranks.

        ``weights_only``: the number of ranks may differ.
        """
        saved = self._saved_config()
        if saved is None:
            return
        # Through JSON and back, so that tuples and lists compare equal.
        changed = _differences(saved["options"], json.loads(json.dumps(options)))
        if changed:
            raise UserError(
                f"{self.path} holds a run with other options ({'; '.join(changed)}); "
                f"give another `run_name`, or delete the folder"
            )
        last = distributed.broadcast(self.last_checkpoint())
        if last and last["world_size"] != world_size and not weights_only:
            raise UserError(
                f"{self.path} was trained on {last['world_size']} rank(s), this is {world_size}; run it on "
                f"{last['world_size']}, resume from its weights alone with `resume_weights`, or give another "
                f"`run_name`"
            )

    def check_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """Raise UserError if the run was begun with other data or another student at the same paths."""
        saved = self._saved_config()
        if saved is None:
            return
        changed = [name for name, value in fingerprints.items() if saved["fingerprints"].get(name) != value]
        if changed:
            raise UserError(
                f"{self.path}: its paths no longer hold the {' and '.join(changed)} that it was begun with; "
                f"give another `run_name`, or delete the folder"
            )

    def _saved_config(self) -> dict[str, Any] | None:
        """config.json as rank 0 sees it. Collective: every rank must call it.

        None if the folder holds no run: one without a checkpoint leaves nothing that another command could spoil.
        """
        begun = self.config.is_file() and self.last_checkpoint() is not None
        return distributed.broadcast(self._read_config() if begun else None)

    def _read_config(self) -> dict[str, Any]:
        config = read_object(self.config, {"options": (dict,), "fingerprints": (dict,)})
        groups = config["options"]
        check_object(groups, {name: (dict,) for name in groups}, f"{self.config} is damaged: 'options'")
        return config

    def start(self, origin: Origin, stages: Curriculum) -> None:
        """Write what is decided before step 0: config.json (options, versions, git commit, fingerprints), stages.json.

        To be called when nothing is left that could refuse the command.

        Collective: every rank must call it.  Raises UserError if the run was begun with other data or models.
        """
        self.check_fingerprints(origin.fingerprints)
        distributed.barrier()  # all ranks have checked before rank 0 writes
        if distributed.is_main():
            self._forget_others(origin)
            versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
            write_json(
                self.config,
                {
                    "options": origin.options,
                    "world_size": distributed.world_size(),
                    "fingerprints": origin.fingerprints,
                    "teacher_cache": origin.has_cache,
                    "versions": versions,
                    "cpu_matmul": origin.cpu_matmul,
                    "git_commit": git_commit(),
                },
            )
            records = [asdict(stage) | {"pool": [stage.pool.start, stage.pool.stop]} for stage in stages]
            write_json(self.path / "stages.json", records)
        distributed.barrier()
        say(f"run folder {self.path}")

    def _forget_others(self, origin: Origin) -> None:
        """Drop the rankings of a command that ended before its first checkpoint and was another one than this."""
        if not self.config.is_file() or self.last_checkpoint():
            return
        saved = self._read_config()
        same = not _differences(saved["options"], json.loads(json.dumps(origin.options)))
        if same and saved["fingerprints"] == dict(origin.fingerprints):
            return
        for path in self.path.glob("difficulty*.jsonl"):
            path.unlink()
        shutil.rmtree(self.path / "scoring", ignore_errors=True)

    def first_ranking(self) -> Path | None:
        """The file of the earliest ranking; None if the run has not ranked."""
        first = self.path / "difficulty.jsonl"  # before anything is trained
        if first.is_file():
            return first
        later = self.path.glob("difficulty-*.jsonl")
        return min(later, key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)], default=None)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line that a crash cut short is left out."""
        records = read_lines(self.metrics)
        for number, record in enumerate(records, start=1):
            check_object(record, {"step": (int,)}, f"{self.metrics}:{number}: the record")
        return records

    def truncate_metrics(self, last_step: int, *, within_epoch: bool = False) -> None:
        """Drop the records after the checkpoint from which the run resumes.

        ``within_epoch``: its last step had not been evaluated then, even if it is the epoch's last one.
        """
        kept = [
            record
            for record in self.read_metrics()
            if record["step"] < last_step or (record["step"] == last_step and ("loss" in record or not within_epoch))
        ]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Sequence[str]:
    changed = []
    for group in sorted({*saved, *wanted}):
        old, new = saved.get(group, {}), wanted.get(group, {})
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                changed.append(f"{name} was {old.get(name)!r}, is {new.get(name)!r}")
    return changed


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the code, with ``-dirty`` if the tree differs; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
