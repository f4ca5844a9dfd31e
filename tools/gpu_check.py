"""The first minutes on a new machine: does everything compute there what it must, and how fast?

    bash scripts/gpu_check.sh

Random weights, no hub. Prints a table, writes gpu_check.json, and says which lines this machine could not check. Exit
status 1 where something is wrong; speed decides nothing.
"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say, show_table
from pocl.common.errors import RunStopped, UserError
from pocl.common.files import write_json
from tools.benchmarking.pairs import PAIRS
from tools.gpu_checking import numbers
from tools.gpu_checking.lines import Check, Clock, run_checks
from tools.gpu_checking.runs import TinyRuns
from tools.gpu_checking.speed import Speed

PARTS = ("numbers", "runs", "speed")
PACKAGES = ("transformers", "deepspeed", "accelerate", "peft", "triton", "flash-attn", "vllm")


@dataclass(frozen=True)
class GpuCheckOptions:
    """What is checked, and for how long."""

    _argument_group_name: ClassVar[str] = "gpu_check"
    output_dir: str = flag("folder for gpu_check.json, and for the runs and benchmarks", "results/gpu_check")
    device: Literal["auto", "cpu", "cuda"] = flag("where; auto: the GPU where there is one", "auto")
    parts: list[str] = flag(f"what is checked: {', '.join(PARTS)}", list(PARTS), known=PARTS)
    pairs: list[str] = flag(f"shapes of student and teacher: {', '.join(PAIRS)}", ["gpt2", "smollm2"], known=PAIRS)
    zero: list[int] = flag("ZeRO stages that are run", [0, 1, 2, 3], at_least=0, at_most=3)
    vocabulary: int = flag("entries of the logits that divergences are compared on [tokens]", 50257, above=1)
    rounds: int = flag("timed steps of each variant of the benchmark [steps]", 3, above=0)
    minutes: float = flag("what takes longer than this is not begun, or stopped [minutes]", 10.0, above=0)

    def check(self) -> None:
        """Raise UserError for a GPU that is not there."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no GPU here; use --device cpu")


def main() -> None:
    """Check, print, write; end with status 1 where something is wrong."""
    quiet_libraries()
    (what,) = parse([GpuCheckOptions], "Check that this machine computes what it must, and how fast.")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if what.device == "auto" else what.device)
    # Half a minute for what ends a run and writes the table.
    clock, folder = Clock(60 * what.minutes - min(30, 6 * what.minutes)), Path(what.output_dir).resolve()
    machine = versions(device)
    say("; ".join(f"{name} {value}" for name, value in machine.items() if value))
    lines = run_checks(all_checks(what, device, folder, clock), clock)
    show_table("what was checked", ["", "check", "found", "s"], [_row(line) for line in map(vars, lines)])
    write_json(folder / "gpu_check.json", {"machine": machine, "lines": [line.record() for line in lines]})
    missed, wrong = ([line.name for line in lines if line.state == state] for state in ("not checked", "WRONG"))
    if missed:
        say(f"{len(missed)} of {len(lines)} lines could not be checked here: {'; '.join(missed)}")
    say(f"written to {folder}/gpu_check.json")
    if wrong:
        raise RunStopped(f"{len(wrong)} of {len(lines)} checks found something wrong: {'; '.join(wrong)}")


def _row(line: dict[str, Any]) -> list[str]:
    return [line["state"], line["name"], line["found"], f"{line['seconds']:.0f}"]


def all_checks(what: GpuCheckOptions, device: torch.device, folder: Path, clock: Clock) -> list[Check]:
    """The checks of the parts that were asked for, quick ones first."""
    found: list[Check] = []
    if "numbers" in what.parts:
        found += numbers.checks(device, what.pairs, what.vocabulary)
    if "runs" in what.parts:
        # Runs of an earlier call would be resumed: each call has a folder of its own.
        own = folder / f"runs-{os.getpid()}"
        batch = 8 * max(1, torch.cuda.device_count() if device.type == "cuda" else 1)
        found += TinyRuns(own, device, clock, batch).checks(what.zero)
    if "speed" in what.parts:
        found += Speed(folder / "benchmark", device, clock, what.rounds).checks(what.pairs)
    return found


def versions(device: torch.device) -> dict[str, str | None]:
    """What this machine runs, by name; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["CUDA"] = torch.version.cuda
    found["device"] = "CPU"
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        found["device"] = f"{len(names)} x {names[0]}, {memory:.0f} GB"
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    run_main(main)
