"""From raw conversations to a table in a model's own template: one prompt and one idea of an end everywhere."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import evaluate
import train
from pocl.common.files import read_json, write_json, write_jsonl
from pocl.data.dataset import load_split, read_manifest, template_of
from pocl.data.templates import FILE, Template, saved_template
from pocl.difficulty import ranking, student
from pocl.difficulty.ranking import column_named, ranked_columns
from pocl.evaluation.metrics import METRICS
from pocl.generation.decoding import Decoder
from pocl.models.student import Student
from pocl.training.batches import BatchCutter, GlobalBatch, Texts
from tests.chat import chat_tokenizer
from tests.runs import Folders, call, read_jsonl, train_arguments
from tests.tiny import ROOT, save_pair
from tools import generate_seqkd, make_student, make_tables, process_data

KIND, END = "smollm2", "<|im_end|>"
MAX_PROMPT, MAX_LENGTH = 200, 224
OWN = "tests.chat:brevity"
BY_CHRF = ("--select-by", "chrf", "--difficulty", "chrf", OWN, "cross-entropy")


def conversation(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, str]]:
    turns = [(record["instruction"], record["output"]) for record in (one, other)]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A pair with a chat template, and conversations of two turns that were processed with it."""
    root = tmp_path_factory.mktemp("chat")
    folders = Folders(root / "student", root / "teacher", root / "processed", root / "data")
    save_pair("llama", folders.student, folders.teacher, chat_tokenizer(KIND))
    records = [r for r in read_jsonl(ROOT / "data" / "sample" / "raw.jsonl") if not r["input"]]
    records = sorted(records, key=lambda record: len(record["instruction"] + record["output"]))[:60]
    raw = [{"messages": conversation(*records[i : i + 2])} for i in range(0, 60, 2)]
    write_jsonl(folders.data_root / "talk" / "raw.jsonl", raw)
    write_jsonl(folders.data_root / "talk" / "valid.jsonl", raw[:3])
    result = processed(folders, folders.data)
    assert result.status == 0, result.output
    assert "the template is chat" in result.output and f"an answer ends with {END}" in result.output
    assert f"{END}⟧" in result.output and f"{END} ⟧" in result.output  # the first example, as text and as tokens
    return folders


def processed(folders: Folders, output_dir: Path, *extra: object) -> Any:
    command = ["--raw", folders.data_root / "talk" / "raw.jsonl", "--tokenizer", folders.student, "--num-workers", 1]
    command += ["--output-dir", output_dir, "--num-dev", 4, "--max-prompt-length", MAX_PROMPT]
    return call(process_data, [*command, "--data-root", folders.data_root, *extra])


def trained(folders: Folders, output_dir: Path, *extra: object) -> Any:
    command = train_arguments(folders, output_dir, "--max-length", MAX_LENGTH, "--num-stages", 2, *extra)
    return call(train, [*command, "--num-train", 24])


def evaluated(folders: Folders, model: Path, *extra: object) -> Any:
    command = ["--model", model, "--data-root", folders.data_root, "--sets", "talk", "--seeds", 1]
    return call(evaluate, [*command, "--max-length", MAX_LENGTH, "--max-prompt-length", MAX_PROMPT, *extra])


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    """What every ``Decoder`` was made with: prompts and end tokens."""
    return []


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """The student's own texts that were trained on."""
    return []


@pytest.fixture(scope="module")
def run(chat: Folders, tmp_path_factory: pytest.TempPathFactory, asked: list[Any], texts: list[list[int]]) -> Path:
    """A run that ranks, trains on its own text, evaluates on dev and answers the test set."""
    init, cut = Decoder.__init__, BatchCutter.cut

    def watched(self: Decoder, model: Any, prompts: Any, ids: Any, sampling: Any, eos_ids: Any) -> None:
        init(self, model, prompts, ids, sampling, eos_ids)
        asked.append(([list(prompt) for prompt in prompts], list(eos_ids)))

    def seen(self: BatchCutter, chosen: Texts, step: int) -> GlobalBatch:
        texts.extend(text for text in chosen.responses if text is not None)
        return cut(self, chosen, step)

    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__init__", watched)
        patch.setattr(BatchCutter, "cut", seen)
        for result in (
            trained(chat, folder, "--type", "tjsd", "--on-policy", "mixed", "--mixed-alpha", 1, *BY_CHRF),
            evaluated(chat, folder / "tjsd" / "seed10" / "best", "--metrics", "chrf", OWN),
        ):
            assert result.status == 0, result.output
    for known in (METRICS, student.COLUMNS, ranking.COLUMNS):  # the other tests do not know it
        known.pop("brevity")
    for known in (student.SIGNALS, ranking.SIGNALS):
        known.pop(OWN)
    return folder / "tjsd" / "seed10"


def test_ends_are_one_idea_in_ranking_training_dev_and_test(
    chat: Folders, run: Path, asked: list[Any], texts: list[list[int]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat.student)
    end = tokenizer.convert_tokens_to_ids(END)
    assert len(asked) > 6 and all(ends == sorted({tokenizer.eos_token_id, end}) for _, ends in asked)
    data = load_split(chat.data, "train", max_length=MAX_LENGTH)
    assert all(ids[-1] == end and ids.count(end) == 1 for ids in data.column("response_ids"))
    longest = MAX_LENGTH - MAX_PROMPT
    assert len(texts) >= 24
    for text in texts:
        assert (text[-1] == end) == (end in text) and (end in text or len(text) == longest)
    best = Student.load(str(run / "best"))
    assert best.template.ends == (END,) and end in best.end_ids
    assert read_json(run / "best" / "generation_config.json")["eos_token_id"] == sorted({tokenizer.eos_token_id, end})


def test_the_test_set_is_asked_as_the_template_asks_without_being_told(
    chat: Folders, run: Path, asked: list[Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat.student)
    records = read_jsonl(chat.data_root / "talk" / "valid.jsonl")
    wanted = [
        tokenizer.apply_chat_template(r["messages"][:-1], add_generation_prompt=True, return_dict=False)
        for r in records
    ]
    assert sorted(wanted) == sorted(asked[-1][0])
    summary = read_json(run / "eval" / "summary.json")
    assert summary["talk"]["protocol"]["template"].startswith("chat, Jinja ")
    result = call(make_tables, ["--rows", f"POCL={run}", "--output", run / "table.md"])
    assert result.status == 0 and "POCL" in (run / "table.md").read_text(), result.output


def test_other_metrics_rank_and_choose_and_one_of_the_users_own_is_kept(run: Path) -> None:
    records = read_jsonl(run / "difficulty.jsonl")
    assert {(record["id"] % 2 + 1, record["turn"]) for record in records} == {(1, 1), (2, 2)}  # two answers a record
    by_chrf = sorted(records, key=lambda record: (-record["chrf"], record["id"]))
    assert [record["chrf_rank"] for record in by_chrf] == list(range(1, len(records) + 1))
    mine = sorted(records, key=lambda record: (-record["brevity"], record["id"]))
    assert [record["brevity_rank"] for record in mine] == list(range(1, len(records) + 1))
    assert all(record["brevity"] == 1 / (1 + len(record["answer"])) for record in records)
    fused = [sum(1 / (60 + r[f"{by}_rank"]) for by in ("chrf", "brevity", "cross_entropy")) for r in records]
    assert fused == sorted(fused, reverse=True)
    assert set(ranked_columns(records)) == {"chrf", "brevity", "cross_entropy"}
    assert column_named("brevity").label == "brevity"  # which the report shows without knowing the function
    dev = [record["dev_chrf"] for record in read_jsonl(run / "metrics.jsonl") if "dev_chrf" in record]
    assert max(dev) == read_json(run / "checkpoints" / "last.json")["position"]["best_score"]
    (record, *_) = read_jsonl(run / "eval" / "talk" / "1.jsonl")
    assert record["brevity"] == 100.0 / (1 + len(record["answer"]))
    assert "brevity" in read_json(run / "eval" / "summary.json")["talk"]


def test_the_template_lies_in_best_and_goes_with_a_cut_student(chat: Folders, run: Path, tmp_path: Path) -> None:
    wanted = template_of(read_manifest(chat.data))
    assert saved_template(run / "best") == wanted and wanted.jinja == chat_tokenizer(KIND).chat_template
    result = call(make_student, ["--model", run / "best", "--layers", 0, "--output-dir", tmp_path / "cut"])
    assert result.status == 0 and saved_template(tmp_path / "cut") == wanted, result.output


def test_another_template_is_refused_with_both_named(chat: Folders, run: Path, tmp_path: Path) -> None:
    plain = replace(chat, data=tmp_path / "plain")
    assert processed(chat, plain.data, "--template", "plain", "--turns", "first").status == 0
    best = run / "best"
    for result in (
        evaluated(chat, best, "--template", "plain"),
        evaluated(chat, best, "--train-data", plain.data),
        processed(replace(chat, student=best), tmp_path / "other", "--template", "alpaca", "--turns", "first"),
        trained(replace(plain, student=best), tmp_path / "r"),
        trained(replace(plain, teacher=best), tmp_path / "r"),
    ):
        assert result.status == 2 and result.last_line.startswith("error: "), result.output
        assert ("plain" in result.last_line or "alpaca" in result.last_line) and "chat, Jinja" in result.last_line
    again = processed(replace(chat, student=best), tmp_path / "again")
    assert again.status == 0 and template_of(read_manifest(tmp_path / "again")) == saved_template(best)


def test_a_teachers_answers_end_as_the_template_does(chat: Folders, tmp_path: Path) -> None:
    command = ["--model", chat.teacher, "--data-dir", chat.data, "--output-dir", tmp_path / "seqkd", "--num-train", 16]
    result = call(generate_seqkd, [*command, "--max-length", MAX_LENGTH, "--eval-batch-size", 16])
    assert result.status == 0, result.output
    end = AutoTokenizer.from_pretrained(chat.student).convert_tokens_to_ids(END)
    answers = load_split(tmp_path / "seqkd", "train", max_length=MAX_LENGTH)
    assert answers.template == template_of(read_manifest(chat.data))
    for ids in answers.column("response_ids"):
        assert ids[-1:] == [end] or len(ids) == MAX_LENGTH - MAX_PROMPT


def test_vllm_is_told_the_same_ends(chat: Folders) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat.student)
    template = Template("chat", tokenizer.chat_template, ends=(END,))
    student = Student.load(str(chat.student))
    end = tokenizer.convert_tokens_to_ids(END)
    assert end not in student.end_ids and end in student.asked_by(template).end_ids


def test_a_teacher_to_which_the_templates_tokens_are_others_is_refused(chat: Folders, tmp_path: Path) -> None:
    shutil.copytree(chat.teacher, tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "teacher" / name
        path.write_text(path.read_text().replace("<|im_start|>", "<|mine|>"))
    result = trained(replace(chat, teacher=tmp_path / "teacher"), tmp_path / "r")
    assert result.status == 2 and "the template writes '<|im_start|>', token 600, which is '<|mine|>'" in result.output


def test_data_from_before_there_were_templates_is_alpacas(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders.data, tmp_path / "data")
    manifest = read_json(tmp_path / "data" / "manifest.json")
    before = {name: value for name, value in manifest.items() if name not in ("template", "columns", "turns")}
    write_json(tmp_path / "data" / "manifest.json", before)
    assert load_split(tmp_path / "data", "train", max_length=192).template == Template()
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["fingerprint"] == manifest["fingerprint"]
    Template("plain").save(tmp_path)
    assert (tmp_path / FILE).is_file()
