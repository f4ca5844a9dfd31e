"""evaluate.py at scale: what is there is not answered again, the clean protocol, prompts that were trained on."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from pocl.common.errors import UserError
from pocl.common.files import write_jsonl
from pocl.data.encoding import Encoder
from pocl.evaluation.answerer import Answerer
from pocl.evaluation.kept_answers import ORIGIN
from pocl.evaluation.sets import load_set
from pocl.generation.decoding import BuiltIn
from tests.runs import Folders, Result, call, read_jsonl


def command(folders: Folders, output_dir: Path, *extra: object) -> list[object]:
    arguments = ["--model", folders.student, "--sets", "short", "--data-root", folders.data_root, "--max-length", 192]
    return [*arguments, "--max-prompt-length", 160, "--output-dir", output_dir, *extra]


def evaluated(folders: Folders, output_dir: Path, *extra: object) -> Result:
    result = call(evaluate, command(folders, output_dir, *extra))
    assert result.status == 0, result.output
    return result


@pytest.fixture(scope="module")
def kept(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of two seeds; a test leaves them as they are."""
    place = tmp_path_factory.mktemp("kept") / "eval"
    evaluated(folders, place, "--seeds", 1, 2)
    return place


@pytest.fixture
def mine(kept: Path, tmp_path: Path) -> Path:
    """A copy of them to change."""
    shutil.copytree(kept, tmp_path / "mine")
    return tmp_path / "mine"


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())["short"]


def test_seeds_that_are_there_are_not_answered_again(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    answer = BuiltIn.__call__

    def counted(self: BuiltIn, prompts: object, ids: list[int], sampling: object) -> object:
        asked.append(sampling.seed)  # type: ignore[attr-defined]
        return answer(self, prompts, ids, sampling)  # type: ignore[arg-type]

    monkeypatch.setattr(BuiltIn, "__call__", counted)
    evaluated(folders, tmp_path, "--seeds", 1, 2)
    before = (tmp_path / "short" / "1.jsonl").read_bytes()
    result = evaluated(folders, tmp_path, "--seeds", 1, 2, 3)
    assert asked == [1, 2, 3]
    assert "seeds 1 2 are there already" in result.output
    assert (tmp_path / "short" / "1.jsonl").read_bytes() == before
    assert list(summary(tmp_path)["rouge_l"]["seeds"]) == ["1", "2", "3"]  # type: ignore[index]
    evaluated(folders, tmp_path / "other", "--seeds", 1, "--top-p", 0.9)  # another protocol
    assert asked == [1, 2, 3, 1]


def test_fewer_seeds_than_are_there_leave_the_others_in_the_summary_and_print_their_own(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(folders, tmp_path, "--seeds", 3, 1, 2)
    whole = (tmp_path / "summary.json").read_bytes()
    assert list(summary(tmp_path)["rouge_l"]["seeds"]) == ["1", "2", "3"]  # type: ignore[index]
    monkeypatch.setattr(BuiltIn, "__call__", lambda *arguments: pytest.fail("a seed was answered again"))
    result = evaluated(folders, tmp_path, "--seeds", 1)
    (row,) = [line for line in result.output.splitlines() if "│ short" in line]
    assert row.split("│")[2].strip() == "1"  # one seed is shown
    assert (tmp_path / "summary.json").read_bytes() == whole
    evaluated(folders, tmp_path, "--seeds", 1, 2, 3)
    assert (tmp_path / "summary.json").read_bytes() == whole


def test_answers_that_the_summary_has_lost_are_found_again(
    folders: Folders, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (mine / "summary.json").read_bytes()
    (mine / "summary.json").unlink()
    monkeypatch.setattr(BuiltIn, "__call__", lambda *arguments: pytest.fail("a seed was answered again"))
    evaluated(folders, mine, "--seeds", 2)
    assert (mine / "summary.json").read_bytes() == whole


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--sampling-temperature", 0.7], "--sampling-temperature was 1.0, is 0.7"),
        (["--num-examples", 2], "--num-examples was 5, is 2"),
        (["--dtype", "bf16"], "--dtype was fp32, is bf16"),
        (["--max-length", 180], "--max-length was 192, is 180"),
        (["--no-repeat-ngram", 0, "--top-k", 3], "--top-k was 0, is 3; --no-repeat-ngram was 6, is 0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_answers_of_other_options_are_refused_and_left_alone(
    folders: Folders, kept: Path, extra: list[object], told: str
) -> None:
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    result = call(evaluate, [*command(folders, kept, "--seeds", 1), *extra])
    assert result.status == 2 and f"answers of other options ({told})" in result.last_line, result.output
    assert f"give another --output-dir, or delete {kept / 'short'}" in result.last_line
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_answers_of_a_model_of_another_path_are_refused(folders: Folders, kept: Path) -> None:
    result = call(evaluate, command(folders, kept, "--seeds", 1, "--model", folders.teacher))
    assert result.status == 2, result.output
    assert f"(--model was {folders.student}, is {folders.teacher})" in result.last_line


def test_the_same_model_at_another_path_finds_its_answers(
    folders: Folders, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders.student, tmp_path / "copy")
    monkeypatch.setattr(BuiltIn, "__call__", lambda *arguments: pytest.fail("a seed was answered again"))
    result = evaluated(folders, mine, "--model", tmp_path / "copy", "--seeds", 1, 2)
    assert "seeds 1 2 are there already" in result.output


def test_answers_of_a_model_that_was_trained_on_since_are_replaced(folders: Folders, tmp_path: Path) -> None:
    best, place = tmp_path / "best", tmp_path / "eval"
    shutil.copytree(folders.student, best)
    shutil.copytree(folders.data_root / "short", tmp_path / "data" / "short")
    shutil.copytree(folders.data_root / "short", tmp_path / "data" / "other")
    arguments = ["--model", best, "--data-root", tmp_path / "data"]
    evaluated(folders, place, *arguments, "--sets", "short", "other", "--seeds", 1, 2)
    earlier = summary(place)["model"]
    shutil.copy(folders.student / "model.safetensors", best / "model.safetensors")
    weights = load_file(best / "model.safetensors")
    weights["transformer.wte.weight"] += 1
    save_file(weights, best / "model.safetensors", metadata={"format": "pt"})
    result = evaluated(folders, place, *arguments, "--seeds", 1)
    said = " ".join(result.output.split())
    assert f"short: seeds 1 2 were answered by an earlier model in {best}; they are removed" in said
    assert f"{place}: other were answered by another model; evaluate them again, too" in said
    assert summary(place)["model"] != earlier and list(summary(place)["rouge_l"]["seeds"]) == ["1"]  # type: ignore[index]
    assert sorted(path.name for path in (place / "short").glob("*.jsonl")) == ["1.jsonl"]


def test_files_of_unknown_origin_are_refused(folders: Folders, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "short" / "1.jsonl", [{"id": 0, "answer": "", "rouge_l": 0.0}])
    result = call(evaluate, command(folders, tmp_path, "--seeds", 1))
    assert result.status == 2 and "holds answers of unknown origin" in result.last_line, result.output


def test_answers_whose_origin_is_gone_are_refused_though_the_summary_names_them(folders: Folders, mine: Path) -> None:
    (mine / "short" / ORIGIN).unlink()
    before = (mine / "short" / "1.jsonl").read_bytes()
    result = call(evaluate, command(folders, mine, "--seeds", 1, 3))
    assert result.status == 2 and "holds answers of unknown origin" in result.last_line, result.output
    assert (mine / "short" / "1.jsonl").read_bytes() == before
    assert not (mine / "short" / "3.jsonl").exists()


def test_a_damaged_origin_is_named(folders: Folders, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "short" / "1.jsonl", [{"id": 0, "answer": "", "rouge_l": 0.0}])
    (tmp_path / "short" / ORIGIN).write_text('{"model": "m"}')
    result = call(evaluate, command(folders, tmp_path, "--seeds", 1))
    assert result.status == 2 and f"{tmp_path / 'short' / ORIGIN} is damaged" in result.last_line, result.output


def test_sampled_and_given_answers_do_not_take_each_others_place(folders: Folders, kept: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "answers.jsonl", [{"text": "Yes."}] * 5)
    arguments = ["--answers", tmp_path / "answers.jsonl", "--sets", "short", "--data-root", folders.data_root]
    result = call(evaluate, [*arguments, "--output-dir", kept])
    assert result.status == 2 and "holds the answers of a model" in result.last_line, result.output
    assert call(evaluate, [*arguments, "--output-dir", tmp_path / "given"]).status == 0
    result = call(evaluate, command(folders, tmp_path / "given", "--seeds", 1))
    assert result.status == 2 and "holds scores of --answers" in result.last_line, result.output


def test_scores_are_printed_with_two_digits(folders: Folders, kept: Path) -> None:
    result = evaluated(folders, kept, "--seeds", 1, 2)
    (row,) = [line for line in result.output.splitlines() if "│ short" in line]
    scores = summary(kept)["rouge_l"]
    assert row.split("│")[3].strip() == f"{scores['mean']:.2f} ±{scores['std']:.2f}"  # type: ignore[index]


def test_the_references_cross_entropy_is_that_of_a_naive_loop(folders: Folders, kept: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders.student)
    model = AutoModelForCausalLM.from_pretrained(folders.student).double().eval()
    losses = []
    for example in load_set(folders.data_root, "short"):
        prompt = tokenizer.encode(example.prompt)
        ids = [*tokenizer.encode(example.prompt + example.references[0]), tokenizer.eos_token_id][:192]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    assert summary(kept)["cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    result = evaluated(folders, kept, "--seeds", 1)
    assert f"{summary(kept)['cross_entropy']:.3f}" in result.output


def test_cross_entropy_is_kept_as_answers_are(folders: Folders, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = summary(mine)["cross_entropy"]
    monkeypatch.setattr(Answerer, "cross_entropy", lambda *arguments: pytest.fail("the references were read again"))
    evaluated(folders, mine, "--seeds", 2, 3)
    assert summary(mine)["cross_entropy"] == before


def test_a_reference_that_the_template_cannot_write_leaves_cross_entropy_out(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise UserError("the template cannot write it")

    monkeypatch.setattr(Encoder, "reference_ids", refused)
    result = evaluated(folders, tmp_path, "--seeds", 1, "--num-examples", 1)
    assert "no cross-entropy: 1 reference(s) cannot be written" in result.output
    assert "cross_entropy" not in summary(tmp_path)


def test_a_seed_whose_file_is_gone_is_answered_again(folders: Folders, mine: Path) -> None:
    lost = (mine / "short" / "2.jsonl").read_bytes()
    (mine / "short" / "2.jsonl").unlink()
    evaluated(folders, mine, "--seeds", 1, 2)
    assert (mine / "short" / "2.jsonl").read_bytes() == lost


def test_the_clean_protocol_is_greedy_and_bans_nothing(folders: Folders, tmp_path: Path) -> None:
    result = evaluated(folders, tmp_path / "both", "--seeds", 1, "--clean")
    assert "greedy" in result.output
    protocol = summary(tmp_path / "both" / "clean")["protocol"]
    assert (protocol["temperature"], protocol["no_repeat_ngram"]) == (0.0, 0)  # type: ignore[index]
    evaluated(folders, tmp_path / "greedy", "--seeds", 1, "--sampling-temperature", 0, "--no-repeat-ngram", 0)
    clean, greedy = (
        read_jsonl(path / "short" / "1.jsonl") for path in (tmp_path / "both" / "clean", tmp_path / "greedy")
    )
    assert clean == greedy != read_jsonl(tmp_path / "both" / "short" / "1.jsonl")


def test_prompts_of_the_training_data_are_listed_and_left_out(folders: Folders, tmp_path: Path) -> None:
    # The set is the first five records of the raw file, which are dev records; make two of them training prompts.
    train = datasets.load_from_disk(str(folders.data / "train"))
    examples = load_set(folders.data_root, "short")
    assert not {example.prompt for example in examples} & set(train["prompt"])
    prompts = [examples[1].prompt, examples[3].prompt, *train["prompt"][2:]]
    changed = tmp_path / "processed"
    train.remove_columns("prompt").add_column("prompt", prompts).save_to_disk(str(changed / "train"))
    (changed / "manifest.json").write_bytes((folders.data / "manifest.json").read_bytes())
    result = evaluated(folders, tmp_path / "eval", "--seeds", 1, 2, "--train-data", changed)
    found = summary(tmp_path / "eval")["contaminated"]
    assert found["ids"] == [1, 3]  # type: ignore[index]
    rest = [
        record["rouge_l"]
        for seed in (1, 2)
        for record in read_jsonl(tmp_path / "eval" / "short" / f"{seed}.jsonl")
        if record["id"] not in (1, 3)
    ]
    assert found["without"]["rouge_l"] == pytest.approx(sum(rest) / 6)  # type: ignore[index]
    assert "unseen: ROUGE-L less the prompts that stand in the training data (short 2)" in result.output.replace(
        "\n", " "
    )
    evaluated(folders, tmp_path / "fresh", "--seeds", 1, "--train-data", folders.data)
    assert summary(tmp_path / "fresh")["contaminated"]["ids"] == []  # type: ignore[index]


def test_answers_of_one_set_keep_the_scores_of_another(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders.data_root / "short", tmp_path / "data" / "short")
    shutil.copytree(folders.data_root / "short", tmp_path / "data" / "other")
    write_jsonl(tmp_path / "answers.jsonl", [{"text": "Yes."}] * 5)
    for name in ("short", "other"):
        arguments = ["--answers", tmp_path / "answers.jsonl", "--sets", name, "--data-root", tmp_path / "data"]
        result = call(evaluate, [*arguments, "--output-dir", tmp_path / "eval"])
        assert result.status == 0, result.output
    found = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert sorted(found) == ["other", "short"] and found["other"] == found["short"]
    assert "cross_entropy" not in found["short"]  # of given answers there is no model


def test_a_length_that_the_model_has_no_positions_for_is_refused(folders: Folders, tmp_path: Path) -> None:
    arguments = ["--model", folders.student, "--sets", "short", "--data-root", folders.data_root]
    result = call(evaluate, [*arguments, "--max-length", 1026, "--output-dir", tmp_path / "eval"])
    assert result.status == 2 and "--max-length 1026" in result.last_line, result.output
    assert "reads at most 1024 tokens" in result.last_line and not (tmp_path / "eval").exists()
