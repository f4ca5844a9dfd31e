"""The check of a GPU machine, as far as a CPU goes: its lines, what decides the exit status, what it refuses."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pocl.common.errors import UserError
from tests.runs import Result, call
from tests.tiny import ROOT
from tools import benchmark, gpu_check
from tools.gpu_checking import numbers, runs, speed
from tools.gpu_checking.lines import Check, Clock, NotChecked, Wrong, run_checks, run_within

CPU = torch.device("cpu")


def here(command: Sequence[object], seconds: float) -> subprocess.CompletedProcess[str]:
    """``run_within`` in this process: one more would import everything again."""
    assert command[:2] == [sys.executable, ROOT / "tools" / "benchmark.py"] and seconds > 0
    result = call(benchmark, command[2:])
    return subprocess.CompletedProcess(list(command), result.status, "", result.output)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Result]:
    """gpu_check.json, and what was said, of numbers and speed on a tiny pair."""
    folder = tmp_path_factory.mktemp("gpu_check")
    flags = ["--device", "cpu", "--parts", "numbers", "speed", "--pairs", "micro", "--vocabulary", 300, "--rounds", 1]
    with mock.patch.object(speed, "run_within", here):
        result = call(gpu_check, [*flags, "--output-dir", folder])
    return json.loads((folder / "gpu_check.json").read_text()), result


def test_a_cpu_is_told_what_it_could_not_check(checked: tuple[dict[str, Any], Result]) -> None:
    told, result = checked
    assert result.status == 0, result.output
    states = {line["name"]: line["state"] for line in told["lines"]}
    missed = [name for name, state in states.items() if state == "not checked"]
    of_kernel = [f"the kernel against float64, {dtype}, all divergences" for dtype in ("fp32", "bf16", "fp16")]
    assert missed == [*of_kernel, "the paper's run, gpt2 124M from 1.5B"]
    assert set(states.values()) == {"ok", "not checked"}
    assert f"4 of {len(states)} lines could not be checked here: {'; '.join(missed)}" in result.output
    assert told["machine"]["torch"] == torch.__version__ and told["machine"]["device"] == "CPU"


def test_the_speed_of_a_pair_is_told_once_its_numbers_agree(checked: tuple[dict[str, Any], Result]) -> None:
    line = next(line for line in checked[0]["lines"] if line["name"].startswith("benchmark of micro"))
    assert "ms as the papers' code" in line["found"] and "of the floor" in line["found"]


def test_a_divergence_that_is_off_is_named() -> None:
    def off(*given: Any) -> tuple[torch.Tensor, ...]:
        loss, cross_entropy, divergence, gradient = numbers.by_torch(*given)
        return loss, cross_entropy, divergence, gradient * 1.01

    with pytest.raises(Wrong, match=r"fkl: .*gradient 1\.0e-02 \(allowed 1e-04\)"):
        numbers.compare_objectives(off, CPU, torch.float32, 50)


def test_nan_is_wrong() -> None:
    def broken(*given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensor * float("nan") for tensor in numbers.by_torch(*given))

    with pytest.raises(Wrong, match="values nan apart"):
        numbers.compare_objectives(broken, CPU, torch.float32, 50)


def test_the_kernel_passes_its_check_where_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(numbers, "never_fused", lambda *given: None)
    monkeypatch.setattr(numbers, "NUM_TOKENS", 2)
    assert "50 entries" in numbers.compare_objectives(numbers.by_kernel, CPU, torch.float16, 50)


def _raise(error: Exception) -> str:
    raise error


@pytest.mark.parametrize(
    ("error", "state", "found"),
    [
        (NotChecked("no GPU"), "not checked", "no GPU"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not checked", "out of memory: CUDA out of memory"),
        (subprocess.TimeoutExpired("x", 1), "not checked", "the time was up; give more --minutes"),
        (Wrong("0.5 apart"), "WRONG", "0.5 apart"),
        (UserError("`dtype` fp8 is unknown"), "WRONG", "--dtype fp8 is unknown"),
        (RuntimeError("CUDA error"), "WRONG", "RuntimeError: CUDA error"),
    ],
)
def test_a_line_says_how_its_check_ended(error: Exception, state: str, found: str) -> None:
    (line,) = run_checks([Check("it", lambda: _raise(error))], Clock(60))
    assert (line.state, line.found) == (state, found)


def test_what_takes_longer_than_what_is_left_is_not_begun() -> None:
    lines = run_checks([Check("a", lambda: _raise(AssertionError()), least=9.0), Check("b", lambda: "fine")], Clock(5))
    assert [(line.name, line.state) for line in lines] == [("a", "not checked"), ("b", "ok")]


def test_what_a_command_has_started_ends_with_it_when_the_time_is_up() -> None:
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_within(["bash", "-c", "sleep 60 & sleep 60; wait"], 1.0)  # the first one would hold the output open
    assert time.monotonic() - started < 20
    assert run_within(["bash", "-c", "echo out; echo err >&2; exit 3"], 20.0).returncode == 3


def test_what_is_wrong_decides_the_exit_status_and_speed_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, wrong = Check("slow", lambda: "1.0x", decides=False), Check("bad", lambda: _raise(Wrong("it is")))
    for checks, status in (([told], 0), ([told, wrong], 1)):
        monkeypatch.setattr(gpu_check, "all_checks", lambda *given, found=checks: found)
        result = call(gpu_check, ["--device", "cpu", "--output-dir", tmp_path])
        assert result.status == status, result.output
    assert result.last_line == "error: 1 of 2 checks found something wrong: bad"
    lines = json.loads((tmp_path / "gpu_check.json").read_text())["lines"]
    assert [(line["name"], line["state"]) for line in lines] == [("slow", "told"), ("bad", "WRONG")]


class Scripted(runs.TinyRuns):
    """Runs that are not made: each gives the next losses, or fails with the next line."""

    script: list[list[float] | str]

    def _train(self, student: Path, stage: int, dtype: str) -> subprocess.CompletedProcess[str]:
        found = self.script.pop(0)
        if isinstance(found, str):
            return subprocess.CompletedProcess([], 2, "", f"noise\n{found}\nnoise\n")
        run = self._output(stage, dtype, student.name) / "tfkl" / "seed10"
        run.mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(found, start=1)]
        (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "dev_rouge_l": 1.0}', ""]))
        return subprocess.CompletedProcess([], 0, "", "")


def test_a_run_must_follow_the_first_ones_losses(tmp_path: Path) -> None:
    tiny = Scripted(tmp_path, CPU, Clock(60), 8)
    tiny.script = [[2.0, 1.0], [2.0, 1.0005], [2.0, 1.1], [2.0], "error: no room"]
    assert tiny.follow(0, "fp32", 1e-3).startswith("2 steps, loss 2.000 to 1.000, which the other")
    assert "up to 5.0e-04" in tiny.follow(1, "fp32", 1e-3)
    for stage, words in ((2, "losses up to 1.0e-01"), (3, "1 steps, the first run took 2"), (1, "error: no room")):
        with pytest.raises(Wrong, match=words):
            tiny.follow(stage, "bf16", 1e-3)
    with pytest.raises(NotChecked, match="fp16 needs a GPU"):
        tiny.follow(1, "fp16", 1e-3)


def test_the_papers_run_is_its_steps_times_the_measured_rate(tmp_path: Path) -> None:
    measured = speed.Speed(tmp_path, CPU, Clock(60), 1)
    steps = [("reference", 9.0), ("all", 0.5), (speed.ONLINE, 0.7)]
    records = [{"name": name, "seconds": [seconds] * 3} for name, seconds in steps]
    measured.results["gpt2"] = {"settings": {"batch": 32}, "steps": records}
    # A step of 64 takes 1 s, so 3,552 take 59.2 min; the teacher 0.2 s for 32, so 71.5 s for 11,435 examples.
    assert measured.paper().startswith(
        "3552 steps of 64 at 1000 ms: 59.2 min on one device, and 1.2 min for the teach"
    )


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call(gpu_check, ["--device", "cuda"])
    assert (result.status, result.last_line) == (2, "error: --device cuda: there is no GPU here; use --device cpu")
