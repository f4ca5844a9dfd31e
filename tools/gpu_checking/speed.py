"""How fast: the benchmark of a pair beside what can be reached, and the paper's whole run at the measured rate."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pocl.common.files import ROOT, read_json
from pocl.curriculum.stages import baby_step
from tools.gpu_checking.lines import Check, Clock, NotChecked, Wrong, run_within

# Counted for a step of 64 examples of Dolly at an H200's rates (790 TFLOP/s in bf16, 4.3 TB/s), as docs/gpu-check.md
# explains: the papers' way of computing a step, and this project's, in ms. What no count exists for is not here.
COUNTED = {"gpt2": (293.0, 15.0), "opt": (474.0, 41.0)}
NUM_EXAMPLES, BATCH = 11_435, 64  # of the paper's run
ONLINE = "the last, teacher online"
SECONDS = 60.0


class Speed:
    """The benchmark's results by pair, once they are measured."""

    def __init__(self, folder: Path, device: torch.device, clock: Clock, rounds: int) -> None:
        self.folder, self.device, self.clock, self.rounds = folder, device, clock, rounds
        self.results: dict[str, dict[str, Any]] = {}

    def checks(self, pairs: list[str]) -> Iterator[Check]:
        """One line a pair, and the paper's run."""
        for pair in pairs:
            yield Check(f"benchmark of {pair}: losses and gradients agree", partial(self.measure, pair), SECONDS)
        yield Check("the paper's run, gpt2 124M from 1.5B", self.paper, 0.0, decides=False)

    def measure(self, pair: str) -> str:
        """The benchmark in a process of its own, which refuses to tell a speed where numbers differ."""
        output = self.folder / pair
        command = [sys.executable, ROOT / "tools" / "benchmark.py", "--pair", pair, "--output-dir", output]
        command += ["--device", self.device.type, "--rounds", self.rounds, "--no-memory", "--loss-tokens", 0]
        done = run_within(command, self.clock.left())
        if done.returncode:
            last = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
            if "out of memory" in done.stderr:
                raise NotChecked(last)
            raise Wrong(last)
        result = self.results[pair] = read_json(output / "benchmark.json")
        best, reference = _best(result), result["steps"][0]
        online = next(record for record in result["steps"] if record["name"] == ONLINE)
        counted = ""
        if pair in COUNTED:
            slow, fast = COUNTED[pair]
            counted = f"; counted for an H200: {slow:.0f} and {fast:.0f} ms, {slow / fast:.1f}x"
        return (
            f"{1e3 * median(reference['seconds']):.0f} ms as the papers' code, {1e3 * median(best['seconds']):.0f} ms "
            f"here, {best['speedup']:.1f}x ({online['speedup']:.1f}x with the teacher online), "
            f"{best['floor_share']:.0%} of the floor{counted}"
        )

    def paper(self) -> str:
        """What the paper's whole run would take at the rate that was measured."""
        if "gpt2" not in self.results:
            raise NotChecked("the gpt2 pair was not measured")
        result = self.results["gpt2"]
        steps = sum(stage.steps(BATCH) for stage in baby_step(NUM_EXAMPLES))
        batch = result["settings"]["batch"]
        step = median(_best(result)["seconds"]) * BATCH / batch
        online = next(record for record in result["steps"] if record["name"] == ONLINE)
        of_teacher = max(0.0, median(online["seconds"]) - median(_best(result)["seconds"])) / batch * NUM_EXAMPLES
        return (
            f"{steps} steps of {BATCH} at {1e3 * step:.0f} ms: {steps * step / 60:.1f} min on one device, and "
            f"{of_teacher / 60:.1f} min for the teacher's pass; without ranking, dev answers and checkpoints"
        )


def _best(result: dict[str, Any]) -> dict[str, Any]:
    """The record of the step with all ideas and the teacher cached."""
    return [record for record in result["steps"] if record["name"] != ONLINE][-1]
