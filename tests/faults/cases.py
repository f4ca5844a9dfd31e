"""What is killed: a command of each kind, as the scripts give them, on the tests' tiny pair."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.runs import Folders, read_jsonl, train_arguments

# What a run says of the machine rather than of itself.
_OF_THE_MACHINE = ("tokens_per_second", "peak_memory_gb", "dev_seconds", "seconds")
_KEPT = ("best/*", "adapter/*", "stages/*/*", "checkpoints/*/*", "difficulty*.jsonl", "*/*.jsonl", "answers*/*")
_KEPT_JSON = ("ledger.json", "diagnostics.json", "stages.json", "*/summary.json", "summary.json")
_SHORT = ("--num-train", 40, "--num-dev", 2)


@dataclass(frozen=True)
class Case:
    """A command that is killed."""

    title: str
    script: str  # train, evaluate, or a tool
    extra: tuple[object, ...] = ()
    num_ranks: int = 1
    zero: int = 0
    teacher: bool = True

    def arguments(self, folders: Folders, folder: Path) -> list[str]:
        """The command's arguments; it writes into ``folder`` alone."""
        if self.script == "evaluate":
            given: list[object] = ["--model", folders.student, "--sets", "short", "--data-root", folders.data_root]
            given += ["--output-dir", folder / "run", "--max-length", 192, "--max-prompt-length", 160]
            return [str(value) for value in [*given, *self.extra]]
        if self.script == "tools.generate_seqkd":
            given = ["--model", folders.teacher, "--data-dir", folders.data, "--output-dir", folder / "run"]
            given += ["--max-length", 192, "--num-train", 24, "--eval-batch-size", 4]
            return [str(value) for value in [*given, *self.extra]]
        extra = [*_SHORT, "--deepspeed-config", f"scripts/deepspeed/zero{self.zero}.json", *self.extra]
        if self.teacher and "--on-policy" not in self.extra:
            extra += ["--teacher-cache", folder / "cache"]
        return train_arguments(folders, folder, *extra, teacher=self.teacher)

    def run_folder(self, folder: Path) -> Path:
        """Where the command leaves what it makes."""
        if self.script != "train":
            return folder / "run"
        type_ = self.extra[self.extra.index("--type") + 1] if "--type" in self.extra else "tfkl"
        return folder / str(type_) / "seed10"

    def left(self, folder: Path) -> dict[str, str]:
        """A hash of all that counts in what the command has left: weights, rankings, metrics, states."""
        run, found = self.run_folder(folder), {}
        for pattern in _KEPT:
            for path in run.glob(pattern):
                if path.is_file():
                    found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in (*_KEPT_JSON, "metrics.jsonl"):
            for path in run.glob(pattern):
                value = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
                found[str(path.relative_to(run))] = json.dumps(_without_the_machine(value), sort_keys=True)
        return found


def _without_the_machine(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_the_machine(entry) for name, entry in value.items() if name not in _OF_THE_MACHINE}
    if isinstance(value, list):
        return [_without_the_machine(entry) for entry in value]
    return value


def _whole_pool(*extra: object) -> Sequence[object]:
    return ("--curriculum", "whole-pool", "--num-stages", 1, "--epochs", 3, *extra)


_BUFFER = ("--on-policy", "mixed", "--replay-buffer", 8)
_LORA = ("--lora-rank", 2, "--lora-dropout", 0.1)
CASES = {
    "sft": Case("SFT", "train", (*_whole_pool("--type", "sft"),), teacher=False),
    "kd": Case("KD, ZeRO 1", "train", (*_whole_pool("--type", "fkl"),), zero=1),
    "pocl": Case("POCL, stage ends kept", "train", ("--keep-stages",)),
    "pocl-2": Case("POCL, ZeRO 2, two ranks", "train", num_ranks=2, zero=2),
    "rerank": Case("POCL, ranked anew at each stage, ZeRO 1", "train", ("--rerank", "stage"), zero=1),
    "gkd": Case("GKD with a replay buffer, ZeRO 2", "train", (*_whole_pool(*_BUFFER, "--type", "jsd"),), zero=2),
    "gkd-2": Case("POCL + GKD, two ranks", "train", (*_BUFFER, "--type", "tjsd"), num_ranks=2),
    "lora": Case("POCL with LoRA, ZeRO 1", "train", _LORA, zero=1),
    "lora-2": Case("POCL with LoRA, two ranks", "train", _LORA, num_ranks=2),
    "zero3": Case("POCL, ZeRO 3, two ranks", "train", num_ranks=2, zero=3),
    "evaluate": Case("evaluate.py, three seeds", "evaluate", ("--seeds", 1, 2, 3)),
    "seqkd": Case("tools/generate_seqkd.py", "tools.generate_seqkd"),
}
