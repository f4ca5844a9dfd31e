"""The rows of the tables against their scripts, and how a table's steps are run; tests/test_all_rows.py runs them."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pocl.cli import checks as configuration
from pocl.cli.flags import parse
from pocl.cli.resolve import make_schedule
from pocl.common.errors import UserError
from pocl.common.files import write_json, write_text
from tests.runs import Result, call
from tests.scripts.test_scripts import FAMILIES, Command, planned, printed
from tests.tiny import ROOT
from tools import reproduce
from tools.generate_seqkd import SeqKDOptions
from tools.reproducing.steps import GIVEN, Step
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
        found = dataclasses.asdict(config)
        return {f"{group}.{name}": value for group, part in found.items() for name, value in part.items()}

    ramps = ("loss.temperature", "loss.kd_ratio")
    wanted = {
        "2 subsets": {"curriculum.num_stages", "curriculum.epochs", "loss.temperature", "loss.kd_ratio"},
        "8 subsets": {"curriculum.num_stages", "curriculum.epochs", "loss.temperature", "loss.kd_ratio"},
        "hard to easy": {"curriculum.curriculum"},
        "random pools": {"curriculum.curriculum"},
        "no temperature ramp": {"loss.temperature"},
        "no ratio ramp": {"loss.kd_ratio"},
        "ROUGE-L alone": {"curriculum.difficulty"},
        "cross-entropy alone": {"curriculum.difficulty"},
        "T = 1.5": {"loss.temperature"},
        "T = 2": {"loss.temperature"},
        "T falling": {"loss.temperature"},
        "r = 0.7": {"loss.kd_ratio"},
        "one cosine": {"curriculum.restart_optimizer"},
        "T = 1, one cosine": {"loss.temperature", "curriculum.restart_optimizer"},
        "whole pool, ramps and restarts": {"curriculum.curriculum", "curriculum.epochs"},
        "whole pool, restarts alone": {"curriculum.curriculum", "curriculum.epochs", *ramps},
        "steady": {"curriculum.restart_optimizer", *ramps},
        "pools alone, hard first": {"curriculum.curriculum", "curriculum.restart_optimizer", *ramps},
        "pools alone, random": {"curriculum.curriculum", "curriculum.restart_optimizer", *ramps},
        "same visits shuffled": {"curriculum.curriculum"},
        "pools alone, same visits shuffled": {"curriculum.curriculum", "curriculum.restart_optimizer", *ramps},
        "pools alone, constant rate": {"curriculum.restart_optimizer", "optimiser.lr_schedule", *ramps},
        "forward, then reverse KL": {"loss.type_of_stage"},
        "easiest three quarters": {"curriculum.keep_share", "curriculum.epochs"},
        "PACED weights": {"curriculum.difficulty", "loss.weighting"},
        "whole pool, PACED weights alone": {"curriculum.curriculum", "curriculum.epochs", "curriculum.difficulty"}
        | {"curriculum.restart_optimizer", "loss.weighting", *ramps},
    }
    reference = values(plain)
    for row in variants:
        if row.script != "pocl/train.sh":
            continue
        changed = {name for name, value in values(row).items() if value != reference[name]}
        assert changed - {"run.output_dir"} == wanted[row.name]


def num_updates(command: Command, num_examples: int) -> int:
    """The optimiser steps of a printed command of train.py on so many examples."""
    return make_schedule(configuration.parse_train(command.arguments), num_examples).total_steps


def test_subsets_make_the_number_of_updates_nearest_to_pocls_in_whole_epochs(tmp_path: Path) -> None:
    # 64 of Dolly's 11,435 examples an update; pools of i * 5,717 or i * 1,429, and all at last.
    two, eight = 89 + 178, 22 + 44 + 66 + 89 + 111 + 133 + 156 + 178
    assert abs(13 * two - 3552) < min(abs(12 * two - 3552), abs(14 * two - 3552))
    assert abs(4 * eight - 3552) < min(abs(3 * eight - 3552), abs(5 * eight - 3552))
    easiest = 33 + 67 + 100 + 134  # pools of i * 2,144: three quarters are 8,576 examples
    assert abs(11 * easiest - 3552) < min(abs(10 * easiest - 3552), abs(12 * easiest - 3552))
    wanted = {row.name: 3552 for row in table_rows("ablation")} | {"2 subsets": 13 * two, "8 subsets": 4 * eight}
    wanted |= {"easiest three quarters": 11 * easiest}
    whole = {name for name in wanted if name.startswith("whole pool")} | {"KLD, matched"}
    wanted |= dict.fromkeys(whole, 20 * 178) | {"KLD, its own batch and rate": 20 * (11_435 // 8)}
    found = {
        row.name: num_updates(printed(f"gpt2/{row.script}", *row.flags, cwd=tmp_path, **dict(row.environment)), 11_435)
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
SETS = ("dolly", "self-inst", "vicuna", "sinst/11_", "uinst/11_")


def bring(base: Path, *more: str) -> None:
    """What a table of gpt2 needs: data of these names beside the paper's, evaluation sets, the models' folders."""
    for name in ("dolly", *more):
        write_text(base / "data" / name / "raw.jsonl", "{}")
    for name in (*SETS, *more):
        write_text(base / "data" / name / "valid.jsonl", "{}")
    for name in ("base", "xlarge"):
        (base / "checkpoints" / "gpt2" / name).mkdir(parents=True, exist_ok=True)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base path that holds all of it, and an environment that names no models."""
    for name in ("STUDENT", "TEACHER", "TEACHER_BASE", "TOKENIZER", "DTYPE", "DATA"):
        monkeypatch.delenv(name, raising=False)
    bring(tmp_path, "mine")
    return tmp_path


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
    models = base / "checkpoints" / "gpt2"
    places = ("--family", "gpt2", "--base-path", base, "--student", models / "base")
    places += ("--teacher", models / "teacher-1.5B", "--teacher-base", models / "xlarge")
    arguments = (*places, *arguments)
    return call(reproduce, arguments)


def test_a_row_that_fails_is_told_and_keeps_no_other(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["--rows", "KLD", "RKLD", "SFT"]
    result = reproduced(monkeypatch, base, {"--type rkl": 1}, *rows)
    assert result.status == 1
    assert "RKLD: train FAILED" in result.output and "no room left" in result.output
    assert "1 of 3 rows failed" in result.last_line
    table = (base / "results" / "gpt2" / "table-main.md").read_text()
    assert "| SFT |" in table and "| KLD |" in table and "RKLD" not in table
    again = reproduced(monkeypatch, base, {}, *rows)
    assert again.status == 0, again.output
    assert "KLD: train is done" in again.output and "RKLD: train 0:00" in again.output
    other = reproduced(monkeypatch, base, {}, *rows, "--", "--lr", 1)
    assert "train is done" not in other.output  # another command
    assert "SFT: evaluate is done" in other.output  # KLD is another row now: the matched one


def test_the_papers_figures_stand_beside_its_own_setting(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
    assert result.status == 0, result.output
    text = (base / "results" / "gpt2" / "table-main.md").read_text()
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
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT", *arguments)
    assert result.status == 0, result.output
    assert "paper 23.33" not in (base / "results" / "gpt2" / "table-main.md").read_text()
    assert f"the paper's figures are left out: {told}" in " ".join(result.output.split())


def test_a_table_of_the_ablation_is_compared_with_pocl(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, base, {}, "--table", "ablation", "--rows", "POCL", "random pools")
    assert result.status == 0, result.output
    text = (base / "results" / "gpt2" / "table-ablation.md").read_text()
    assert "against POCL, with Holm's correction" in text and "paper" not in text


@pytest.mark.parametrize("ledger", [None, {"finished": False}, {"finished": True}], ids=["begun", "half", "whole"])
def test_a_half_trained_teacher_of_this_table_is_trained_on_and_a_whole_one_is_evaluated_where_it_lies(
    ledger: dict[str, bool] | None, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = base / "results" / "gpt2" / "teacher" / "sft" / "seed10"
    (teacher / "best").mkdir(parents=True)
    write_json(teacher / "config.json", {})
    if ledger:
        write_json(teacher / "ledger.json", ledger)
    result = reproduced(monkeypatch, base, {}, "--rows", "teacher", "KLD", "--teacher", teacher / "best")
    assert result.status == 0, result.output
    trained = ledger is None or not ledger["finished"]
    assert ("preparation: train 0:00" in result.output) == trained
    assert (teacher / "eval" / "summary.json").is_file()
    assert not (base / "results" / "gpt2" / "teacher-evaluation").exists()


def test_a_teacher_from_elsewhere_is_evaluated_beside_the_rows(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "theirs").mkdir()
    result = reproduced(monkeypatch, base, {}, "--rows", "teacher", "--teacher", base / "theirs")
    assert result.status == 0 and "preparation: train" not in result.output, result.output
    assert (base / "results" / "gpt2" / "teacher-evaluation" / "summary.json").is_file()
    assert list((base / "theirs").iterdir()) == []


@pytest.mark.parametrize("name", GIVEN)
def test_a_step_of_other_models_or_precision_is_not_taken_for_a_finished_one(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, done in (("one", False), ("one", True), ("the other", False)):
        monkeypatch.setenv(name, value)
        result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
        assert result.status == 0, result.output
        assert ("SFT: train is done" in result.output, "SFT: evaluate is done" in result.output) == (done, done)
    line = (base / "results" / "gpt2" / "logs" / "sft-train.log").read_text().splitlines()[0]
    assert f"{name}='the other'" in line


def test_a_step_can_be_pasted_with_the_models_that_it_had(tmp_path: Path) -> None:
    given = {"STUDENT": "my student", "TOKENIZER": "t", "TEACHER_BASE": "b", "DTYPE": "bf16", "DATA": "mine"}
    result = planned("gpt2/reproduce.sh", tmp_path, "--rows", "SFT", "--plan", cwd=tmp_path, **given)
    assert result.status == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "sft/base.sh" in line]
    settings = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
    assert settings == given | {"TEACHER": str(tmp_path / "results/gpt2/teacher/sft/seed10/best")}
    pasted = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"DRY_RUN": "1"}
    )
    words = shlex.split(pasted.stdout)
    config = configuration.parse_train(words[words.index(str(ROOT / "train.py")) + 1 :])
    assert (config.models.model, config.models.dtype) == ("my student", "bf16")


def test_answers_of_another_teacher_are_not_taken_for_this_ones(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (base / name).mkdir()
    answers = base / "processed_data" / "gpt2" / "dolly-seqkd"
    write_json(answers / "manifest.json", {})  # made by hand: taken as they are
    first = reproduced(monkeypatch, base, {}, "--rows", "SeqKD", "--teacher", base / "a")
    assert first.status == 0 and "preparation: teacher text is done" in first.output, first.output
    (answers / "manifest.json").unlink()
    made = reproduced(monkeypatch, base, {}, "--rows", "SeqKD", "--teacher", base / "a")
    assert made.status == 0 and "preparation: teacher text 0:00" in made.output, made.output
    write_json(answers / "manifest.json", {})  # as the script leaves it
    monkeypatch.setenv("STUDENT", str(base / "b"))  # another student changes no answer
    again = reproduced(monkeypatch, base, {}, "--rows", "SeqKD", "--teacher", base / "a")
    assert again.status == 0 and "preparation: teacher text is done" in again.output, again.output
    other = reproduced(monkeypatch, base, {}, "--rows", "SeqKD", "--teacher", base / "b")
    assert other.status == 2 and f"{answers} holds the answers of another command" in other.last_line, other.output


def test_a_few_rows_leave_the_others_in_the_files_and_show_their_own(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = base / "results" / "gpt2" / "table-main.md"
    names = ["SFT", "KLD", "KLD + POCL"]
    assert reproduced(monkeypatch, base, {}, "--rows", *names).status == 0
    whole = table.read_text()
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
    assert result.status == 0, result.output
    assert table.read_text() == whole and "paper 23.33" in whole
    shown = result.output[result.output.index("ROUGE-L: main table") : result.output.index("written to")]
    assert "SFT" in shown and "KLD" not in shown.split("Below each mean")[0]
    assert "with 2 earlier row(s)" in " ".join(result.output.split())
    # Other seeds of one row alone: all rows are there, and the paper's figures are not.
    assert reproduced(monkeypatch, base, {}, "--rows", "SFT", "--seeds", 1, "--matched", 0).status == 0
    text = table.read_text()
    assert all(f"| {name} |" in text for name in names) and "paper" not in text


def test_earlier_rows_of_another_setting_keep_the_papers_figures_away(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduced(monkeypatch, base, {}, "--rows", "KLD", "--matched", 0, "--", "--lr", 1).status == 0
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
    assert result.status == 0, result.output
    assert "left out: earlier rows (KLD)" in " ".join(result.output.split())
    assert "| KLD |" in (base / "results" / "gpt2" / "table-main.md").read_text()


def test_rows_of_another_student_are_not_in_the_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reproduced(monkeypatch, base, {}, "--rows", "KLD").status == 0
    monkeypatch.setenv("STUDENT", "another/student")
    assert reproduced(monkeypatch, base, {}, "--rows", "SFT").status == 0
    text = (base / "results" / "gpt2" / "table-main.md").read_text()
    assert "| SFT |" in text and "KLD" not in text


def test_earlier_rows_that_answered_other_prompts_are_left_out(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reproduced(monkeypatch, base, {}, "--rows", "KLD").status == 0
    answers = base / "results" / "gpt2" / "kd" / "fkl" / "seed10" / "eval" / "dolly" / "1.jsonl"
    answers.write_text(answers.read_text() + answers.read_text().replace('"id": 0', '"id": 1'))
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
    assert result.status == 0 and "earlier rows are left out: " in result.output, result.output
    text = (base / "results" / "gpt2" / "table-main.md").read_text()
    assert "| SFT |" in text and "KLD" not in text


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("data/dolly/raw.jsonl", "python tools/fetch.py data --sets dolly --data-root {base}/data"),
        ("data/uinst/11_/valid.jsonl", "python tools/fetch.py data --sets uinst --data-root {base}/data"),
        ("checkpoints/gpt2/base", "python tools/fetch.py models --names gpt2 --checkpoints-root {base}/checkpoints"),
        ("checkpoints/gpt2/xlarge", "python tools/fetch.py models --names gpt2-xl --checkpoints-root"),
        ("checkpoints/gpt2/xlarge", "python tools/fetch.py models --names teacher-gpt2-1.5B --checkpoints-root"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(
    gone: str, told: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base / gone
    path.rmdir() if path.is_dir() else path.unlink()
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
    assert result.status == 2, result.output
    assert "nothing was run: no " in result.last_line and str(path) in result.last_line
    assert told.format(base=base) in result.last_line
    assert not (base / "results").exists()
    plan = reproduced(monkeypatch, base, {}, "--rows", "SFT", "--plan")
    assert plan.status == 0 and told.format(base=base) in plan.output
    assert any(line.startswith("# missing: ") and str(path) in line for line in plan.output.splitlines())


def test_what_finished_steps_took_is_not_missed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reproduced(monkeypatch, base, {}, "--rows", "SFT").status == 0
    write_json(base / "processed_data" / "gpt2" / "dolly" / "manifest.json", {})
    shutil.rmtree(base / "data")
    shutil.rmtree(base / "checkpoints")
    result = reproduced(monkeypatch, base, {}, "--rows", "SFT")
    assert result.status == 0 and "SFT: evaluate is done" in result.output, result.output


def test_a_teacher_that_was_named_and_is_not_there_is_not_trained_instead(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER", str(base / "typo"))
    result = reproduced(monkeypatch, base, {}, "--rows", "KLD", "--teacher", base / "typo")
    assert result.status == 2 and f"TEACHER={base / 'typo'} is no folder" in result.last_line, result.output


@pytest.mark.parametrize("name", ["mine", "samsum", "sample", "self-inst"])
def test_other_data_is_evaluated_on_itself(name: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = reproduced(monkeypatch, base, {}, "--rows", "SFT", "--plan", "--data", name)
    (line,) = [line for line in plan.output.splitlines() if "run_eval.sh" in line]
    assert f"DATA={name} " in line and f" --sets {name} --seeds 10" in line
    given = reproduced(monkeypatch, base, {}, "--rows", "SFT", "--plan", "--data", name, "--sets", "vicuna")
    assert " --sets vicuna --seeds 10" in given.output
    ways = {"samsum": f"python tools/fetch_summaries.py --set samsum --data-root {base}/data"}
    ways |= {"sample": f"cp -r {ROOT}/data/sample {base}/data/", "self-inst": "python tools/fetch.py data --sets"}
    assert (ways[name] in plan.output) if name in ways else ("# missing" not in plan.output)


def test_matched_from_the_environment_is_the_tables_flag(tmp_path: Path) -> None:
    for flags, matched in (([], True), (["--matched", "0"], False)):
        result = planned("gpt2/reproduce.sh", tmp_path, "--rows", "KLD", "--plan", *flags, cwd=tmp_path, MATCHED="1")
        assert result.status == 0, result.output
        assert ("MATCHED=1 bash" in result.output) == matched
        assert ("kd-matched/fkl" in result.output) == matched


def test_rows_are_matched_unless_the_table_is_the_papers_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, matched in (([], False), (["--seeds", 1], True), (["--seeds", 1, "--matched", 0], False)):
        plan = reproduced(monkeypatch, base, {}, "--rows", "KLD", "--plan", *arguments)
        assert plan.status == 0, plan.output
        assert ("kd-matched/fkl" in plan.output) == matched, arguments


def test_every_training_seed_is_a_run_and_a_row_is_all_of_them(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["--rows", "teacher", "SFT", "--train-seeds", 10, 20, 30]
    result = reproduced(monkeypatch, base, {}, *rows)
    assert result.status == 0, result.output
    runs = base / "results" / "gpt2" / "sft" / "sft"
    assert sorted(folder.name for folder in runs.iterdir()) == ["seed10", "seed20", "seed30"]
    assert result.output.count("preparation: train 0:00") == result.output.count("teacher: evaluate 0:00") == 1
    text = (base / "results" / "gpt2" / "table-main.md").read_text()
    assert "mean of 3 training seeds" in text and "One training seed of teacher" in text and "paper" not in text
    again = reproduced(monkeypatch, base, {}, *rows)
    assert "SFT: train 0:00" not in again.output and again.output.count("SFT: train is done") == 3


def test_without_a_teacher_nothing_is_trained(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, base, {"sft/teacher.sh": 1}, "--rows", "KLD")
    assert result.status == 1 and "nothing can be trained without it: error: no room left" in result.last_line


def test_several_jobs_do_every_row(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = reproduced(monkeypatch, base, {"gkd": 1}, "--jobs", 3)
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
    result = planned("gpt2/reproduce.sh", tmp_path, "--rows", "SeqKD", *flags, cwd=tmp_path, **environment)
    assert result.status == 0, result.output
    scripts = [
        word.split("/scripts/gpt2/")[1]
        for line in result.output.splitlines()
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
    assert "# 5 step(s) of a kind that has not run here" in result.output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_the_time_that_steps_of_a_kind_took(tmp_path: Path) -> None:
    write_json(tmp_path / "results" / "gpt2" / "logs" / "times.json", {"kd/train.sh (full)": 3723.4})
    result = planned("gpt2/reproduce.sh", tmp_path, "--rows", "KLD", "RKLD", cwd=tmp_path, DRY_RUN="1")
    assert result.status == 0, result.output
    notes = [line for line in result.output.splitlines() if line.startswith("#")]
    assert notes[:2] == ["#   about 62:03, as kd/train.sh (full) took here"] * 2
    assert "4 step(s) of a kind that has not run here" in notes[2]  # data, teacher, two evaluations
    assert notes[3] == "# about 124:07 for the others, one after the other"


def test_a_table_is_started_on_one_node(tmp_path: Path) -> None:
    result = planned(
        "gpt2/reproduce.sh", tmp_path, cwd=tmp_path, NNODES="2", NODE_RANK="0", MASTER_ADDR="x", DRY_RUN="1"
    )
    assert result.status == 2 and "start a table on one node" in result.output


@pytest.mark.parametrize("table", TABLES)
def test_tiny_rows_are_commands_of_about_as_many_updates(table: str, tmp_path: Path) -> None:
    scale, steps = SCALES["tiny"], {}
    for row in table_rows(table):
        flags = [flag.replace("{results}", str(tmp_path)) for flag in row.flags]
        flags += [*scale.train, *(scale.staged if row.staged else scale.unstaged)]
        flags += ["--max-steps", str(scale.updates)] if row.own_epochs else []
        command = printed(f"smollm2/{row.script}", *flags, cwd=tmp_path, **dict(row.environment))
        assert configuration.parse_train(command.arguments).optimiser.global_batch_size == 8
        steps[row.name] = num_updates(command, 64)
    # Eight subsets are more stages; a ranking by losses takes one look at all examples first.
    usual = {name: count for name, count in steps.items() if name not in ("2 subsets", "8 subsets")}
    assert set(usual.values()) <= {40, 48}


def test_smollm2_makes_the_whole_table_on_less_data_where_nothing_is_said(tmp_path: Path) -> None:
    for flags, less in (([], True), (["--scale", "full"], False)):
        result = planned("smollm2/reproduce.sh", tmp_path, "--plan", *flags, cwd=tmp_path)
        assert result.status == 0, result.output
        trained = [line for line in result.output.splitlines() if re.search(r"/smollm2/(sft/|\w+/train\.sh)", line)]
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
    result = planned("smollm2/reproduce.sh", tmp_path, "--scale", scale, "--rows", "SeqKD", cwd=tmp_path, DRY_RUN="1")
    assert result.status == 0, result.output
    steps = [line for line in result.output.splitlines() if "scripts/smollm2/seqkd/" in line]
    assert not any(line.startswith("#") for line in steps)
    written, trained = (shlex.split(line[line.index("/scripts/smollm2/") :]) for line in steps)
    made = printed(written[0].removeprefix("/scripts/"), *written[1:], cwd=tmp_path, DATA=DATA_OF[scale])
    (what,) = parse([SeqKDOptions], "", made.arguments)
    command = printed(trained[0].removeprefix("/scripts/"), *trained[1:], cwd=tmp_path, DATA=DATA_OF[scale])
    config = configuration.parse_train(command.arguments)
    assert config.data.data_dir == what.output_dir
    assert (what.num_train, what.max_length) == (config.data.num_train, config.data.max_length)
    assert (what.num_train, what.max_length) == {"full": (None, 512), "hour": (1000, 384), "tiny": (64, 144)}[scale]


def test_the_selective_table_of_smollm2_can_be_planned_at_the_tiny_scale(tmp_path: Path) -> None:
    result = planned(
        "smollm2/reproduce.sh", tmp_path, "--table", "selective", "--scale", "tiny", "--plan", cwd=tmp_path
    )
    assert result.status == 0, result.output
    assert len([line for line in result.output.splitlines() if "selective/train.sh" in line]) == 5


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
    result = planned("smollm2/reproduce.sh", tmp_path, "--scale", "tiny", cwd=tmp_path, DRY_RUN="1")
    assert result.status == 0, result.output
    lines = [line.removeprefix("# done: ") for line in result.output.splitlines()]
    first, *others = [line for line in lines if not line.startswith("#")]
    assert first.endswith("scripts/quickstart.sh --pair")
    assert len(others) == 1 + 1 + 3 * 2  # data, the teacher's evaluation, three rows
    assert all("results/quickstart/teacher/sft/seed10/best" in line for line in others)


def test_rows_that_run_together_share_neither_port_nor_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    step = Step("train", "x.sh", (), (("A", "1"),), Path("x"))
    for jobs, port in ((1, "29500"), (2, None)):
        slot = reproduce.slots(jobs)[0]
        made = reproduce.Runner.environment(mock.Mock(), step, slot)
        assert made.get("MASTER_PORT") == port and made["A"] == "1" and made["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("HOSTFILE", "hosts")
    with pytest.raises(UserError, match="HOSTFILE"):
        reproduce.slots(2)
