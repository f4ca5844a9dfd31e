"""Loss and gradient norm of each step of short runs, which CI compares with those that are kept.

python -m tests.golden      # writes tests/golden_curves.json anew: only where a change of the numbers is meant
"""

import json
import tempfile
from pathlib import Path

import train
from pocl.losses.divergences import LOSSES
from pocl.training.run_folder import RunFolder
from tests.runs import Folders, call, make_folders, train_arguments
from tests.tiny import ROOT

KEPT = ROOT / "tests" / "golden_curves.json"
_EASY = ("--difficulty", "length", "--num-dev", 0)
CASES: dict[str, tuple[object, ...]] = {name: (*_EASY, "--type", name) for name in LOSSES}
CASES |= {
    "sft": ("--type", "sft", "--curriculum", "whole-pool", "--num-stages", 1, "--epochs", 2, "--num-dev", 0),
    "selective": (*_EASY, "--type", "fkl", "--curriculum", "whole-pool", "--num-stages", 1, "--epochs", 2)
    + ("--selective-reliance", "linear"),
    "lora": (*_EASY, "--lora-rank", 4),
    "no-restarts": (*_EASY, "--restart-optimizer", "false"),
}


def curve(folders: Folders, output_dir: Path, name: str) -> list[list[float]]:
    """(loss, gradient norm) of each optimiser step of a case."""
    result = call(train, train_arguments(folders, output_dir, *CASES[name], teacher=name != "sft"))
    assert result.status == 0, result.output
    (path,) = output_dir.glob("*/seed10")
    records = RunFolder(path).read_metrics()
    return [[record["loss"], record["gradient_norm"]] for record in records if "loss" in record]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folders = make_folders(Path(folder) / "inputs", "gpt2")
        curves = {name: curve(folders, Path(folder) / name, name) for name in CASES}
    rows = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in curves.items()]
    KEPT.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
