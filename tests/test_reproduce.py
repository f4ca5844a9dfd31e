"""The rows of the tables against their scripts, and how a table's steps are run; tests/test_all_rows.py runs them."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pocl import config as configuration
from pocl.curriculum import plan_stages
from pocl.errors import UserError
from pocl.files import write_json
from pocl.flags import parse
from tests.runs import Result, call
from tests.test_scripts import FAMILIES, Command, printed, run
from tools import reproduce
from tools.generate_seqkd import SeqKDOptions
from tools.generate_seqkd import check as check_seqkd
from tools.rows import SCALES, TABLES, Row, main_rows, table_rows

# Source: arXiv 2506.05695, the main table.
PAPER = ["teacher", "SFT", "SeqKD"]
PAPER += [
    row
    for name in ("KLD", "RKLD", "JSD", "TVD", "skew KLD", "reverse skew KLD", "GKD")
    for row in (name, f"{name} + POCL")
]


DATA_OF = {name: scale.data or "dolly" for name, scale in SCALES.items()}


def test_the_main_table_has_the_papers_seventeen_rows() -> None:
    assert [row.name for row in main_rows(matched=False)] == PAPER
    assert len(PAPER) == 17


@pytest.mark.parametrize("table", TABLES)
def test_no_two_rows_share_a_run(table: str) -> None:
    runs = [row.run for row in table_rows(table)]
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_a_command_whose_run_lies_where_the_row_says(
    family: str, table: str, matched: bool, tmp_path: Path
) -> None:
    for row in table_rows(table, matched=matched):
        flags = [flag.replace("{results}", str(tmp_path / "results" / family)) for flag in row.flags]
        command = printed(f"{family}/{row.script}", tmp_path, *flags, cwd=tmp_path, **dict(row.environment))
        config = configuration.parse_train(command.arguments)
        place = Path(config.run.output_dir) / config.loss.type
        assert place == tmp_path / "results" / family / row.run


def test_ablations_change_one_thing_of_pocl(tmp_path: Path) -> None:
    plain, *variants = table_rows("ablation")

    def values(row: Row) -> dict[str, Any]:
        config = configuration.parse_train(printed(f"gpt2/{row.script}", *row.flags, cwd=tmp_path).arguments)
        found = configuration.as_dict(config)
        return {f"{group}.{name}": value for group, part in found.items() for name, value in part.items()}

    wanted = {
        "2 subsets": {"curriculum.num_stages", "curriculum.epochs", "loss.temperature", "loss.kd_ratio"},
        "8 subsets": {"curriculum.num_stages", "curriculum.epochs", "loss.temperature", "loss.kd_ratio"},
        "hard to easy": {"curriculum.curriculum"},
        "random pools": {"curriculum.curriculum"},
        "no temperature ramp": {"loss.temperature"},
        "no ratio ramp": {"loss.kd_ratio"},
        "ROUGE-L alone": {"curriculum.difficulty"},
        "cross-entropy alone": {"curriculum.difficulty"},
    }
    reference = values(plain)
    for row in variants:
        changed = {name for name, value in values(row).items() if value != reference[name]}
        assert changed - {"run.output_dir"} == wanted[row.name]


def num_updates(command: Command, num_examples: int) -> int:
    """The optimiser steps of a printed command of train.py on so many examples."""
    config = configuration.parse_train(command.arguments)
    stages = plan_stages(
        num_examples,
        curriculum=config.curriculum.curriculum,
        num_stages=config.curriculum.num_stages,
        epochs=config.curriculum.epochs,
        temperature=config.loss.temperature or [1.0],
        kd_ratio=config.loss.kd_ratio or [1.0],
        first_look=config.curriculum.difficulty == ["snapshot"],
    )
    return sum(stage.steps(config.optimiser.global_batch_size) for stage in stages)


def test_subsets_make_the_number_of_updates_nearest_to_pocls_in_whole_epochs(tmp_path: Path) -> None:
    # 64 of Dolly's 11,435 examples an update; pools of i * 5,717 or i * 1,429, and all at last.
    two, eight = 89 + 178, 22 + 44 + 66 + 89 + 111 + 133 + 156 + 178
    assert abs(13 * two - 3552) < min(abs(12 * two - 3552), abs(14 * two - 3552))
    assert abs(4 * eight - 3552) < min(abs(3 * eight - 3552), abs(5 * eight - 3552))
    wanted = {row.name: 3552 for row in table_rows("ablation")} | {"2 subsets": 13 * two, "8 subsets": 4 * eight}
    found = {
        row.name: num_updates(printed(f"gpt2/{row.script}", *row.flags, cwd=tmp_path), 11_435)
        for row in table_rows("ablation")
    }
    assert found == wanted


def test_every_row_of_a_comparison_names_a_baseline_of_its_table() -> None:
    for table in TABLES:
        rows = {row.name: row.baseline for row in table_rows(table)}
        assert {baseline for baseline in rows.values() if baseline} <= set(rows)
    assert {row.baseline for row in table_rows("ablation")[1:]} == {"POCL"}
    assert {row.baseline for row in table_rows("selective")[1:]} == {"KD"}
    for row in table_rows("main"):
        assert row.baseline == (row.name.removesuffix(" + POCL") if row.name.endswith(" + POCL") else None)


RUN = subprocess.run


def reproduced(monkeypatch: pytest.MonkeyPatch, base: Path, statuses: dict[str, int], *arguments: object) -> Result:
    """Run the tool with scripts that do nothing but end as ``statuses`` say (by a word of their command)."""

    def script(command: list[str], *, stdout: Any = None, **more: Any) -> subprocess.CompletedProcess[str]:
        if more["env"].get("DRY_RUN") == "1":
            return RUN(command, stdout=stdout, **more)
        line = " ".join([*command, more["env"].get("MODEL", "")])
        status = next((status for word, status in statuses.items() if word in line), 0)
        if status:
            stdout.write("some talk\nerror: no room left\n")
        elif "run_eval" in line:
            folder = Path(command[command.index("--output-dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps({"dolly": {"rouge_l": {"seeds": {"1": 1.0}}}}))
            (folder / "dolly").mkdir(exist_ok=True)
            (folder / "dolly" / "1.jsonl").write_text('{"id": 0, "rouge_l": 1.0, "exact_match": 0.0}\n')
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(reproduce.subprocess, "run", script)
    places = ("--family", "gpt2", "--base-path", base)
    arguments = (*places, "--teacher", base / "checkpoints" / "gpt2" / "teacher-1.5B", *arguments)
    return call(reproduce, arguments)


def test_a_row_that_fails_is_told_and_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["--rows", "KLD", "RKLD", "SFT"]
    result = reproduced(monkeypatch, tmp_path, {"--type rkl": 1}, *rows)
    assert result.status == 1
    assert "RKLD: train FAILED" in result.output and "no room left" in result.output
    assert "1 of 3 rows failed" in result.last_line
    table = (tmp_path / "results" / "gpt2" / "table-main.md").read_text()
    assert "| SFT |" in table and "| KLD |" in table and "RKLD" not in table
    again = reproduced(monkeypatch, tmp_path, {}, *rows)
    assert again.status == 0, again.output
    assert "KLD: train is done" in again.output and "RKLD: train 0:00" in again.output
    other = reproduced(monkeypatch, tmp_path, {}, *rows, "--", "--lr", 1)
    assert "train is done" not in other.output  # another command
    assert "KLD: evaluate is done" in other.output


def test_the_papers_figures_stand_beside_its_own_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STUDENT", "TEACHER", "TEACHER_BASE", "TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    result = reproduced(monkeypatch, tmp_path, {}, "--rows", "SFT")
    assert result.status == 0, result.output
    text = (tmp_path / "results" / "gpt2" / "table-main.md").read_text()
    assert "paper 23.33" in text and "left out" not in result.output
    assert "dolly: 1 prompts here and 500 in the paper" in text


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--", "--num-train", "2000"], {}, "flags of train.py"),
        (["--", "--", "--num-examples", "9"], {}, "flags of evaluate.py"),
        (["--seeds", "10"], {}, "--seeds"),
        (["--train-seed", "11"], {}, "--train-seed"),
        (["--matched"], {}, "--matched"),
        (["--data", "mine"], {}, "--data"),
        (["--scale", "hour"], {}, "--scale"),
        ([], {"STUDENT": "mine"}, "STUDENT"),
        (["--teacher", "mine"], {}, "TEACHER"),
    ],
    ids=str,
)
def test_the_papers_figures_are_left_out_beside_any_other_setting(
    arguments: list[str],
    environment: dict[str, str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("STUDENT", "TEACHER", "TEACHER_BASE", "TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = reproduced(monkeypatch, tmp_path, {}, "--rows", "SFT", *arguments)
    assert result.status == 0, result.output
    assert "paper 23.33" not in (tmp_path / "results" / "gpt2" / "table-main.md").read_text()
    assert f"the paper's figures are left out: {told}" in " ".join(result.output.split())


def test_a_table_of_the_ablation_is_compared_with_pocl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, tmp_path, {}, "--table", "ablation", "--rows", "POCL", "random pools")
    assert result.status == 0, result.output
    text = (tmp_path / "results" / "gpt2" / "table-ablation.md").read_text()
    assert "against POCL, with Holm's correction" in text and "paper" not in text


@pytest.mark.parametrize("ledger", [None, {"finished": False}, {"finished": True}], ids=["begun", "half", "whole"])
def test_a_half_trained_teacher_of_this_table_is_trained_on_and_a_whole_one_is_evaluated_where_it_lies(
    ledger: dict[str, bool] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "results" / "gpt2" / "teacher" / "sft" / "seed10"
    (teacher / "best").mkdir(parents=True)
    write_json(teacher / "config.json", {})
    if ledger:
        write_json(teacher / "ledger.json", ledger)
    result = reproduced(monkeypatch, tmp_path, {}, "--rows", "teacher", "KLD", "--teacher", teacher / "best")
    assert result.status == 0, result.output
    trained = ledger is None or not ledger["finished"]
    assert ("preparation: train 0:00" in result.output) == trained
    assert (teacher / "eval" / "summary.json").is_file()
    assert not (tmp_path / "results" / "gpt2" / "teacher-evaluation").exists()


def test_a_teacher_from_elsewhere_is_evaluated_beside_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    result = reproduced(monkeypatch, tmp_path, {}, "--rows", "teacher", "--teacher", tmp_path / "theirs")
    assert result.status == 0 and "preparation: train" not in result.output, result.output
    assert (tmp_path / "results" / "gpt2" / "teacher-evaluation" / "summary.json").is_file()
    assert list((tmp_path / "theirs").iterdir()) == []


def test_without_a_teacher_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, tmp_path, {"sft/teacher.sh": 1}, "--rows", "KLD")
    assert result.status == 1 and "nothing can be trained without it: error: no room left" in result.last_line


def test_several_jobs_do_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, tmp_path, {"gkd": 1}, "--jobs", 3)
    assert result.status == 1 and "2 of 17 rows failed" in result.last_line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "KDL"], ["unknown row 'KDL'", "'KLD'"]),
        (["--table", "mian"], ["unknown --table", "'main'"]),
        (["--jobs", 0], ["--jobs is 0"]),
        (["--", "--", "--", "x"], ["'--'"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[object], words: list[str], tmp_path: Path) -> None:
    result = call(reproduce, ["--family", "gpt2", "--base-path", tmp_path, "--teacher", tmp_path, *arguments])
    assert result.status == 2
    assert all(word in result.last_line for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "environment"), [([], {"DRY_RUN": "1"}), (["--plan"], {})], ids=["dry", "plan"])
def test_a_plan_prints_every_command_and_does_nothing(
    flags: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    result = run("gpt2/reproduce.sh", tmp_path, "--rows", "SeqKD", *flags, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    scripts = [
        word.split("/scripts/gpt2/")[1]
        for line in result.stdout.splitlines()
        for word in line.split()
        if ".sh" in word
    ]
    assert scripts == [
        "tools/process_data.sh",
        "sft/teacher.sh",
        "seqkd/generate.sh",
        "seqkd/train.sh",
        "eval/run_eval.sh",
    ]
    assert "# 5 step(s) of a kind that has not run here" in result.stdout.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_the_time_that_steps_of_a_kind_took(tmp_path: Path) -> None:
    write_json(tmp_path / "results" / "gpt2" / "logs" / "times.json", {"kd/train.sh (full)": 3723.4})
    result = run("gpt2/reproduce.sh", tmp_path, "--rows", "KLD", "RKLD", cwd=tmp_path, DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    notes = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert notes[:2] == ["#   about 62:03, as kd/train.sh (full) took here"] * 2
    assert "4 step(s) of a kind that has not run here" in notes[2]  # data, teacher, two evaluations
    assert notes[3] == "# about 124:07 for the others, one after the other"


def test_a_table_is_started_on_one_node(tmp_path: Path) -> None:
    result = run("gpt2/reproduce.sh", tmp_path, cwd=tmp_path, NNODES="2", NODE_RANK="0", MASTER_ADDR="x", DRY_RUN="1")
    assert result.returncode == 2 and "start a table on one node" in result.stderr


@pytest.mark.parametrize("table", TABLES)
def test_tiny_rows_are_commands_of_about_as_many_updates(table: str, tmp_path: Path) -> None:
    scale, steps = SCALES["tiny"], {}
    for row in table_rows(table):
        flags = [flag.replace("{results}", str(tmp_path)) for flag in row.flags]
        flags += [*scale.train, *(scale.staged if row.staged else scale.unstaged)]
        command = printed(f"smollm2/{row.script}", *flags, cwd=tmp_path, **dict(row.environment))
        assert configuration.parse_train(command.arguments).optimiser.global_batch_size == 8
        steps[row.name] = num_updates(command, 64)
    # Eight subsets are more stages; a ranking by losses takes one look at all examples first.
    usual = {name: count for name, count in steps.items() if name not in ("2 subsets", "8 subsets")}
    assert set(usual.values()) <= {40, 48}


def test_smollm2_makes_the_whole_table_on_less_data_where_nothing_is_said(tmp_path: Path) -> None:
    for flags, less in (([], True), (["--scale", "full"], False)):
        result = run("smollm2/reproduce.sh", tmp_path, "--plan", *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        trained = [line for line in result.stdout.splitlines() if re.search(r"/smollm2/(sft/|\w+/train\.sh)", line)]
        trained = [line for line in trained if "run_eval.sh" not in line]
        assert len(trained) == len(table_rows("main"))  # the teacher's own among them
        assert all(("--num-train 1000" in line) == less for line in trained)


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_seqkd_trains_on_answers_of_its_own_scale(scale: str, tmp_path: Path) -> None:
    processed = tmp_path / "processed_data" / "smollm2"
    for other in {"full", "hour", "tiny"} - {scale}:  # are there already
        ending = "" if other == "full" else f"-{other}"
        for data in ("dolly", "sample"):
            write_json(processed / f"{data}-seqkd{ending}" / "manifest.json", {})
    result = run("smollm2/reproduce.sh", tmp_path, "--scale", scale, "--rows", "SeqKD", cwd=tmp_path, DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    steps = [line for line in result.stdout.splitlines() if "scripts/smollm2/seqkd/" in line]
    assert not any(line.startswith("#") for line in steps)
    written, trained = (shlex.split(line[line.index("/scripts/smollm2/") :]) for line in steps)
    made = printed(written[0].removeprefix("/scripts/"), *written[1:], cwd=tmp_path, DATA=DATA_OF[scale])
    (what,) = parse([SeqKDOptions], "", made.arguments)
    check_seqkd(what)
    command = printed(trained[0].removeprefix("/scripts/"), *trained[1:], cwd=tmp_path, DATA=DATA_OF[scale])
    config = configuration.parse_train(command.arguments)
    assert config.data.data_dir == what.output_dir
    assert (what.num_train, what.max_length) == (config.data.num_train, config.data.max_length)
    assert (what.num_train, what.max_length) == {"full": (None, 512), "hour": (1000, 384), "tiny": (64, 144)}[scale]


def test_the_selective_table_of_smollm2_can_be_planned_at_the_tiny_scale(tmp_path: Path) -> None:
    result = run("smollm2/reproduce.sh", tmp_path, "--table", "selective", "--scale", "tiny", "--plan", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stdout.splitlines() if "selective/train.sh" in line]) == 5


@pytest.mark.parametrize("scale", [name for name, scale in SCALES.items() if scale.train])
@pytest.mark.parametrize("row", table_rows("main"), ids=lambda row: row.name)
def test_the_flags_of_a_scale_are_flags_of_the_programs(scale: str, row: Row, tmp_path: Path) -> None:
    flags = [*SCALES[scale].train, *(SCALES[scale].staged if row.staged else SCALES[scale].unstaged)]
    if row.script:
        command = printed(f"smollm2/{row.script}", *row.flags, *flags, cwd=tmp_path, **dict(row.environment))
        assert configuration.parse_train(command.arguments).data.num_train == int(
            flags[flags.index("--num-train") + 1]
        )


def test_the_tiny_scale_asks_for_the_quickstarts_pair(tmp_path: Path) -> None:
    result = run("smollm2/reproduce.sh", tmp_path, "--scale", "tiny", cwd=tmp_path, DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("# done: ") for line in result.stdout.splitlines()]
    first, *others = [line for line in lines if not line.startswith("#")]
    assert first.endswith("scripts/quickstart.sh --pair")
    assert len(others) == 1 + 1 + 3 * 2  # data, the teacher's evaluation, three rows
    assert all("results/quickstart/teacher/sft/seed10/best" in line for line in others)


def test_rows_that_run_together_share_neither_port_nor_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    step = reproduce.Step("train", "x.sh", (), (("A", "1"),), Path("x"))
    for jobs, port in ((1, "29500"), (2, None)):
        slot = reproduce.slots(jobs)[0]
        made = reproduce.Reproduction.environment(mock.Mock(), step, slot)
        assert made.get("MASTER_PORT") == port and made["A"] == "1" and made["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("HOSTFILE", "hosts")
    with pytest.raises(UserError, match="HOSTFILE"):
        reproduce.slots(2)
