"""What lies on a disk is neither deleted for something else, nor taken for it."""

import json
import multiprocessing
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch

import evaluate
import train
from tests.runs import (
    MAX_LENGTH,
    MAX_PROMPT,
    NUM_TRAIN,
    Folders,
    call,
    make_folders,
    train_arguments,
    train_until_stage,
)
from tests.tiny import save_model, tiny_model, tiny_tokenizer
from tools import generate_seqkd, make_student, process_data, report


def seqkd_arguments(folders: Folders, data: Path, output_dir: Path) -> list[object]:
    return ["--model", folders.teacher, "--data-dir", data, "--output-dir", output_dir, "--max-length", MAX_LENGTH]


def test_the_teachers_answers_replace_no_other_folder(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders.data, tmp_path / "gpt2" / "dolly")
    result = call(generate_seqkd, seqkd_arguments(folders, tmp_path / "gpt2" / "dolly", tmp_path / "gpt2"))
    assert result.status == 2 and "holds something else" in result.last_line
    assert (tmp_path / "gpt2" / "dolly" / "manifest.json").is_file()


def test_a_student_replaces_neither_a_run_nor_the_larger_model(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for place in (tmp_path / "run", folders.teacher):
        before = sorted(path.name for path in place.iterdir())
        result = call(make_student, ["--model", folders.teacher, "--num-layers", 1, "--output-dir", place])
        assert result.status == 2, result.output
        assert sorted(path.name for path in place.iterdir()) == before


def test_what_a_person_copied_beside_a_checkpoint_or_a_model_stays(folders: Folders, tmp_path: Path) -> None:
    arguments = train_arguments(folders, tmp_path, "--num-stages", 2, "--type", "sft", "--difficulty", "length")
    arguments = [word for word in arguments if word not in ("--teacher", str(folders.teacher))]
    train_until_stage(arguments, 1)
    run = tmp_path / "sft" / "seed10"
    tag = json.loads((run / "checkpoints" / "last.json").read_text())["tag"]
    copies = run / "checkpoints" / f"{tag}-keep", run / "best.old"
    for original, copy in zip((run / "checkpoints" / tag, run / "best"), copies, strict=True):
        shutil.copytree(original, copy)
    assert call(train, arguments).status == 0
    assert all(copy.is_dir() for copy in copies) and not (run / "checkpoints" / tag).exists()


def test_answers_in_another_precision_are_not_taken_for_those_that_are_there(folders: Folders, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id).to(torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "best")
    arguments = ["--model", tmp_path / "best", "--sets", "short", "--data-root", folders.data_root, "--seeds", 1]
    arguments += ["--max-length", MAX_LENGTH, "--max-prompt-length", 160]
    assert call(evaluate, [*arguments, "--dtype", "bf16"]).status == 0
    answers = (tmp_path / "eval" / "short" / "1.jsonl").read_bytes()
    result = call(evaluate, [*arguments, "--dtype", "fp32"])
    assert result.status == 2 and "(--dtype was bf16, is fp32)" in result.last_line, result.output
    assert (tmp_path / "eval" / "short" / "1.jsonl").read_bytes() == answers
    again = call(evaluate, [*arguments, "--dtype", "bf16"])
    assert again.status == 0 and "are there already" in again.output, again.output


def test_a_report_says_how_the_teachers_text_was_made_and_leaves_no_cache(folders: Folders, tmp_path: Path) -> None:
    data, made = tmp_path / "gold", tmp_path / "seqkd"
    shutil.copytree(folders.data, data)
    before = sorted(data.rglob("*"))
    assert call(generate_seqkd, seqkd_arguments(folders, data, made)).status == 0
    assert sorted(data.rglob("*")) == before
    assert len(datasets.load_from_disk(str(made / "train"))) == NUM_TRAIN
    arguments = train_arguments(folders, tmp_path, "--type", "sft", "--curriculum", "whole-pool", teacher=False)
    arguments[arguments.index("--data-dir") + 1] = str(made)
    assert call(train, [*arguments, "--num-stages", 1, "--num-dev", 0]).status == 0
    run = tmp_path / "sft" / "seed10"
    arguments = ["--model", run / "best", "--sets", "short", "--data-root", folders.data_root, "--seeds", 1]
    assert call(evaluate, [*arguments, "--max-length", MAX_LENGTH, "--max-prompt-length", 160]).status == 0
    assert call(report, ["--run", run, "--data-root", folders.data_root]).status == 0
    page = (run / "report.html").read_text()
    assert "tools/generate_seqkd.py" in page and "tools/process_data.py" not in page
    commands = " ".join(re.findall(r"<code>(deepspeed.*?)</code>", page, re.DOTALL))
    assert f"--data-root {folders.data_root}" in commands and "--generation-backend builtin" in commands


def test_processing_the_same_data_again_keeps_its_teacher_caches(tmp_path: Path) -> None:
    folders = make_folders(tmp_path, "gpt2")
    kept = folders.data / "teacher-cache" / "0123" / "states.bin"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"states")
    raw = folders.data_root / "short" / "raw.jsonl"
    command = ["--raw", raw, "--tokenizer", folders.student, "--output-dir", folders.data, "--num-workers", 1]
    command += ["--num-dev", 8, "--data-root", folders.data_root]
    assert call(process_data, [*command, "--max-prompt-length", MAX_PROMPT]).status == 0
    assert kept.read_bytes() == b"states"
    assert call(process_data, [*command, "--max-prompt-length", MAX_PROMPT - 1]).status == 0
    assert not kept.exists()  # of other texts


def test_sets_that_are_evaluated_at_the_same_time_are_all_in_the_summary(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_all, args=(tmp_path, f"set{i}")) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {f"set{i}": {"last": 9} for i in range(4)}


def write_all(folder: Path, name: str) -> None:
    for seed in range(10):
        evaluate.write_summary(folder, name, {"last": seed})


@pytest.mark.parametrize("has_room_at_first", [True, False])
def test_a_resumed_run_reads_its_teacher_as_it_did_before(
    tmp_path: Path, has_room_at_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever room the disk has by then: online and cached states may round differently."""
    folders = make_folders(tmp_path, "gpt2")
    full, empty = (type("Usage", (), {"free": free}) for free in (0, 10**9))
    short = ["--difficulty", "length", "--num-train", 16, "--num-stages", 2, "--num-dev", 0]
    arguments = train_arguments(folders, tmp_path / "out", *short)
    with monkeypatch.context() as patch:
        patch.setattr("pocl.cli.resolve.shutil.disk_usage", lambda path: empty if has_room_at_first else full)
        train_until_stage(arguments, 1)
    config = tmp_path / "out" / "tfkl" / "seed10" / "config.json"
    assert json.loads(config.read_text())["teacher_cache"] == has_room_at_first
    with monkeypatch.context() as patch:
        patch.setattr("pocl.cli.resolve.shutil.disk_usage", lambda path: full if has_room_at_first else empty)
        assert call(train, arguments).status == 0
    assert json.loads(config.read_text())["teacher_cache"] == has_room_at_first
    assert (folders.data / "teacher-cache").exists() == has_room_at_first
