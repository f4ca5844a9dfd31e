"""The main table on a tiny pair: one row of every kind of script is made; the others are commands of the plan.

The teacher goes through the one command that a user gives, and so through the launcher; the other six run the very
commands that their scripts print, in this process. scripts/tiny_table.sh makes all seventeen by hand.
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import evaluate
import train
from pocl.common.files import write_text
from tests.runs import call
from tests.scripts.test_scripts import planned
from tests.tiny import ROOT
from tests.tools.test_reproduce import PAPER
from tools import generate_seqkd, make_tables
from tools.reproducing.steps import ReproduceOptions, Reproduction, Step
from tools.rows import main_rows

LAUNCHED = ["teacher"]
MADE = ["teacher", "SFT", "SeqKD", "KLD", "KLD + POCL", "GKD", "GKD + POCL"]
OTHERS = {"RKLD": "rkl", "JSD": "jsd", "TVD": "tvd", "skew KLD": "sfkl", "reverse skew KLD": "srkl"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("DATA", "TEACHER", "STUDENT")}
ENVIRONMENT |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def tiny_flags() -> tuple[list[str], list[str]]:
    """The flags of train.py and of evaluate.py in scripts/tiny_table.sh."""
    text = (ROOT / "scripts" / "tiny_table.sh").read_text()
    words = shlex.split(text[text.index('"${ROWS[@]}"') :].replace("\\\n", " "))[1:]
    second = words.index("--", 1)
    return words[1:second], words[second + 1 :]


def lay_sample(base: Path) -> None:
    """Fewer and shorter records of the sample than tiny_table.sh would copy; the teacher answers all of them."""
    lines = (ROOT / "data" / "sample" / "raw.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    folder = base / "data" / "sample"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "data" / "sample" / "valid.jsonl", folder)
    write_text(folder / "raw.jsonl", "".join(sorted(lines, key=len)[:48]))


def run_printed(step: Step) -> None:
    """Run the command that a step's script prints, in this process."""
    environment = ENVIRONMENT | dict(step.environment) | {"DRY_RUN": "1"}
    command = ["bash", step.script, *step.flags]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    words = shlex.split(printed.stdout)
    program = next(word for word in words if word.endswith(".py"))
    module = {"train.py": train, "evaluate.py": evaluate, "generate_seqkd.py": generate_seqkd}[Path(program).name]
    result = call(module, words[words.index(program) + 1 :])
    assert result.status == 0, result.output
    step.note()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where seven rows were made."""
    base = tmp_path_factory.mktemp("table")
    lay_sample(base)
    command = ["bash", str(ROOT / "scripts" / "tiny_table.sh"), str(base), "--rows", *LAUNCHED]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    what = ReproduceOptions(
        family="gpt2", base_path=str(base), teacher=str(base / "none"), data="sample", seeds=[1, 2]
    )
    work = Reproduction(what, *tiny_flags())
    rows = [row for row in main_rows(matched=False) if row.name in MADE]
    for step in work.preparation(rows):
        assert step.is_done() == (step.name != "teacher text")  # the same command, or none yet
        if not step.is_done():
            run_printed(step)
    for row in rows:
        for step in work.steps_of(row):
            assert step.is_done() == (row.name in LAUNCHED), row.name
            if not step.is_done():
                run_printed(step)
    return base


def test_a_row_of_every_kind_of_script_runs_from_data_to_numbers(base: Path) -> None:
    scripts = {row.script for row in main_rows(matched=False)}
    made = [row for row in main_rows(matched=False) if row.name in MADE]
    assert {row.script for row in made} == scripts and len(made) == 7
    results = base / "results" / "gpt2"
    assert call(make_tables, ["--results", results, "--output", base / "table.md"]).status == 0
    text = (base / "table.md").read_text()
    assert "| KLD + POCL † |" in text  # an epoch of KLD has fewer updates
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()[2:]]
    assert [line[0].removesuffix(" †") for line in cells] == MADE
    assert all(float(line[1].split("<br>")[0]) >= 0 for line in cells)
    for row in made:
        run_folder = results / row.run / "seed10"
        assert json.loads((run_folder / "ledger.json").read_text())["finished"]
        assert len((run_folder / "eval" / "sample" / "1.jsonl").read_text().splitlines()) == 4


def test_the_plan_holds_the_commands_of_every_other_row(base: Path) -> None:
    result = planned("tiny_table.sh", base, cwd=base, DRY_RUN="1")
    assert result.status == 0, result.output
    lines = result.output.splitlines()
    to_do = [line for line in lines if not line.startswith("#")]
    assert len(lines) - len([line for line in lines if line.startswith("#   ")]) >= 1 + 2 * len(PAPER)
    train_flags, evaluate_flags = map(shlex.join, tiny_flags())
    wanted = []
    for divergence in OTHERS.values():
        for method, name in (("kd", divergence), ("pocl", f"t{divergence}")):
            run_folder = base / "results" / "gpt2" / method / name / "seed10"
            settings = f"DATA=sample TEACHER={base}/results/gpt2/teacher/sft/seed10/best"
            wanted.append(
                f"{settings} bash {ROOT}/scripts/gpt2/{method}/train.sh {base} --type {name} --seed 10 {train_flags}"
            )
            wanted.append(
                f"{settings} MODEL={run_folder}/best bash {ROOT}/scripts/gpt2/eval/run_eval.sh {base} --sets sample "
                f"--seeds 1 2 --output-dir {run_folder}/eval {evaluate_flags}"
            )
    assert to_do == wanted
    assert {*MADE, *OTHERS, *(f"{name} + POCL" for name in OTHERS)} == set(PAPER)
