"""Several nodes: the torchrun command, its refusals, two nodes on one machine against one, a node of a Slurm job."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.ranks import on_ranks
from tests.runs import Folders, read_jsonl, train_arguments
from tests.scripts import test_scripts
from tests.scripts.test_scripts import PLACES, fake, printed, run
from tests.tiny import ROOT

SCRIPT = "gpt2/pocl/train.sh"
NODE = ROOT / "scripts" / "slurm" / "node.sh"
JOB = ROOT / "scripts" / "slurm" / "train.sbatch"
SECOND = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}

four_gpus = test_scripts.four_gpus  # the fixture


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a job that the tests themselves run in."""
    for name in [*PLACES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


# The command.


def test_torchrun_starts_this_nodes_ranks(four_gpus: Path, tmp_path: Path) -> None:
    launcher = printed(SCRIPT, cwd=tmp_path, path=four_gpus, OMP_NUM_THREADS="3", **SECOND).launcher
    assert launcher[0] == "env" and launcher[1].startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")
    assert Path(launcher[2]).name == "torchrun"
    assert launcher[3:] == [
        *("--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "4"),
        *("--master_addr", "node0", "--master_port", "29500"),
    ]


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [({"NUM_GPUS": "2"}, "2"), ({"CUDA_VISIBLE_DEVICES": "3,1,0"}, "3"), ({"CUDA_VISIBLE_DEVICES": ""}, "1")],
    ids=str,
)
def test_a_node_has_the_ranks_that_it_is_told_or_shown(
    environment: dict[str, str],
    ranks: str,
    four_gpus: Path,
    tmp_path: Path,
) -> None:
    launcher = printed(SCRIPT, cwd=tmp_path, path=four_gpus, **SECOND, **environment).launcher
    assert launcher[launcher.index("--nproc_per_node") + 1] == ranks


def test_a_node_without_gpus_has_the_settings_of_the_cpu(tmp_path: Path) -> None:
    launcher = printed(SCRIPT, cwd=tmp_path, NUM_GPUS="2", MASTER_PORT="23456", **SECOND).launcher
    alone = printed(SCRIPT, cwd=tmp_path, NUM_GPUS="2").launcher
    assert Path(alone[alone.index("--num_accelerators") - 1]).name == "deepspeed"
    settings = [word for word in alone if "=" in word]
    assert {"DS_ACCELERATOR=cpu"} < set(settings) < set(launcher)
    assert any(word.startswith("OMP_NUM_THREADS=") for word in launcher)
    assert launcher[launcher.index("--nproc_per_node") + 1] == "2"
    assert launcher[launcher.index("--master_port") + 1] == "23456"


def test_one_node_is_what_it_was(tmp_path: Path) -> None:
    def launcher(**environment: str) -> list[str]:
        return printed(SCRIPT, cwd=tmp_path, MASTER_PORT="23456", **environment).launcher

    assert launcher(NNODES="1") == launcher(NNODES="") == launcher()
    assert launcher(NNODES="1", HOSTFILE="hosts") == launcher(HOSTFILE="hosts")
    alone = launcher(LAUNCHER="torchrun", NODE_RANK="0", MASTER_ADDR="here")
    assert alone[alone.index("--nnodes") + 1] == "1"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "0"}, "NNODES=0: it must be a whole number above 0"),
        ({"NNODES": "two"}, "NNODES=two: it must be a whole number above 0"),
        ({"NNODES": "1.5"}, "NNODES=1.5: it must be a whole number above 0"),
        ({"NODE_RANK": ""}, "NNODES=2 wants NODE_RANK, this node's number from 0 to 1"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: with NNODES=2 it must be a whole number from 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1: with NNODES=2 it must be a whole number from 0 to 1"),
        ({"NODE_RANK": "08"}, "NODE_RANK=08: with NNODES=2 it must be a whole number from 0 to 1"),
        ({"MASTER_ADDR": ""}, "NNODES=2 wants MASTER_ADDR, the name or address of node 0"),
        ({"HOSTFILE": "hosts"}, "NNODES and HOSTFILE are two ways to use several nodes; give one of them"),
        ({"NUM_GPUS": "none"}, "NUM_GPUS=none: it must be a whole number above 0"),
        ({"NUM_GPUS": "5"}, "NUM_GPUS=5, but 4 GPU(s) are visible here"),
    ],
    ids=str,
)
def test_what_a_node_is_told_wrong_is_one_line(
    environment: dict[str, str],
    message: str,
    four_gpus: Path,
    tmp_path: Path,
) -> None:
    for dry in ("0", "1"):
        result = run(SCRIPT, cwd=tmp_path, path=four_gpus, **(SECOND | environment | {"DRY_RUN": dry}))
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


# Slurm.


def in_slurm(node: int, nodes: int = 2) -> dict[str, str]:
    """What Slurm puts into the environment of a task."""
    numbers = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": str(nodes), "SLURM_NODEID": str(node)}
    return numbers | {"SLURM_JOB_NODELIST": "gpu[7-8]"}


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A folder whose scontrol names two hosts."""
    command = r'[[ "$*" == "show hostnames gpu[7-8]" ]] && printf "%s\n" gpu7 gpu8'
    return fake(tmp_path / "slurm-bin", "scontrol", command)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_node_knows_its_place(hosts: Path, tmp_path: Path, nodes: int) -> None:
    script = ROOT / "scripts" / SCRIPT
    arguments = [script, "--run-name", "two words"]
    environment = {"CUDA_VISIBLE_DEVICES": "", **in_slurm(nodes - 1, nodes)}
    command = printed(NODE, *arguments, cwd=tmp_path, path=hosts, **environment)
    place = command.launcher[command.launcher.index("--nnodes") :]
    assert place[:4] == ["--nnodes", str(nodes), "--node_rank", str(nodes - 1)]
    assert place[-4:] == ["--master_addr", "gpu7", "--master_port", str(20000 + 123456 % 12768)]
    assert command.arguments[-2:] == ["--run-name", "two words"]
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}
    launcher = printed(NODE, *arguments, cwd=tmp_path, path=hosts, **environment).launcher
    assert launcher[-4:] == ["--master_addr", "10.0.0.1", "--master_port", "23456"]


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {}, "the first argument must be a script"),
        (["nowhere.sh"], {}, "the first argument must be a script"),
        ([NODE], {"SLURM_NODEID": ""}, "SLURM_NODEID is not set; start this with srun"),
        ([NODE], {"SLURM_JOB_NODELIST": "?"}, "scontrol names no host of ?; give MASTER_ADDR"),
    ],
    ids=str,
)
def test_a_slurm_node_says_what_it_lacks(
    hosts: Path, tmp_path: Path, arguments: list[object], environment: dict[str, str], words: str
) -> None:
    result = run(NODE, *arguments, cwd=tmp_path, path=hosts, **(in_slurm(0) | environment))
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.mark.parametrize(
    ("sent", "ends", "status"),
    [
        ([], 0, 0),
        ([], 7, 7),
        ([signal.SIGUSR1], 1, 138),
        ([signal.SIGTERM], 1, 143),
        ([signal.SIGUSR1, signal.SIGTERM], 1, 138),
        ([signal.SIGUSR1], 0, 0),
    ],
    ids=str,
)
def test_a_slurm_node_passes_one_signal_on(
    hosts: Path, tmp_path: Path, sent: list[signal.Signals], ends: int, status: int
) -> None:
    """A script that notes each SIGTERM, and ends a moment after the first one; with no signal, at once."""
    script = tmp_path / "script.sh"
    script.write_text(
        "trap 'echo TERM >>noted' TERM\n"
        "touch started\n"
        "if [[ $1 == waits ]]; then until [[ -s noted ]]; do sleep 0.05; done; sleep 0.5; fi\n"
        f"exit {ends}\n"
    )
    environment = {**os.environ, **in_slurm(0), "PATH": f"{hosts}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", str(NODE), str(script), "waits" if sent else "ends"], cwd=tmp_path, env=environment
    )
    wait_for(lambda: (tmp_path / "started").exists(), process)
    for signum in sent:
        process.send_signal(signum)
        time.sleep(0.1)
    assert process.wait(timeout=20) == status
    assert not sent or (tmp_path / "noted").read_text() == "TERM\n"


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (138, True), (143, False)])
def test_a_slurm_job_is_queued_again_when_its_time_was_up(tmp_path: Path, status: int, again: bool) -> None:
    programs = fake(tmp_path / "bin", "srun", f'printf "%s\\n" "$@" >ran; exit {status}')
    fake(programs, "scontrol", 'echo "$*" >again')
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    result = run(JOB, "s.sh", "--run-name", "two words", cwd=tmp_path, path=programs, SLURM_JOB_ID="77")
    assert result.returncode == status, result.stderr
    assert (tmp_path / "ran").read_text().splitlines()[-5:] == [
        *("bash", "scripts/slurm/node.sh", "s.sh", "--run-name", "two words"),
    ]
    assert (tmp_path / "again").exists() == again
    assert not again or (tmp_path / "again").read_text() == "requeue 77\n"


def test_a_slurm_job_starts_in_the_projects_root(tmp_path: Path) -> None:
    result = run(JOB, "s.sh", cwd=tmp_path)
    assert result.returncode == 2 and "submit the job from the root of the project" in result.stderr


@pytest.mark.parametrize("path", [NODE, JOB], ids=lambda path: path.name)
def test_the_slurm_scripts_are_strict_and_parse(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail\n" in text
    assert max(map(len, text.splitlines())) <= 119
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


# Two nodes on this machine.


def wait_for(seen: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Until ``seen()``; fails where the process ends before."""
    deadline = time.monotonic() + 60
    while not seen():
        assert process.poll() is None, f"it ended with status {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(command: Sequence[object], log: Path, **environment: str) -> subprocess.Popen[str]:
    """A launcher in a session of its own, as on a machine of its own; what it says goes to ``log``."""
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open(log, "w") as file:
        return subprocess.Popen(
            ["bash", *map(str, command)],
            env=os.environ | settings | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def arguments_of_two_ranks(folders: Folders, output_dir: Path, *extra: object) -> list[object]:
    short = ["--num-train", 32, "--num-stages", 2, "--temperature", 1, 2, "--kd-ratio", 0.7, 1.0]
    return [ROOT / "scripts" / SCRIPT, *train_arguments(folders, output_dir, *short, *extra)]


def ended(processes: Sequence[subprocess.Popen[str]], log: Path) -> list[int]:
    """How they end; none of them is left behind."""
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for path in sorted(log.glob("*.log")):
            print(path.read_text())


def test_two_nodes_train_as_one_node_with_two_ranks(folders: Folders, tmp_path: Path) -> None:
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = arguments_of_two_ranks(folders, tmp_path / "two")
    nodes = [start(command, tmp_path / f"{rank}.log", NODE_RANK=str(rank), **place) for rank in (0, 1)]
    assert ended(nodes, tmp_path) == [0, 0]
    command = printed(*arguments_of_two_ranks(folders, tmp_path / "one"), cwd=tmp_path, NUM_GPUS="2")
    alone = on_ranks("train.py", command.arguments, num_ranks=2)
    assert alone.status == 0, alone.output

    two, one = (tmp_path / name / "tfkl" / "seed10" for name in ("two", "one"))
    rankings = [[record["id"] for record in read_jsonl(path / "difficulty.jsonl")] for path in (two, one)]
    assert rankings[0] == rankings[1] and len(rankings[0]) == 32
    for name in ("loss", "gradient_norm"):
        curves = [[r[name] for r in read_jsonl(path / "metrics.jsonl") if name in r] for path in (two, one)]
        assert len(curves[0]) == 6 and curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_slurm_nodes_save_when_their_time_is_up(folders: Folders, tmp_path: Path) -> None:
    hosts = fake(tmp_path / "bin", "scontrol", "echo 127.0.0.1")
    path = f"{hosts}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    extra = ["--difficulty", "length", "--epochs", 500, "--num-dev", 0, "--eval-every", 500]
    command = [NODE, *arguments_of_two_ranks(folders, tmp_path / "out", *extra)]
    environment = {"PATH": path, "MASTER_PORT": free_port()}
    nodes = [start(command, tmp_path / f"{rank}.log", **in_slurm(rank), **environment) for rank in (0, 1)]
    out = tmp_path / "out" / "tfkl" / "seed10"
    metrics = out / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, nodes[0])
    finally:
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        statuses = ended(nodes, tmp_path)
    assert statuses == [143, 143]
    assert "asked to stop: saved at step" in (tmp_path / "0.log").read_text()
    assert (out / "checkpoints" / "last.json").is_file()
