"""Other people's loops under a curriculum do what train.py does, on one process, on two, and resumed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import pocl
import train
from pocl.data.dataset import Split
from pocl.losses.token import Weights
from pocl.training.batches import BatchCutter, GlobalBatch, Texts
from tests.integrations import loops
from tests.integrations.loops import Seen
from tests.ranks import on_ranks
from tests.runs import Folders, call, read_jsonl, train_arguments
from tests.tiny import ROOT

KINDS = ["pocl", "gkd", "gold", "sft"]
WAYS = ["dispatched", "checkpointed", *loops.ZERO]  # of our own trainer, in two processes
SAVED = 2  # steps until a checkpoint within the second stage


@pytest.fixture(scope="module")
def ours(llama: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Path]:
    """A run of train.py: what its steps were, and its folder."""
    out, ids = tmp_path_factory.mktemp("ours"), []
    cut = BatchCutter.cut

    def noting(self: BatchCutter, texts: Texts, step: int) -> GlobalBatch:
        ids.append(sorted(self.train.ids[texts.positions].tolist()))
        return cut(self, texts, step)

    command = ["--num-stages", loops.STAGES, "--epochs", loops.EPOCHS, "--difficulty", "length", "--num-dev", 0]
    command += ["--deepspeed-config", ROOT / "scripts" / "deepspeed" / "zero0.json", "--seed", loops.SEED]
    command += ["--global-batch-size", loops.GLOBAL_BATCH]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchCutter, "cut", noting)
        result = call(train, train_arguments(llama, out, *command))
    assert result.status == 0, result.output
    run = out / "tfkl" / f"seed{loops.SEED}"
    return Seen([record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record], ids), run


@dataclass
class Ended:
    """A trainer's run: what it saw, its weights, and the checkpoint that it left on the way."""

    seen: Seen
    weights: dict[str, torch.Tensor]
    checkpoint: Path


@pytest.fixture(scope="module")
def ended(llama: Folders, ours: tuple[Seen, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Each trainer in one process, with two accumulated micro-batches, ranked by the run's own file."""
    out, split, found = tmp_path_factory.mktemp("alone"), loops.load(llama), {}
    for kind in KINDS:
        saving = {"accumulation": 2, "save_strategy": "steps", "save_steps": SAVED}
        trainer = loops.make(kind, llama, out, ours[1] / "difficulty.jsonl", **saving)
        seen = loops.watch(trainer, split)
        found[kind] = Ended(seen, trainer.model.state_dict(), out / kind / f"checkpoint-{SAVED}")
    return found


@pytest.fixture(scope="module")
def alone(ended: dict[str, Ended]) -> dict[str, Seen]:
    """What each trainer saw in one process."""
    return {kind: run.seen for kind, run in ended.items()}


@pytest.fixture(scope="module")
def two_processes(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in two processes, without accumulation, and a ranking there."""
    output = tmp_path_factory.mktemp("together") / "seen.json"
    result = on_ranks("tests/integrations/loops.py", [pair, output, 1, *KINDS, *WAYS], num_ranks=2)
    assert result.status == 0, result.output
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def together(two_processes: dict[str, Any]) -> dict[str, Seen]:
    """What each trainer saw in two processes."""
    return {kind: Seen(**seen) for kind, seen in two_processes["seen"].items()}


def values(seen: Seen, name: str) -> list[float]:
    return [record[name] for record in seen.logs]


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_has_the_examples_t_r_pool_and_rate_of_train_py(
    ours: tuple[Seen, Path], alone: dict[str, Seen], together: dict[str, Seen], kind: str
) -> None:
    wanted = ours[0]
    for found in (alone[kind], together[kind]):
        assert found.ids == wanted.ids and len(found.ids) == loops.STEPS
        for name in ("stage", "pool", "temperature", "kd_ratio"):
            assert values(found, name) == values(wanted, name)
        assert values(found, "learning_rate") == values(wanted, "lr")


@pytest.mark.parametrize("kind", ["pocl", "gkd", "gold"])
def test_losses_and_gradients_are_those_of_train_py(
    ours: tuple[Seen, Path], alone: dict[str, Seen], together: dict[str, Seen], kind: str
) -> None:
    for found in (alone[kind], together[kind]):
        assert values(found, "loss") == pytest.approx(values(ours[0], "loss"), rel=2e-5)
        assert values(found, "grad_norm") == pytest.approx(values(ours[0], "gradient_norm"), rel=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_dispatch_recomputed_activations_and_deepspeed_change_nothing(together: dict[str, Seen], way: str) -> None:
    found, wanted = together[way], together["pocl"]
    assert found.ids == wanted.ids and len(found.logs) == loops.STEPS
    for name in ("stage", "pool", "temperature", "kd_ratio", "learning_rate"):
        assert values(found, name) == values(wanted, name)
    assert values(found, "loss") == pytest.approx(values(wanted, "loss"), rel=2e-5)
    if way != "zero0":  # where DeepSpeed tells no norm
        assert values(found, "grad_norm") == pytest.approx(values(wanted, "grad_norm"), rel=2e-4)


def test_adapters_alone_are_trained(llama: Folders, ours: tuple[Seen, Path], tmp_path: Path) -> None:
    split, student = loops.load(llama), pocl.Student.load(str(llama.student))
    frozen = {name: weight.clone() for name, weight in student.model.state_dict().items()}
    model = get_peft_model(student.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    curriculum = pocl.Curriculum(ours[1] / "difficulty.jsonl", loops.schedule(split))
    teacher, loss = pocl.Teacher.open(str(llama.teacher)), pocl.DistillationLoss("tfkl")
    args = loops.arguments("pocl", tmp_path)
    adapted = student.with_model(model)
    trainer = pocl.DistillationTrainer(adapted, teacher, curriculum, loss, args=args, train=split)
    seen = loops.watch(trainer, split)
    assert seen.ids == ours[0].ids and seen.logs[0]["loss"] == pytest.approx(ours[0].logs[0]["loss"], rel=2e-5)
    weights = model.get_base_model().state_dict()
    assert all(torch.equal(weights.get(name, weights.get(base_name(name))), frozen[name]) for name in frozen)
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)


def base_name(name: str) -> str:
    """What peft calls a weight that it has wrapped."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}"


def test_our_trainer_logs_the_parts_of_the_loss(ours: tuple[Seen, Path], together: dict[str, Seen]) -> None:
    for name in ("cross_entropy", "divergence"):
        assert values(together["pocl"], name) == pytest.approx(values(ours[0], name), rel=2e-5)


def test_fine_tuning_is_the_same_on_two_processes(alone: dict[str, Seen], together: dict[str, Seen]) -> None:
    assert values(together["sft"], "loss") == pytest.approx(values(alone["sft"], "loss"), rel=2e-5)
    assert values(together["sft"], "grad_norm") == pytest.approx(values(alone["sft"], "grad_norm"), rel=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_within_a_stage_ends_with_the_same_weights(
    llama: Folders, ours: tuple[Seen, Path], ended: dict[str, Ended], tmp_path: Path, kind: str
) -> None:
    resumed = loops.make(kind, llama, tmp_path, ours[1] / "difficulty.jsonl", accumulation=2)
    resumed.train(resume_from_checkpoint=str(ended[kind].checkpoint))
    assert resumed.state.global_step == loops.STEPS and resumed.state.log_history[SAVED]["stage"] == 1
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in ended[kind].weights.items())


def test_a_ranking_by_two_processes_is_that_of_one(llama: Folders, two_processes: dict[str, Any]) -> None:
    alone = loops.ranked_by_student(llama)
    assert [record["id"] for record in two_processes["ranked"]] == [record["id"] for record in alone]
    for name in ("rouge_l", "cross_entropy"):
        found = [record[name] for record in two_processes["ranked"]]
        assert found == pytest.approx([record[name] for record in alone], rel=1e-6)


def test_trls_distillation_of_sampled_text_follows_pool_and_temperature(llama: Folders, tmp_path: Path) -> None:
    split = loops.load(llama)
    prompts = datasets.Dataset.from_dict(
        {"id": split.ids.tolist(), "prompt": [f"number {number}:" for number in split.ids.tolist()]}
    )
    args = loops.arguments("on-policy", tmp_path, accumulation=2)
    trainer = loops.bare("on-policy", llama, prompts, args)
    curriculum = pocl.Curriculum(loops.by_length(split), loops.schedule(split))
    curriculum.attach(trainer)
    compute_loss, seen, temperatures = trainer.compute_loss, [], []

    def noting(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **others: Any) -> torch.Tensor:
        pairs = zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        texts = [trainer.processing_class.decode(row[mask.bool()]) for row, mask in pairs]
        seen.append([int(text.removeprefix("number ").removesuffix(":")) for text in texts])
        temperatures.append(trainer.temperature)
        return compute_loss(model, inputs, **others)

    trainer.compute_loss = noting
    trainer.train()
    wanted = [sorted(split.ids[update.examples].tolist()) for update in curriculum.updates]
    assert [sorted(a + b) for a, b in zip(seen[::2], seen[1::2], strict=True)] == wanted
    assert temperatures == [update.stage.temperature for update in curriculum.updates for _ in range(2)]


def test_selective_reliance_weighs_each_example_by_its_rank(llama: Folders, tmp_path: Path) -> None:
    split = loops.load(llama)
    ranking = loops.by_length(split)
    chosen = loops.schedule(split, reliance=pocl.Reliance("linear"))
    trainer = loops.distilling(
        llama, split, pocl.Curriculum(ranking, chosen), loops.arguments("pocl", tmp_path, max_steps=-1)
    )
    update = trainer.curriculum.updates[0]
    trainer.follow(update)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    num_tokens = torch.tensor(7.0)
    found = trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=num_tokens)
    wanted = naive_loss(trainer, split, inputs["positions"].numpy(), ranking.order, update.stage.kd_ratio)
    assert found.item() == pytest.approx(wanted.item() / 7.0, rel=1e-5)


def naive_loss(
    trainer: pocl.DistillationTrainer, split: Split, positions: np.ndarray, order: np.ndarray, ratio: float
) -> torch.Tensor:
    """The sum over examples of (1 - λ) CE + λ KL at T = 1, λ = r times the rank's percentile; one by one."""
    rank = {int(position): place for place, position in enumerate(order)}
    total = torch.zeros(())
    for position in positions.tolist():
        batch = split.batch([position])
        ids = batch.input_ids
        with torch.no_grad():
            q, p = (
                model(input_ids=ids).logits[0].log_softmax(-1)[..., : len(trainer.processing_class)]
                for model in (trainer.model, trainer.teacher.model)
            )
        share = ratio * rank[position] / (len(split) - 1)
        for at in batch.response_positions.tolist():
            cross_entropy = -q[at, batch.labels[0, at]]
            divergence = (p[at].exp() * (p[at] - q[at])).sum()
            total = total + (1 - share) * cross_entropy + share * divergence
    return total


def test_the_weights_of_tokens_without_cross_entropy_reach_the_objective_of_logits() -> None:
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    weights = Weights(torch.full((5,), 0.7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    loss = pocl.DistillationLoss("tfkl").of_logits(student, teacher, torch.arange(5), temperature=2.0, weights=weights)
    loss.loss.backward()
    q, p = ((logits.detach() / 2.0).log_softmax(-1) for logits in (student, teacher))
    assert loss.loss.item() == pytest.approx(0.7 * 4 * float((p.exp() * (p - q)).sum()), rel=1e-12)
    # Of KL(p || q) w.r.t. the logits: (q - p) / T.
    assert torch.allclose(student.grad, 0.7 * 4 * (q.exp() - p.exp()) / 2.0, atol=1e-12)
