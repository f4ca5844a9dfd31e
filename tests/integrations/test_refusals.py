"""What would break a curriculum in a trainer is refused before the first step, with the setting to change."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import pocl
from pocl.data.dataset import Split
from pocl.integrations import checks
from tests.integrations import loops
from tests.runs import Folders


@pytest.fixture(scope="module")
def split(llama: Folders) -> Split:
    return loops.load(llama)


@pytest.fixture(scope="module")
def data(split: Split) -> datasets.Dataset:
    return loops.as_dataset(split)


@pytest.fixture(scope="module")
def ranking(split: Split) -> pocl.Ranking:
    return loops.by_length(split)


class Small(torch.nn.Module):
    """A model that a Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.sum() * input_ids.sum()}


def first(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[row["input_ids"][0]] for row in rows])}


def small(out: Path, data: Any, kind: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    args = loops.arguments("plain", out, **settings)
    return kind(Small(), args, data_collator=first, train_dataset=data)


NEWER = hasattr(TrainingArguments, "train_sampling_strategy")  # than transformers 5.0
BY_LENGTH = {"train_sampling_strategy": "group_by_length"} if NEWER else {"group_by_length": True}
REFUSED = {
    "by length": (BY_LENGTH, "reorders examples by length"),
    "batch size": ({"per_device_train_batch_size": 3}, "takes 3 examples x 1 accumulated x 1 processes"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "takes 16 examples x 2 accumulated"),
    "epochs": ({"num_train_epochs": 3}, "`num_train_epochs` to 1"),
    "steps": ({"max_steps": 5}, "the curriculum is one epoch of 4 steps"),
    "best": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        "compares losses of different stages",
    ),
    "ignore_data_skip": ({"ignore_data_skip": True}, "begin again with the easiest"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_breaks_the_curriculum_is_refused(
    split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path, name: str
) -> None:
    settings, message = REFUSED[name]
    args = loops.arguments("plain", tmp_path, **settings)
    trainer = Trainer(Small(), args, data_collator=first, train_dataset=data, eval_dataset=data)
    with pytest.raises(pocl.UserError, match=message):
        pocl.Curriculum(ranking, loops.schedule(split)).attach(trainer)


def test_packing_is_refused(
    llama: Folders, split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path
) -> None:
    trainer = loops.bare("sft", llama, data, loops.arguments("sft", tmp_path, packing=True))
    with pytest.raises(pocl.UserError, match="set `packing` and `padding_free` to False"):
        pocl.Curriculum(ranking, loops.schedule(split)).attach(trainer)


def test_an_iterable_data_set_is_refused(
    split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path
) -> None:
    trainer = small(tmp_path, data.to_iterable_dataset(), max_steps=loops.STEPS)
    with pytest.raises(pocl.UserError, match="is an iterable data set"):
        pocl.Curriculum(ranking, loops.schedule(split)).attach(trainer)


def test_a_shuffled_selection_is_refused(
    split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path
) -> None:
    curriculum = pocl.Curriculum(ranking, loops.schedule(split))
    selected = curriculum.select(data)
    with pytest.raises(pocl.UserError, match="not in the curriculum's order"):
        curriculum.attach(small(tmp_path, selected.shuffle(seed=1)))
    with pytest.raises(pocl.UserError, match="has 63 examples, the curriculum goes through 64"):
        curriculum.attach(small(tmp_path, selected.select(range(63))))


class OwnLoader(Trainer):
    """A trainer that shuffles in a data loader of its own."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset, batch_size=loops.GLOBAL_BATCH, shuffle=True, collate_fn=self.data_collator
        )


class NoStep(TrainerCallback):
    """Fails if a step begins."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step was begun")


def test_a_loader_with_an_order_of_its_own_is_refused_before_the_first_step(
    split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path
) -> None:
    trainer = small(tmp_path, data, OwnLoader)
    pocl.Curriculum(ranking, loops.schedule(split)).attach(trainer)
    trainer.add_callback(NoStep())
    with pytest.raises(pocl.UserError, match="does not read its data set in order"):
        trainer.train()


def test_a_loop_of_another_kind_is_refused(split: Split, ranking: pocl.Ranking) -> None:
    with pytest.raises(pocl.UserError, match="list is no transformers Trainer"):
        pocl.Curriculum(ranking, loops.schedule(split)).attach([])


def test_an_older_trl_is_refused(
    llama: Folders, split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = loops.bare("sft", llama, data, loops.arguments("sft", tmp_path))
    monkeypatch.setattr(checks, "version", {"transformers": "5.0.0", "trl": "1.9.2"}.get)
    with pytest.raises(pocl.UserError, match='trl 1.9.2 is too old .* "trl>=1.10"'):
        pocl.Curriculum(ranking, loops.schedule(split)).attach(trainer)


def test_a_loss_that_would_have_no_effect_is_refused(
    split: Split, data: datasets.Dataset, ranking: pocl.Ranking, tmp_path: Path
) -> None:
    with pytest.raises(pocl.UserError, match="`loss` would have no effect"):
        trainer = small(tmp_path, data)
        pocl.Curriculum(ranking, loops.schedule(split)).attach(trainer, loss=pocl.DistillationLoss("tfkl"))


def test_other_examples_than_the_ranked_ones_are_named(
    split: Split, data: datasets.Dataset, ranking: pocl.Ranking
) -> None:
    curriculum = pocl.Curriculum(ranking, loops.schedule(split))
    ids = sorted(split.ids.tolist())
    with pytest.raises(pocl.UserError) as missing:
        curriculum.select(data.filter(lambda row: row["id"] not in ids[:5]))
    assert "names 5 examples that the data set does not hold" in str(missing.value)
    assert sum(f"{example}, " in str(missing.value) for example in ids[:5]) == 3
    more = datasets.concatenate_datasets([data, data.select([0]).map(lambda row: {"id": 10**6})])
    with pytest.raises(pocl.UserError, match=r"holds 1 examples that the ranking does not name \(1000000\)"):
        curriculum.select(more)
    with pytest.raises(pocl.UserError, match="the data set has the id .* twice"):
        curriculum.select(datasets.concatenate_datasets([data, data.select([0])]))


def test_a_data_set_without_ids_is_refused(split: Split, data: datasets.Dataset, ranking: pocl.Ranking) -> None:
    with pytest.raises(pocl.UserError, match="no column 'id' .*add_column"):
        pocl.Curriculum(ranking, loops.schedule(split)).select(data.remove_columns("id"))


def test_a_schedule_for_more_examples_is_refused(split: Split, data: datasets.Dataset, ranking: pocl.Ranking) -> None:
    few = data.select(range(40))
    kept = [record for record in ranking.records if record["id"] in set(few["id"])]
    smaller = pocl.Ranking.of(kept, split.ids[:40])
    with pytest.raises(pocl.UserError, match="made for 48 examples, the data set holds 40"):
        pocl.Curriculum(smaller, loops.schedule(split)).select(few)


def test_parts_that_do_not_fit_our_trainer_are_refused(
    llama: Folders, split: Split, ranking: pocl.Ranking, tmp_path: Path
) -> None:
    student, args = pocl.Student.load(str(llama.student)), loops.arguments("pocl", tmp_path)
    curriculum = pocl.Curriculum(ranking, loops.schedule(split))
    with pytest.raises(pocl.UserError, match="`teacher` is None, but tfkl distils"):
        pocl.DistillationTrainer(student, None, curriculum, pocl.DistillationLoss("tfkl"), args=args, train=split)
    with pytest.raises(pocl.UserError, match="fkl has T = 1"):
        loops.distilling(llama, split, curriculum, args, loss=pocl.DistillationLoss("fkl"))


def test_scores_that_cannot_be_ordered_are_refused() -> None:
    rows = [{"id": 1, "reward": 0.5}, {"id": 2, "reward": None}]
    assert [record["id"] for record in pocl.Ranking.of_scores(rows, {"reward": "highest"}).records] == [1, 2]
    with pytest.raises(pocl.UserError, match="row 1 has no column 'rewards'; did you mean 'reward'"):
        pocl.Ranking.of_scores(rows, {"rewards": "highest"})
    with pytest.raises(pocl.UserError, match="it must be 'highest' or 'lowest'"):
        pocl.Ranking.of_scores(rows, {"reward": "up"})
    with pytest.raises(pocl.UserError, match="row 1: 'reward' is nan"):
        pocl.Ranking.of_scores([{"id": 1, "reward": float("nan")}], {"reward": "lowest"})
    with pytest.raises(pocl.UserError, match="row 1 has no column 'id'"):
        pocl.Ranking.of_scores([{"reward": 1.0}], {"reward": "lowest"})


def test_scores_in_both_directions_are_fused_by_hand_count() -> None:
    rows = [
        {"id": 4, "reward": 3.0, "loss": 9.0},
        {"id": 5, "reward": 1.0, "loss": 1.0},
        {"id": 6, "reward": 2.0, "loss": 2.0},
    ]
    ranking = pocl.Ranking.of_scores(rows, {"reward": "highest", "loss": "lowest"})
    # Ranks by reward 1 3 2, by loss 3 1 2: 4 and 5 tie at 1/61 + 1/63, above 6 with 2/62.
    assert [record["id"] for record in ranking.records] == [4, 5, 6]
    assert ranking.order.tolist() == [0, 1, 2]
    assert ranking.scores.tolist() == pytest.approx([1 / 61 + 1 / 63] * 2 + [2 / 62])
