"""A run that is asked to stop finishes its step, saves, says how to go on, and ends as if it had never stopped."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from pocl.cli.process import run_main
from pocl.common.errors import Interrupted, UserError
from pocl.common.interrupt import Interrupt
from pocl.generation.decoding import BuiltIn
from pocl.training import checkpoints
from pocl.training.batches import BatchCutter, Texts
from pocl.training.run_folder import RunFolder
from tests.ranks import started
from tests.runs import Folders, call, read_jsonl, train_arguments
from tests.scripts.test_scripts import fake
from tests.tiny import ROOT

# Two stages of 1 and 3 steps.
SHORT = ("--num-train", 24, "--num-stages", 2)
ON_POLICY = (*SHORT, "--difficulty", "length", "--on-policy", "mixed", "--replay-buffer", 16, "--type", "tjsd")
ON_POLICY += ("--num-dev", 0)
RANKED_AGAIN = (*SHORT, "--rerank", "stage", "--eval-batch-size", 4)


def trained(folders: Folders, output_dir: Path, *extra: object) -> Path:
    """The folder of a run that came to its end."""
    result = call(train, train_arguments(folders, output_dir, *extra))
    assert result.status == 0, result.output
    (run,) = output_dir.glob("*/seed10")
    return run


@pytest.fixture(scope="module")
def on_policy(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    return trained(folders, tmp_path_factory.mktemp("on-policy"), *ON_POLICY)


@pytest.fixture(scope="module")
def ranked_again(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one."""
    return trained(folders, tmp_path_factory.mktemp("ranked-again"), *RANKED_AGAIN)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_in_the_middle_of_an_epoch(
    folders: Folders, on_policy: Path, tmp_path: Path, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = BatchCutter.cut

    def asked(self: BatchCutter, texts: Texts, step: int) -> object:
        if step == 2:
            os.kill(os.getpid(), signum)
        return cut(self, texts, step)

    with monkeypatch.context() as patch:
        patch.setattr(BatchCutter, "cut", asked)
        result = call(train, train_arguments(folders, tmp_path, *ON_POLICY))
    assert result.status == 128 + signum
    assert "asked to stop: saved at step 3 of 4" in result.last_line and "the same command resumes" in result.last_line
    run = trained(folders, tmp_path, *ON_POLICY)
    for name in ("best/model.safetensors", "ledger.json"):
        assert (run / name).read_bytes() == (on_policy / name).read_bytes()
    losses = [[r["loss"] for r in read_jsonl(path / "metrics.jsonl") if "loss" in r] for path in (run, on_policy)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("where", ["dev evaluation", "ranking again"])
def test_a_signal_while_examples_are_answered_loses_no_step(
    folders: Folders, ranked_again: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, calls = BuiltIn.__call__, 0
    of_stage_2 = 6 + 1 + 1  # 6 blocks rank, one is the dev evaluation of the first stage

    def asked(self: BuiltIn, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == (7 if where == "dev evaluation" else of_stage_2):
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(BuiltIn, "__call__", asked)
        result = call(train, train_arguments(folders, tmp_path, *RANKED_AGAIN))
    assert result.status == 143 and "asked to stop: saved at step " in result.last_line, result.output
    before = calls
    last = json.loads((tmp_path / "tfkl" / "seed10" / "checkpoints" / "last.json").read_text())
    assert last["position"]["step"] > 0
    assert (last["position"]["step_in_epoch"] > 0) == (where == "dev evaluation")
    assert before == (7 if where == "dev evaluation" else of_stage_2)  # the block that was on its way, and no more
    run = trained(folders, tmp_path, *RANKED_AGAIN)
    for name in ("best/model.safetensors", "ledger.json", "checkpoints/last.json", "difficulty-stage2.jsonl"):
        assert (run / name).read_bytes() == (ranked_again / name).read_bytes(), name
    keys = [
        [(r["step"], "loss" in r, r.get("dev_rouge_l")) for r in read_jsonl(path / "metrics.jsonl")]
        for path in (run, ranked_again)
    ]
    assert keys[0] == keys[1]


def test_a_best_student_that_is_gone_is_missed(folders: Folders, tmp_path: Path) -> None:
    arguments = train_arguments(folders, tmp_path, *SHORT, "--difficulty", "length")
    assert call(train, arguments).status == 0
    shutil.rmtree(tmp_path / "tfkl" / "seed10" / "best")
    result = call(train, arguments)
    assert result.status == 2 and "best is missing, the best student on dev (" in result.last_line, result.output


def test_a_disk_that_is_full_at_an_epochs_end_keeps_the_checkpoint_of_its_last_step(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["--type", "sft", "--curriculum", "whole-pool", "--num-stages", 1, "--epochs", 2, "--num-dev", 0]
    cut, whole = (train_arguments(folders, tmp_path / name, *extra, teacher=False) for name in ("cut", "whole"))
    cutter = BatchCutter.cut

    def asked(self: BatchCutter, texts: Texts, step: int) -> object:
        if step == 11:  # the last of the second epoch's six
            os.kill(os.getpid(), signal.SIGTERM)
        return cutter(self, texts, step)

    def full(path: Path, state: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(BatchCutter, "cut", asked)
        result = call(train, cut)
    assert result.status == 143 and "saved at step 12 of 12" in result.last_line, result.output
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_state", full)
        result = call(train, cut)
    assert result.status == 1 and "the checkpoint of step 12 is kept" in result.last_line, result.output
    for arguments in (cut, whole):
        result = call(train, arguments)
        assert result.status == 0, result.output
    for name in ("best/model.safetensors", "ledger.json", "checkpoints/last.json"):
        ends = [(tmp_path / run / "sft" / "seed10" / name).read_bytes() for run in ("cut", "whole")]
        assert ends[0] == ends[1], name
    assert len(list((tmp_path / "cut" / "sft" / "seed10" / "checkpoints").glob("step-*"))) == 1


def test_outside_of_training_signals_mean_what_they_meant() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's second one, at once: the same wish
        assert interrupt.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_later_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, pocl.common.interrupt as i\n"
        "i._DUPLICATE_SIGNAL_SECONDS = 0.0\n"
        "with i.Interrupt():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "print('still here')\n"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (130, "")


SCRIPT = ROOT / "scripts/gpt2/pocl/train.sh"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_script_passes_any_signal_on_to_what_the_launcher_has_started(
    tmp_path: Path, number: signal.Signals
) -> None:
    rank = "trap 'echo TERM >>noted; exit 1' TERM; touch started; while :; do sleep 0.05; done"
    launcher = fake(tmp_path / "bin", "deepspeed", f"bash -c {shlex.quote(rank)} & wait $!")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{launcher}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", str(SCRIPT)], cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert (tmp_path / "noted").read_text() == "TERM\n"


def test_a_script_passes_a_signal_on_and_its_ranks_stop_together(folders: Folders, tmp_path: Path) -> None:
    """DeepSpeed's launcher by itself dies of it, and leaves the ranks training."""
    extra = ["--difficulty", "length", "--epochs", 200, "--num-dev", 0, "--eval-every", 200]
    arguments = train_arguments(folders, tmp_path, *extra)
    given = {
        "STUDENT": str(folders.student),
        "TEACHER": str(folders.teacher),
        "DS_ACCELERATOR": "cpu",
        "NUM_GPUS": "2",
    }
    environment = os.environ | given | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *arguments]
    run = tmp_path / "tfkl" / "seed10"
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") > 3:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.2)
        status = process.wait(timeout=120)
        log.seek(0)
        output = log.read()
    assert status == 128 + signal.SIGTERM, output[-3000:]
    assert "asked to stop: saved at step" in output, output[-3000:]
    assert (run / "checkpoints" / "last.json").is_file()
    found = subprocess.run(["pgrep", "-f", f"train.py.*{tmp_path}"], capture_output=True, text=True)
    assert found.stdout == ""  # nobody trains on


def test_a_rank_that_dies_ends_the_others_within_a_minute(folders: Folders, tmp_path: Path) -> None:
    """Also where no launcher does it."""
    extra = ["--difficulty", "length", "--epochs", 200, "--num-dev", 0, "--eval-every", 200]
    metrics = tmp_path / "tfkl" / "seed10" / "metrics.jsonl"
    with started("train.py", train_arguments(folders, tmp_path, *extra), num_ranks=2) as (ranks, _):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.1)
        ranks[1].kill()
        ranks[0].join(60)
        assert ranks[0].exitcode not in (None, 0)


def test_the_error_of_one_rank_is_told_first_and_ends_the_others(folders: Folders, tmp_path: Path) -> None:
    arguments = train_arguments(folders, tmp_path, "--difficulty", "length", "--num-dev", 0)
    with started("tests/broken_rank.py", arguments, num_ranks=2) as (ranks, log):
        for rank in ranks:
            rank.join(60)
        assert all(rank.exitcode not in (None, 0) for rank in ranks)
        lines = log.read_text().splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d\]: \w+Error|error\b.*): ", line)]
    assert errors[:1] == ["[rank1]: ZeroDivisionError: a bug"], lines


@pytest.mark.parametrize(("rank", "waits", "told"), [("0", [], "error: "), ("1", [3], "error on rank 1: ")])
def test_a_mistake_that_one_rank_meets_is_told_where_rank_0_has_not_ended_it(
    rank: str, waits: list[int], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise UserError("no such file on this node")

    def stopped() -> None:
        raise Interrupted("asked to stop", signal.SIGTERM)

    slept: list[int] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("pocl.cli.process.time.sleep", slept.append)
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert (ended.value.code, slept) == (2, waits)
    assert capsys.readouterr().err == f"{told}no such file on this node\n"
    with pytest.raises(SystemExit) as ended:
        run_main(stopped)
    assert (ended.value.code, slept) == (143, waits)
    assert capsys.readouterr().err == ("error: asked to stop\n" if rank == "0" else "")


def test_a_folder_that_is_trained_in_is_refused(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "tfkl" / "seed10"
    with RunFolder(path).locked():
        result = call(train, train_arguments(folders, tmp_path))
    assert result.status == 2
    assert f"is being trained by process {os.getpid()}" in result.last_line and "--run-name" in result.last_line
    assert not (tmp_path / "tfkl").exists()  # nothing was written
    with RunFolder(path).locked():
        pass  # it was let go of


def test_a_dev_evaluation_that_fails_loses_no_epoch(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model trains and cannot answer, or where answers need more memory than there is."""

    def fails(*arguments: object, **options: object) -> dict[str, float]:
        raise MemoryError("no room for the answers")

    extra = [*SHORT, "--difficulty", "length"]
    with monkeypatch.context() as patch:
        patch.setattr("pocl.training.trainer.evaluate_dev", fails)
        with pytest.raises(MemoryError):
            call(train, train_arguments(folders, tmp_path / "cut", *extra))
    kept = json.loads((tmp_path / "cut" / "tfkl" / "seed10" / "checkpoints" / "last.json").read_text())
    assert (kept["position"]["epoch"], kept["position"]["step_in_epoch"]) == (0, 1)
    for name in ("cut", "whole"):
        result = call(train, train_arguments(folders, tmp_path / name, *extra))
        assert result.status == 0, result.output
    cut, whole = (tmp_path / name / "tfkl" / "seed10" for name in ("cut", "whole"))
    for name in ("best/model.safetensors", "ledger.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
