"""Where a run writes: its own folder and the cache that it was given, and nowhere else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.runs import make_folders, train_arguments
from tests.tiny import ROOT

# Notes every file that is opened for writing, made, renamed to or removed, while train.py runs by each command.
PROGRAM = """
import json, os, sys
written = set()
def note(event, values):
    if event == "open" and not isinstance(values[0], int) and isinstance(values[2], int) \\
            and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.add(os.fsdecode(values[0]))
    elif event in ("os.remove", "os.rmdir"):
        if values[1] == -1:  # else by a folder's handle: part of a shutil.rmtree, which is noted
            written.add(os.fsdecode(values[0]))
    elif event in ("os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree"):
        written.add(os.fsdecode(values[0]))
    elif event in ("os.rename", "os.link", "os.symlink"):
        written.update(map(os.fsdecode, values[:2]))
sys.addaudithook(note)
import train
from pocl.cli.process import run_main
report, commands, found = sys.argv[1], json.loads(sys.argv[2]), []
for command in commands:
    sys.argv[1:] = command
    run_main(train.main)
    found.append(sorted(os.path.abspath(path) for path in written))
    written.clear()
open(report, "w").write(json.dumps(found))
"""


def test_a_run_writes_into_its_own_folder_and_its_cache_alone(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "inputs", "gpt2")
    inputs = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "inputs").rglob("*"))}
    adapters = ["--lora-rank", 2, "--keep-stages", "--teacher-cache", tmp_path / "cache"]
    commands = [
        train_arguments(folders, tmp_path / "results" / name, *extra, "--num-train", 24, "--num-stages", 2)
        for name, extra in (("lora", adapters), ("gkd", ["--on-policy", "mixed"]))
    ]
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "written.json"), json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ
        | {
            "DS_ACCELERATOR": "cpu",
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "scratch"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "scratch" / "inductor"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads((tmp_path / "written.json").read_text())
    for written, places in zip(found, (("results/lora", "cache"), ("results/gkd",)), strict=True):
        assert sum(path.startswith(str(tmp_path / places[0])) for path in written) > 20
        # home and scratch: caches of libraries, and temporary files.
        allowed = ("/dev/", "/proc/self/", *(str(tmp_path / name) for name in (*places, "home", "scratch")))
        made = str(tmp_path / "results")  # on the way to their own
        assert [path for path in written if not path.startswith(allowed) and path != made] == []
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "inputs").rglob("*"))} == inputs
