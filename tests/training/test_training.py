"""The real train.py and evaluate.py on tiny models: every type, family and ZeRO stage, one rank and two, cut off."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train
from pocl.common.resumable_pass import ResumablePass
from pocl.curriculum.schedule import Update
from pocl.data.dataset import load_split
from pocl.losses import DistillationLoss, HiddenStates
from pocl.losses.divergences import LOSSES
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from tests.ranks import on_ranks
from tests.runs import (
    MAX_LENGTH,
    Folders,
    Result,
    call,
    make_folders,
    read_jsonl,
    train_arguments,
    train_until_stage,
)


@pytest.fixture(scope="module")
def ranked(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished POCL run on one rank."""
    output_dir = tmp_path_factory.mktemp("pocl")
    result = call(train, train_arguments(folders, output_dir))
    assert result.status == 0, result.output
    return output_dir / "tfkl" / "seed10"


# Two stages of 1 and 3 steps, without dev evaluations.
SHORT = ["--num-train", 24, "--num-stages", 2, "--num-dev", 0]


@pytest.fixture(scope="module")
def short(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages."""
    output_dir = tmp_path_factory.mktemp("short")
    assert call(train, train_arguments(folders, output_dir, *SHORT)).status == 0
    return output_dir / "tfkl" / "seed10"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]


def test_a_pocl_run_leaves_every_file_that_the_design_names(ranked: Path) -> None:
    names = {path.name for path in ranked.iterdir()}
    wanted = {"config.json", "stages.json", "difficulty.jsonl", "metrics.jsonl", "ledger.json", "tensorboard"}
    assert wanted | {"checkpoints", "best"} <= names
    config = json.loads((ranked / "config.json").read_text())
    assert config["options"]["loss"]["type"] == "tfkl"
    assert config["options"]["optimiser"]["min_lr"] == 1e-7  # defaults are resolved
    assert config["options"]["loss"]["chunk_tokens"] == 128  # 600 entries: the CPU's largest
    assert set(config["fingerprints"]) == {"student", "teacher", "data"}
    assert list((ranked / "tensorboard").iterdir())


def test_stages_widen_from_easy_to_hard_while_temperature_and_ratio_rise(ranked: Path) -> None:
    stages = json.loads((ranked / "stages.json").read_text())
    assert [stage["pool"] for stage in stages] == [[0, 12], [0, 24], [0, 36], [0, 48]]
    assert [round(stage["temperature"], 2) for stage in stages] == [1.0, 1.33, 1.67, 2.0]
    assert [round(stage["kd_ratio"], 2) for stage in stages] == [0.7, 0.8, 0.9, 1.0]
    records = [record for record in read_jsonl(ranked / "metrics.jsonl") if "loss" in record]
    assert [record["stage"] for record in records] == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [record["step"] for record in records] == list(range(1, 15))
    # A fresh cosine in each stage starts at the peak.
    assert [record["lr"] for record in records if record["step"] in (1, 2, 5, 9)] == [1e-3] * 4


def test_the_objective_is_the_weighted_sum_that_the_paper_states(ranked: Path) -> None:
    for record in read_jsonl(ranked / "metrics.jsonl"):
        if "loss" in record:
            r, t = record["kd_ratio"], record["temperature"]
            wanted = (1 - r) * record["cross_entropy"] + r * t**2 * record["divergence"]
            assert record["loss"] == pytest.approx(wanted, rel=1e-6)


def test_the_ranking_fuses_the_two_ranks_of_every_training_example(ranked: Path, folders: Folders) -> None:
    records = read_jsonl(ranked / "difficulty.jsonl")
    assert sorted(record["id"] for record in records) == list(range(8, 56))
    for record in records:
        assert record["score"] == pytest.approx(
            1 / (60 + record["rouge_l_rank"]) + 1 / (60 + record["cross_entropy_rank"])
        )
    keys = [(-record["score"], record["id"]) for record in records]
    assert keys == sorted(keys)
    by_loss = sorted(records, key=lambda record: (record["cross_entropy"], record["id"]))
    assert [record["cross_entropy_rank"] for record in by_loss] == list(range(1, 49))


def test_the_cross_entropy_of_the_ranking_is_the_models_own_loss(ranked: Path, folders: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders.student)
    rows = {row["id"]: row for row in datasets.load_from_disk(str(folders.data / "train"))}
    for record in read_jsonl(ranked / "difficulty.jsonl")[::7]:
        row = rows[record["id"]]
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        labels = ids.clone()
        labels[:, : len(row["prompt_ids"])] = -100
        assert record["cross_entropy"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)


def test_best_is_a_model_folder_with_its_tokenizer_that_evaluate_reads(ranked: Path, folders: Folders) -> None:
    dev = [record for record in read_jsonl(ranked / "metrics.jsonl") if "dev_rouge_l" in record]
    assert len(dev) == 4
    assert (ranked / "best" / "model.safetensors").is_file()
    AutoTokenizer.from_pretrained(ranked / "best")
    arguments = ["--model", ranked / "best", "--sets", "short", "--data-root", folders.data_root, "--seeds", 1, 2]
    arguments += ["--max-length", 192, "--max-prompt-length", 160]
    result = call(evaluate, arguments)
    assert result.status == 0, result.output
    summary = json.loads((ranked / "eval" / "summary.json").read_text())
    for seed in ("1", "2"):
        scores = [record["rouge_l"] for record in read_jsonl(ranked / "eval" / "short" / f"{seed}.jsonl")]
        assert len(scores) == 5
        assert summary["short"]["rouge_l"]["seeds"][seed] == pytest.approx(sum(scores) / 5)
    first, second = summary["short"]["rouge_l"]["seeds"].values()
    assert summary["short"]["rouge_l"]["mean"] == pytest.approx((first + second) / 2)
    assert summary["short"]["rouge_l"]["std"] == pytest.approx(abs(first - second) / math.sqrt(2))


def test_two_ranks_train_the_same_curve_on_the_same_ranking_as_one(
    ranked: Path, folders: Folders, tmp_path: Path
) -> None:
    result = on_ranks("train.py", train_arguments(folders, tmp_path), num_ranks=2)
    assert result.status == 0, result.output
    run = tmp_path / "tfkl" / "seed10"
    alone, together = read_jsonl(ranked / "difficulty.jsonl"), read_jsonl(run / "difficulty.jsonl")
    assert [record["id"] for record in together] == [record["id"] for record in alone]
    assert losses(run) == pytest.approx(losses(ranked), rel=1e-4)
    assert json.loads((run / "ledger.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    "extra",
    [
        ["--batch-size", 1],
        ["--batch-size", 8],
        ["--max-tokens", 100],
        ["--max-tokens", 400],
        ["--max-tokens", 400, "--batch-size", 2],
        ["--max-tokens", 100000],
        ["--chunk-tokens", 16],
        ["--gradient-checkpointing"],
    ],
    ids=lambda extra: "=".join(map(str, extra)).strip("-"),
)
def test_how_a_batch_is_cut_does_not_change_the_curve(
    short: Path, folders: Folders, tmp_path: Path, extra: list[object]
) -> None:
    arguments = train_arguments(folders, tmp_path, "--difficulty-file", short / "difficulty.jsonl", *SHORT, *extra)
    assert call(train, arguments).status == 0
    assert losses(tmp_path / "tfkl" / "seed10") == pytest.approx(losses(short), rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_trains_the_same_curve(short: Path, folders: Folders, tmp_path: Path, stage: int) -> None:
    extra = [*SHORT, "--num-dev", 2, "--difficulty-file", short / "difficulty.jsonl"]
    extra += ["--deepspeed-config", f"scripts/deepspeed/zero{stage}.json"]
    arguments = train_arguments(folders, tmp_path, *extra)
    # Stage 3 shares the weights out, so it is only itself on two ranks. It gathers them in every forward and backward
    # pass: ranks with other numbers of micro-batches (here 2 to 4) would wait for each other forever.
    cut = ["--max-tokens", "250"]
    result = on_ranks("train.py", [*arguments, *cut], num_ranks=2) if stage == 3 else call(train, arguments)
    assert result.status == 0, result.output
    run = tmp_path / "tfkl" / "seed10"
    assert losses(run) == pytest.approx(losses(short), rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(run / "best").num_parameters() > 0


def test_bf16_follows_the_fp32_curve(short: Path, folders: Folders, tmp_path: Path) -> None:
    extra = [*SHORT, "--difficulty-file", short / "difficulty.jsonl", "--dtype", "bf16"]
    assert call(train, train_arguments(folders, tmp_path, *extra)).status == 0
    assert losses(tmp_path / "tfkl" / "seed10") == pytest.approx(losses(short), rel=2e-2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_divergence_falls_as_it_is_trained(folders: Folders, name: str) -> None:
    """test_numbers trains each by train.py, along its golden curve."""
    student, teacher = Student.load(str(folders.student)), Teacher.open(str(folders.teacher))
    batch = load_split(folders.data, "train", max_length=MAX_LENGTH).batch(range(8))
    known, loss = HiddenStates(teacher.states(batch), teacher.head), DistillationLoss(name)
    optimizer, curve = torch.optim.AdamW(student.model.parameters(), lr=1e-3), []
    for _ in range(6):
        values = loss(
            HiddenStates(student.states(batch), student.head),
            known,
            batch.response_labels(),
            temperature=2.0 if loss.tempered else 1.0,
        )
        optimizer.zero_grad()
        (values.loss / len(values.divergence)).backward()
        optimizer.step()
        curve.append(float(values.divergence.sum()))
    assert curve[-1] < curve[0]
    assert min(curve) > 0


@pytest.mark.parametrize("curriculum", ["one-pass", "hard-to-easy", "random"])
def test_every_other_curriculum_trains_on_its_own_examples(
    ranked: Path, folders: Folders, tmp_path: Path, curriculum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = [set(), set(), set(), set()]
    step = train.Trainer.step

    def watched(self: train.Trainer, update: Update, following: Update | None) -> Any:
        seen[update.stage.index] |= set(self.train.ids[update.examples].tolist())
        return step(self, update, following)

    monkeypatch.setattr(train.Trainer, "step", watched)
    extra = ["--curriculum", curriculum, "--difficulty-file", ranked / "difficulty.jsonl", "--num-dev", 0]
    assert call(train, train_arguments(folders, tmp_path, *extra, "--global-batch-size", 4)).status == 0
    easy_to_hard = [record["id"] for record in read_jsonl(ranked / "difficulty.jsonl")]
    quarters = [set(easy_to_hard[start : start + 12]) for start in range(0, 48, 12)]
    if curriculum == "one-pass":
        assert seen == quarters
    elif curriculum == "hard-to-easy":
        assert seen == [set.union(*quarters[3 - i :]) for i in range(4)]
    else:
        assert [len(ids) for ids in seen] == [12, 24, 36, 48]
        assert seen[0] < seen[1] < seen[2] < seen[3] and seen[0] != quarters[0]


@pytest.mark.parametrize("mode", ["hard", "linear"])
def test_selective_reliance_weighs_each_example_by_its_difficulty(
    ranked: Path, folders: Folders, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first recorded objective equals one computed example by example with transformers' own losses."""
    extra = ["--type", "fkl", "--num-stages", 1, "--curriculum", "whole-pool", "--kd-ratio", 0.8, "--num-dev", 0]
    extra += ["--selective-reliance", mode, "--difficulty-file", ranked / "difficulty.jsonl"]
    extra += ["--global-batch-size", 48, "--batch-size", 5]
    assert call(train, train_arguments(folders, tmp_path, *extra)).status == 0
    order = [record["id"] for record in read_jsonl(ranked / "difficulty.jsonl")]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path).double() for path in (folders.student, folders.teacher)
    )
    total, count = 0.0, 0
    for row in datasets.load_from_disk(str(folders.data / "train")):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        first = len(row["prompt_ids"]) - 1
        with torch.no_grad():
            q, p = (model(ids).logits[0, first:-1].log_softmax(-1) for model in (student, teacher))
        percentile = order.index(row["id"]) / 47
        weight = 0.8 * (percentile if mode == "linear" else float(percentile >= 0.5))
        cross_entropy = -q.gather(-1, ids[0, first + 1 :, None]).sum()
        total += float((1 - weight) * cross_entropy + weight * (p.exp() * (p - q)).sum())
        count += len(row["response_ids"])
    assert losses(tmp_path / "fkl" / "seed10")[0] == pytest.approx(total / count, rel=1e-5)


def test_sft_trains_without_a_teacher_and_lowers_cross_entropy(folders: Folders, tmp_path: Path) -> None:
    extra = ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", "--epochs", 4]
    assert call(train, train_arguments(folders, tmp_path, *extra, teacher=False)).status == 0
    curve = losses(tmp_path / "sft" / "seed10")
    assert curve[-1] < curve[0] - 0.1
    ledger = json.loads((tmp_path / "sft" / "seed10" / "ledger.json").read_text())
    assert ledger["teacher_forward_passes"] == 0
    assert ledger["samples"] == 4 * 48
    assert ledger["finished"]


def test_frozen_layers_stay_as_they_were(folders: Folders, tmp_path: Path) -> None:
    extra = ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", "--train-last-layers", 1]
    assert call(train, train_arguments(folders, tmp_path, *extra, teacher=False)).status == 0
    before = AutoModelForCausalLM.from_pretrained(folders.student).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "seed10" / "best").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in changed)


@pytest.mark.parametrize(("family", "num_ranks"), [("opt", None), ("llama", 2), ("qwen2", None)])
def test_every_family_runs_from_ranking_to_scores(family: str, num_ranks: int | None, tmp_path: Path) -> None:
    """On two ranks, or in this process; test_all_rows launches GPT-2."""

    def run_program(module: ModuleType, arguments: Sequence[object]) -> Result:
        if num_ranks is None:
            return call(module, arguments)
        return on_ranks(Path(str(module.__file__)).name, arguments, num_ranks=num_ranks)

    folders = make_folders(tmp_path, family)
    arguments = train_arguments(folders, tmp_path / "results", "--type", "tsrkl")
    result = run_program(train, arguments)
    assert result.status == 0, result.output
    run = tmp_path / "results" / "tsrkl" / "seed10"
    assert len(losses(run)) == 14
    student, best = (load_file(folder / "model.safetensors") for folder in (folders.student, run / "best"))
    assert best.keys() == student.keys()
    arguments = ["--model", run / "best", "--sets", "short", "--data-root", folders.data_root, "--seeds", 1]
    arguments += ["--max-length", 192, "--max-prompt-length", 160]
    result = run_program(evaluate, arguments)
    assert result.status == 0, result.output
    # The sampled answers do not depend on the ranks: this process alone gives the same.
    assert call(evaluate, [*arguments, "--output-dir", tmp_path / "alone"]).status == 0
    launched, alone = (read_jsonl(folder / "short" / "1.jsonl") for folder in (run / "eval", tmp_path / "alone"))
    assert [record["id"] for record in launched] == list(range(5))
    assert launched == alone


def test_a_run_that_is_cut_off_ends_with_the_same_weights(ranked: Path, folders: Folders, tmp_path: Path) -> None:
    """The folder as it was after stage 2 (epoch checkpoints), gone on with, equals the run in one go, bit for bit."""
    arguments = train_arguments(folders, tmp_path)
    train_until_stage(arguments, 2)
    cut = tmp_path / "tfkl" / "seed10"
    assert not (cut / "checkpoints" / "last.json").read_text().count('"done": true')
    assert call(train, arguments).status == 0
    assert losses(cut) == losses(ranked)
    for name in ("best/model.safetensors", "ledger.json"):
        assert (cut / name).read_bytes() == (ranked / name).read_bytes()


def test_a_finished_run_started_again_changes_nothing(ranked: Path, folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "tfkl" / "seed10"
    shutil.copytree(ranked, copy)
    before = (copy / "best" / "model.safetensors").read_bytes(), (copy / "metrics.jsonl").read_bytes()
    result = call(train, train_arguments(folders, tmp_path))
    assert result.status == 0, result.output
    assert ((copy / "best" / "model.safetensors").read_bytes(), (copy / "metrics.jsonl").read_bytes()) == before


def test_scoring_that_was_cut_off_goes_on_with_the_same_result(ranked: Path, folders: Folders, tmp_path: Path) -> None:
    copy, appended = tmp_path / "tfkl" / "seed10", 0
    append = ResumablePass.append

    def append_and_stop(self: ResumablePass, records: Iterable[Mapping[str, Any]]) -> None:
        nonlocal appended
        append(self, records)
        appended += 1
        if appended == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumablePass, "append", append_and_stop)
        result = call(train, train_arguments(folders, tmp_path, "--teacher-cache", "off", "--eval-batch-size", 8))
        assert result.status == 130, result.output
    part = copy / "scoring" / "difficulty" / "student" / "0.jsonl"
    part.write_text(part.read_text()[:-30])  # cut in the middle of a line, as a crash would
    result = call(train, train_arguments(folders, tmp_path, "--teacher-cache", "off", "--eval-batch-size", 8))
    assert result.status == 0, result.output
    again, whole = (read_jsonl(run / "difficulty.jsonl") for run in (copy, ranked))
    assert [(r["id"], r["answer"]) for r in again] == [(r["id"], r["answer"]) for r in whole]
    assert not (copy / "scoring").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_examples(folders: Folders, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders.student, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    model.save_pretrained(broken)
    folders = Folders(broken, folders.teacher, folders.data, folders.data_root)
    extra = ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool"]
    result = call(train, train_arguments(folders, tmp_path, *extra, teacher=False))
    assert result.status == 1
    assert "at step 1, stage 1" in result.last_line
    assert "examples [" in result.last_line
    assert not (tmp_path / "sft" / "seed10" / "best").exists()
