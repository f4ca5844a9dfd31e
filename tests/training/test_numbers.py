"""Numbers that are not finite, and numbers that must not drift."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import train
from pocl.common.errors import RunStopped
from pocl.common.files import ROOT
from pocl.data.batch import collate
from pocl.data.dataset import load_split
from pocl.losses.token import StageObjective
from pocl.models.loading import DTYPES
from pocl.training.engine import Engine, _groups
from tests.golden import CASES, KEPT, curve
from tests.parts import engine_of
from tests.runs import MAX_LENGTH, Folders, call, make_folders, read_jsonl, train_arguments
from tests.tiny import tiny_model

TWO_EPOCHS = ("--type", "fkl", "--curriculum", "whole-pool", "--num-stages", 1, "--epochs", 2, "--num-dev", 0)
TWO_EPOCHS += ("--num-train", 24)  # three steps each


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def poisoned(llama: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, int]:
    """A student whose embedding of one token is NaN, and the id of the only example that holds that token."""
    split = load_split(llama.data, "train", max_length=MAX_LENGTH, num_examples=24)
    holders: dict[int, set[int]] = defaultdict(set)
    for i, texts in enumerate(zip(split.column("prompt_ids"), split.column("response_ids"), strict=True)):
        for token in {*texts[0], *texts[1]}:
            holders[token].add(i)
    token = min(token for token, positions in holders.items() if len(positions) == 1)
    model = AutoModelForCausalLM.from_pretrained(llama.student)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    folder = tmp_path_factory.mktemp("poisoned")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama.student / name).read_bytes())
    (position,) = holders[token]
    return Folders(folder, llama.teacher, llama.data, llama.data_root), split.column("id")[position]


SETTINGS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")]


@pytest.mark.parametrize(("stage", "dtype"), SETTINGS, ids=lambda value: str(value))
def test_steps_that_are_not_finite_are_left_out_within_the_bound(
    poisoned: tuple[Folders, int], tmp_path: Path, stage: int, dtype: str
) -> None:
    folders, example_id = poisoned
    extra = [*TWO_EPOCHS, "--deepspeed-config", f"scripts/deepspeed/zero{stage}.json", "--dtype", dtype]
    result = call(train, train_arguments(folders, tmp_path, *extra, "--max-skipped-steps", 2))
    assert result.status == 0, result.output
    run = tmp_path / "fkl" / "seed10"
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]
    skipped = [record for record in records if record["skipped"]]
    assert len(records) == 6 and len(skipped) == 2  # once an epoch
    assert all(math.isnan(record["loss"]) == record["skipped"] for record in records)
    assert all(math.isfinite(record["gradient_norm"]) != record["skipped"] for record in records)
    assert json.loads((run / "ledger.json").read_text())["skipped_steps"] == 2
    said = [line for line in result.output.splitlines() if ": skipped, " in line]
    assert len(said) == 2 and all(f" {example_id}," in line or f"[{example_id}" in line or f" {example_id}]" in line
                                  for line in said)  # fmt: skip
    # Nothing but that one row is NaN: the step was left out whole.
    weights = AutoModelForCausalLM.from_pretrained(run / "best", dtype=torch.float32).state_dict()
    broken = {name: int(torch.isnan(value).any(-1).sum()) for name, value in weights.items() if value.isnan().any()}
    assert broken == {"model.embed_tokens.weight": 1}


def test_one_more_than_the_bound_stops_the_run(poisoned: tuple[Folders, int], tmp_path: Path) -> None:
    result = call(train, train_arguments(poisoned[0], tmp_path, *TWO_EPOCHS, "--max-skipped-steps", 1))
    assert result.status == 1
    assert "the loss is nan at step" in result.last_line and "after 1 skipped steps" in result.last_line
    assert "the last good checkpoint is kept" in result.last_line


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_that_is_not_finite_stops_with_step_stage_and_examples(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    backward, step, steps = Engine.backward, Engine.step, 0

    def overflow_in_the_third(self: Engine, loss_sum: torch.Tensor, num_tokens: float) -> None:
        backward(self, loss_sum * (math.inf if steps == 2 else 1.0), num_tokens)

    def count(self: Engine, lr: float) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        return step(self, lr)

    monkeypatch.setattr(Engine, "backward", overflow_in_the_third)
    monkeypatch.setattr(Engine, "step", count)
    extra = [*TWO_EPOCHS, "--deepspeed-config", f"scripts/deepspeed/zero{stage}.json"]
    result = call(train, train_arguments(folders, tmp_path, *extra))
    assert result.status == 1
    assert "the gradient is not finite at step 3, stage 1, in the batch of examples [" in result.last_line
    assert result.last_line.count(",") >= 7  # the eight of the batch


@pytest.mark.parametrize("first", [True, False], ids=["first", "third"])
@pytest.mark.parametrize(("stage", "dtype"), [*SETTINGS, (2, "bf16"), (3, "bf16")], ids=lambda value: str(value))
def test_a_step_that_is_not_finite_leaves_weights_and_moments_alone(stage: int, dtype: str, first: bool) -> None:
    model = tiny_model("llama", vocab_size=600, end_id=0).to(DTYPES[dtype])
    engine = engine_of(model, ROOT / "scripts" / "deepspeed" / f"zero{stage}.json")
    batch = collate([0, 1], [[5, 9], [7]], [[10, 11, 0], [12, 0]], max_length=16)

    def step(factor: float) -> tuple[float, bool]:
        engine.backward(engine.forward(batch, StageObjective()).loss * factor, 5)
        return engine.step(1e-2)

    def kept() -> list[torch.Tensor]:
        tensors = [tensor.clone() for tensor in engine.trained_weights().values()]
        return tensors + [leaf.clone() for leaf in tree_leaves(engine.optimizer_state()) if torch.is_tensor(leaf)]

    for _ in range(0 if first else 2):
        norm, applied = step(1.0)
        assert applied and math.isfinite(norm)
    before = kept()
    norm, applied = step(math.inf)
    assert not applied and not math.isfinite(norm)
    after, weights = kept(), len(engine.trained_weights())
    if not first:  # there are moments
        assert len(before) > len(engine.trained_weights())
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    else:  # which may be zeros now
        torch.testing.assert_close(after[:weights], before[:weights], rtol=0, atol=0)
    norm, applied = step(1.0)
    assert applied and math.isfinite(norm)
    moved = [
        float((a.float() - b.float()).abs().max()) for a, b in zip(kept()[:weights], after[:weights], strict=True)
    ]
    assert max(moved) > 1e-3


def test_a_whole_copy_of_a_student_draws_no_random_number_of_the_runs() -> None:
    """Under ZeRO-3; else a run that ranks again, and one that resumes after it, would have other dropout."""
    student = tiny_model("gpt2", vocab_size=600, end_id=0)
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    engine = engine_of(student, ROOT / "scripts" / "deepspeed" / "zero3.json")
    before = torch.get_rng_state()
    copy = engine.gathered(student)
    assert torch.equal(torch.get_rng_state(), before) and copy is not student
    assert {name: tuple(t.shape) for name, t in copy.state_dict().items()} == {
        n: tuple(t.shape) for n, t in weights.items()
    }
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_of_norms_and_biases_do_not_decay(groups: int) -> None:
    matrix, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    found = _groups([matrix, bias][:groups], 0.1)
    assert [(group["params"], group["weight_decay"]) for group in found] == [([matrix], 0.1), ([bias], 0.0)][:groups]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimiser_trains_the_same_curve(folders: Folders, tmp_path: Path, stage: int) -> None:
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    curves = []
    for name in (f"scripts/deepspeed/zero{stage}.json", tmp_path / "zero.json"):
        output_dir = tmp_path / Path(name).stem
        arguments = train_arguments(folders, output_dir, *TWO_EPOCHS, "--deepspeed-config", name)
        result = call(train, arguments)
        assert result.status == 0, result.output
        (path,) = output_dir.glob("*/seed10/metrics.jsonl")
        curves.append([record["loss"] for record in read_jsonl(path) if "loss" in record])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_fp16_at_its_smallest_scale_is_told_from_overflow() -> None:
    class AtTheMinimum:
        def step(self) -> None:
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    engine: Any = object.__new__(Engine)
    engine._optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    engine._engine, engine.scales_loss = AtTheMinimum(), True
    with pytest.raises(RunStopped, match="the run diverges"):
        engine.step(1e-3)
    engine.scales_loss = False
    with pytest.raises(Exception, match="already at minimum"):
        engine.step(1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_run_follows_its_golden_curve(folders: Folders, tmp_path: Path, name: str) -> None:
    """The tolerance is for other processors; a change of a formula or of an order of examples is far larger."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))[name]
    found = curve(folders, tmp_path, name)
    assert len(found) == len(kept)
    for (loss, norm), (kept_loss, kept_norm) in zip(found, kept, strict=True):
        assert loss == pytest.approx(kept_loss, rel=1e-3)
        assert norm == pytest.approx(kept_norm, rel=1e-2)
