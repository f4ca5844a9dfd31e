"""All seventeen rows of the main table, from data to numbers, on a tiny pair. Named to come first: it takes longest.

One row of every script goes through the launcher, by the one command that a user gives; the others run the very
commands that their scripts print, in this process. POCL_ALL_ROWS=1 takes the launcher for all of them, minutes more.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import evaluate
import train
from tests.runs import call
from tests.test_reproduce import PAPER
from tests.tiny import ROOT
from tools import make_tables
from tools.reproduce import ReproduceOptions, Reproduction, Step
from tools.rows import main_rows

LAUNCHED = ["teacher", "SFT", "SeqKD", "KLD", "KLD + POCL", "GKD"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("DATA", "TEACHER", "STUDENT")}
ENVIRONMENT |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def tiny_flags() -> tuple[list[str], list[str]]:
    """The flags of train.py and of evaluate.py in scripts/tiny_table.sh."""
    text = (ROOT / "scripts" / "tiny_table.sh").read_text()
    words = shlex.split(text[text.index('"${ROWS[@]}"') :].replace("\\\n", " "))[1:]
    second = words.index("--", 1)
    return words[1:second], words[second + 1 :]


def run_printed(step: Step) -> None:
    """Run the command that a step's script prints, in this process."""
    environment = ENVIRONMENT | dict(step.environment) | {"DRY_RUN": "1"}
    command = ["bash", step.script, *step.flags]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    words = shlex.split(printed.stdout)
    program = next(word for word in words if word.endswith(".py"))
    module = {"train.py": train, "evaluate.py": evaluate}[Path(program).name]
    result = call(module, words[words.index(program) + 1 :])
    assert result.status == 0, result.output


def test_all_seventeen_rows_from_data_to_numbers(tmp_path: Path) -> None:
    launched = PAPER if os.environ.get("POCL_ALL_ROWS") == "1" else LAUNCHED
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "tiny_table.sh"), str(tmp_path), "--rows", *launched],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    given = {"family": "gpt2", "base_path": str(tmp_path), "teacher": str(tmp_path / "none"), "data": "sample"}
    what = ReproduceOptions(**given, sets=["sample"], seeds=[1, 2])
    work, rows = Reproduction(what, *tiny_flags()), main_rows(matched=False)
    for row in rows:
        for step in work.steps_of(row):
            assert step.is_done() == (row.name in launched), row.name  # the same command, or none yet
            if not step.is_done():
                run_printed(step)
    results = tmp_path / "results" / "gpt2"
    assert "| KLD + POCL † |" in (results / "table-main.md").read_text()  # an epoch of KLD has fewer updates
    assert call(make_tables, ["--results", results, "--output", tmp_path / "table.md"]).status == 0
    table = (tmp_path / "table.md").read_text().split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [line[0].removesuffix(" †") for line in cells] == PAPER
    assert all(float(line[1].split("<br>")[0]) >= 0 for line in cells)
    for row in rows:
        run_folder = results / row.run / "seed10"
        assert json.loads((run_folder / "ledger.json").read_text())["finished"]
        assert len((run_folder / "eval" / "sample" / "1.jsonl").read_text().splitlines()) == 4
