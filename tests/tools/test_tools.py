"""The tools on tiny models and real runs: a student cut from layers, tables, pictures, answers side by side."""

import itertools
import json
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pocl.common import console
from pocl.common.files import write_json, write_jsonl
from tests.runs import call
from tests.tiny import FAMILIES, save_model, tiny_model, tiny_tokenizer
from tools import make_student, plot_difficulty, plot_run, process_data, show_answers
from tools.reporting import drawings
from tools.reporting.panels import running_mean


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_some_layers_keeps_their_weights_and_generates(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = {"vocab_size": len(tokenizer), "end_id": tokenizer.eos_token_id}
    teacher = save_model(tiny_model(family, num_layers=5, **size), tokenizer, tmp_path / "teacher")
    result = call(make_student, ["--model", teacher, "--layers", 0, 3, 4, "--output-dir", tmp_path / "student"])
    assert result.status == 0, result.output
    whole = AutoModelForCausalLM.from_pretrained(teacher)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    kept = make_student.layer_stack(student)
    assert len(kept) == student.config.num_hidden_layers == 3
    for layer, index in zip(kept, (0, 3, 4), strict=True):
        for name, weight in make_student.layer_stack(whole)[index].state_dict().items():
            assert torch.equal(weight, layer.state_dict()[name])
    assert torch.equal(student.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert torch.equal(student.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    ids = AutoTokenizer.from_pretrained(tmp_path / "student")("Say yes.", return_tensors="pt").input_ids
    # With the key-value cache and without it: the layers' own numbers have to fit the cache.
    cached, plain = (student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_how_many_layers_takes_a_quarter_from_the_start_and_the_rest_from_the_end() -> None:
    assert make_student.default_layers(30, 8) == [0, 1, 24, 25, 26, 27, 28, 29]
    assert make_student.default_layers(12, 3) == [0, 10, 11]
    assert make_student.default_layers(4, 4) == [0, 1, 2, 3]


def test_the_picture_is_a_png_of_every_panel(tmp_path: Path) -> None:
    records: list[dict[str, float]] = []
    for step in range(1, 13):
        stage = (step - 1) // 3
        records.append(
            {"step": step, "stage": stage, "epoch": 0, "pool": 12 * (stage + 1), "temperature": 1 + stage / 3}
            | {"kd_ratio": 0.7 + stage / 10, "loss": 2 / step, "cross_entropy": 3 / step, "divergence": 1 / step}
        )
        if step % 3 == 0:
            scores = {"dev_rouge_l": 10.0 * stage, "dev_cross_entropy": 2.0}
            records.append({"step": step, "stage": stage, "epoch": 0} | scores)
    write_jsonl(tmp_path / "metrics.jsonl", records)
    result = call(plot_run, ["--run", tmp_path])
    assert result.status == 0, result.output
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_a_running_mean_starts_at_the_first_value_without_bias() -> None:
    assert running_mean([4.0]) == pytest.approx([4.0])
    # Weights 0.8 * 0.2 and 0.2 of 0.36.
    assert running_mean([1.0, 2.0])[1] == pytest.approx((0.16 * 1 + 0.2 * 2) / 0.36)


def test_answers_of_several_models_stand_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "data" / "mine").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "mine" / "valid.jsonl", [{"instruction": "Say yes.", "output": "Yes."}])
    for name, answer in (("a", "No."), ("b", "Yes.")):
        write_answers(tmp_path / name, {10: answer})
    arguments = ["--set", "mine", "--data-root", tmp_path / "data"]
    result = call(show_answers, [*arguments, "--rows", f"before={tmp_path / 'a'}", f"after={tmp_path / 'b'}"])
    assert result.status == 0, result.output
    for word in ("Say yes.", "reference", "before", "No.", "after"):
        assert word in result.output


def write_answers(folder: Path, answers: dict[int, str]) -> None:
    """Answers to the one prompt of the set ``mine``, as evaluate.py leaves them: one a seed."""
    for seed, answer in answers.items():
        write_jsonl(folder / "mine" / f"{seed}.jsonl", [{"id": 0, "answer": answer, "rouge_l": 7.0}])
    write_json(folder / "summary.json", {"mine": {"rouge_l": {"seeds": {str(seed): 7.0 for seed in answers}}}})


def test_the_answers_shown_are_those_of_a_seed_in_the_summary(tmp_path: Path) -> None:
    (tmp_path / "data" / "mine").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "mine" / "valid.jsonl", [{"instruction": "Say yes.", "output": "Yes."}])
    write_answers(tmp_path / "run" / "eval", {20: "twenty", 30: "thirty"})
    write_jsonl(tmp_path / "run" / "eval" / "mine" / "1.jsonl", [{"id": 0, "answer": "stale", "rouge_l": 7.0}])
    arguments = ["--set", "mine", "--data-root", tmp_path / "data", "--rows", f"x={tmp_path / 'run'}"]
    result = call(show_answers, arguments)
    assert result.status == 0 and "twenty" in result.output and "stale" not in result.output, result.output
    assert "thirty" in call(show_answers, [*arguments, "--seed", 30]).output
    result = call(show_answers, [*arguments, "--seed", 1])
    assert result.status == 2 and "of --seed 1; its seeds are 20 30" in result.last_line, result.output
    result = call(show_answers, [*arguments, "--set", "mime"])
    assert result.status == 2 and "no answers to 'mime'; did you mean 'mine'?" in result.last_line, result.output


def test_text_stands_at_the_left_of_a_table_and_numbers_at_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a", "No.\nnever", "7"], ["b", "A longer answer", "12.50 ±1.68"], ["c", "", "–"]]
    console.show_table("title", ["", "answer", "ROUGE-L"], rows)
    cells = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    texts, numbers = [row[1] for row in cells], [row[2] for row in cells]
    assert [text for text in texts if text.strip()] == [
        " No.             ",
        " never           ",
        " A longer answer ",
    ]
    assert [number for number in numbers if number.strip()] == ["           7 ", " 12.50 ±1.68 ", "           – "]


@pytest.mark.parametrize("module", [plot_run, plot_difficulty], ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("pic.xyz", "does not end as a picture does; give it one of .png .pdf .svg"),
        ("pic", "does not end as a picture does; give it one of .png .pdf .svg"),
        ("file/pic.png", "file is no folder"),
        ("folder.png", "folder.png is a folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_at_once(
    module: ModuleType, output: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    result = call(module, ["--run", tmp_path, "--output", tmp_path / output])
    assert result.status == 2 and told in result.last_line, result.output


@pytest.mark.parametrize("ending", drawings.PICTURES)
def test_every_ending_that_is_offered_makes_a_picture(ending: str, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([1, 2])
    path = drawings.picture_path(str(tmp_path / f"x{ending}"), tmp_path / "usual.png")
    figure.savefig(path)
    plt.close(figure)
    assert path.stat().st_size > 500
    assert drawings.picture_path(None, tmp_path / "usual.png") == tmp_path / "usual.png"


def test_a_chat_template_that_is_not_used_is_told_in_one_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    write_jsonl(tmp_path / "raw.jsonl", [{"instruction": "Say yes.", "output": "Yes."}])
    for template in (None, "{{ messages }}"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / str(bool(template)))
        arguments = ["--raw", tmp_path / "raw.jsonl", "--tokenizer", tmp_path / str(bool(template)), "--num-dev", 0]
        arguments += ["--output-dir", tmp_path / "out", "--data-root", tmp_path, "--template", "alpaca"]
        result = call(process_data, arguments)
        assert result.status == 0, result.output
        assert ("has a chat template, which is not used" in " ".join(result.output.split())) == bool(template)


def test_the_contamination_report_names_exactly_the_prompts_that_coincide(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id)
    folder = save_model(model, tokenizer, tmp_path / "model")
    raw = tmp_path / "data" / "mine" / "raw.jsonl"
    raw.parent.mkdir(parents=True)
    names = ["a", "b", "c", "b", "d", "d"]  # 0..1 dev, 2..5 train
    write_jsonl(raw, [{"instruction": f"Say {name}.", "input": "", "output": name} for name in names])
    test_set = [{"instruction": f"Say {name}.", "output": name} for name in ("x", "d", "a")]
    write_jsonl(raw.parent / "valid.jsonl", test_set)
    arguments = ["--raw", raw, "--tokenizer", folder, "--output-dir", tmp_path / "out", "--num-dev", 2]
    result = call(process_data, [*arguments, "--data-root", tmp_path / "data", "--num-workers", 1])
    assert result.status == 0, result.output
    report = json.loads((tmp_path / "out" / "contamination.json").read_text())
    found = {pair: [{k: v for k, v in hit.items() if k != "prompt"} for hit in hits] for pair, hits in report.items()}
    assert found == {
        "dev in train": [{"dev": [1], "train": [3]}],
        "mine in train": [{"mine": [1], "train": [4, 5]}],
        "mine in dev": [{"mine": [2], "dev": [0]}],
    }
    assert "contamination: 1 distinct prompt(s) of dev in train" in result.output


def test_several_workers_keep_the_order_and_the_tokens(tmp_path: Path) -> None:
    import datasets

    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id)
    folder = save_model(model, tokenizer, tmp_path / "model")
    write_jsonl(tmp_path / "raw.jsonl", [{"instruction": f"Say {i}.", "output": str(i * i)} for i in range(2500)])
    for workers in (1, 2):
        arguments = ["--raw", tmp_path / "raw.jsonl", "--tokenizer", folder, "--num-workers", workers]
        result = call(process_data, [*arguments, "--output-dir", tmp_path / str(workers), "--data-root", tmp_path])
        assert result.status == 0, result.output
    one, two = (datasets.load_from_disk(str(tmp_path / workers / "train")) for workers in ("1", "2"))
    assert list(one["id"]) == list(range(1000, 2500))
    assert one.to_dict() == two.to_dict()
    manifests = [json.loads((tmp_path / workers / "manifest.json").read_text()) for workers in ("1", "2")]
    assert manifests[0] == manifests[1]


SEPARATOR = [65535]  # between prompt and response in the published tokens


def test_dolly_becomes_the_published_tokens(
    shared_data: Path, gpt2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    gpt2_tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--raw", shared_data / "dolly" / "raw.jsonl", "--tokenizer", tmp_path / "tokenizer"]
    result = call(process_data, [*arguments, "--output-dir", tmp_path / "out", "--data-root", shared_data])
    assert result.status == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["examples"]["train"] == 11_435
    report = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert len(report["dev in train"]) == 25
    assert len(report["dolly in train"]) == 8

    table = datasets.load_from_disk(str(tmp_path / "out" / "train"))
    columns = zip(table["prompt_ids"], table["response_ids"], strict=True)
    records = [[*prompt, *SEPARATOR, *response] for prompt, response in columns]
    published = shared_data / "published" / "dolly-gpt2-train"
    found = np.fromiter(itertools.chain.from_iterable(records), dtype=np.uint16)
    assert np.array_equal(found, np.fromfile(published.with_suffix(".bin"), dtype=np.uint16))
    index, sizes = published.with_suffix(".idx").read_bytes(), [len(record) for record in records]
    assert sizes == np.frombuffer(index, dtype=np.int32, count=11435, offset=34).tolist()
    offsets = np.frombuffer(index, dtype=np.int64, count=11435, offset=34 + 4 * 11435)
    assert (2 * (np.cumsum(sizes) - sizes)).tolist() == offsets.tolist()
