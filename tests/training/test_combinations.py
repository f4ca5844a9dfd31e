"""Pairs of options that may meet, on a tiny model for a few steps: finite losses, right pools, right targets."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

import train
from pocl.curriculum.schedule import Update
from pocl.curriculum.stages import CURRICULA
from pocl.data.batch import IGNORE
from pocl.difficulty.ranking import SIGNALS
from pocl.losses.divergences import LOSSES
from pocl.training.batches import BatchCutter, GlobalBatch, MicroBatch, Texts
from tests.runs import Folders, call, examples_of, read_jsonl, train_arguments

# These have runs of their own: test_updates.py, test_pass_rate.py, test_metrics.py.
OWN = {"exposure-matched", "pass-rate", "chrf", "token-f1", "exact-match", "rouge-1", "rouge-2"}
FACTORS: dict[str, list[Any]] = {
    "type": ["sft", "fkl", *(f"t{name}" for name in ("fkl", "rkl", "jsd", "tvd", "sfkl", "srkl"))],
    "difficulty": [name for name in SIGNALS if name not in OWN],
    "curriculum": [name for name in CURRICULA if name not in OWN],
    "on-policy": ["off", "mixed", "adaptive"],
    "rerank": ["off", "stage", "epoch"],
    "selective-reliance": ["off", "hard", "linear"],
    "restart-optimizer": ["true", "false"],
    "advance": ["interval", "converged"],
    "teacher-cache": ["auto", "off"],
    "lora-rank": [None, 2],
}
# A divergence is one function of two distributions. Which one it is meets what weighs it and where its teacher is; the
# rest of a run meets tfkl alone.
ALIKE = {f"t{name}" for name in ("rkl", "jsd", "tvd", "sfkl", "srkl")}
APART = {"difficulty", "curriculum", "rerank", "restart-optimizer", "advance", "lora-rank"}
Choice = dict[str, Any]


def allowed(choice: Choice) -> bool:
    """Whether train.py takes the options together; the rest is refused, and tested so in test_bad_input."""
    teacherless = choice["type"] == "sft"
    if teacherless and (choice["on-policy"] != "off" or choice["selective-reliance"] != "off"):
        return False
    if teacherless and choice["difficulty"] == "teacher":
        return False
    return not (choice["difficulty"] == "snapshot" and choice["rerank"] == "off")


def pairs(choice: Choice) -> set[tuple[str, Any, str, Any]]:
    """Every two options of a choice."""
    return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(FACTORS, 2)}


def completions(dice: random.Random, fixed: Choice, count: int) -> list[Choice]:
    """Allowed choices that hold ``fixed``, drawn at random."""
    drawn = [{name: dice.choice(values) for name, values in FACTORS.items()} | fixed for _ in range(count)]
    return [choice for choice in drawn if allowed(choice)]


def pairwise(seed: int = 0) -> list[Choice]:
    """Choices that together hold every pair of options that some allowed choice holds; greedy, the same every time."""
    dice = random.Random(seed)
    missing = set()
    for a, b in itertools.combinations(FACTORS, 2):
        for one, other in itertools.product(FACTORS[a], FACTORS[b]):
            if one in ALIKE and b in APART:
                continue
            if completions(dice, {a: one, b: other}, 200):
                missing.add((a, one, b, other))
    chosen = []
    while missing:
        a, one, b, other = min(missing, key=str)
        best = max(completions(dice, {a: one, b: other}, 200), key=lambda choice: len(pairs(choice) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


CHOICES = pairwise()


def named(choice: Choice) -> str:
    return "-".join(map(str, choice.values()))


def test_the_choices_hold_every_value_and_every_divergence() -> None:
    for name, values in FACTORS.items():
        assert {choice[name] for choice in CHOICES} == set(values)
    assert {loss.family for loss in LOSSES.values()} == {LOSSES[name].family for name in FACTORS["type"][2:]}


@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_options_work_together(
    choice: Choice, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[list[int], GlobalBatch, Any]] = []
    cut, step = BatchCutter.cut, train.Trainer.step

    def watched(self: BatchCutter, texts: Texts, number: int) -> GlobalBatch:
        batches.append(cut(self, texts, number))
        return batches[-1]

    def stepped(self: train.Trainer, update: Update, following: Update | None) -> Any:
        result = step(self, update, following)
        steps.append((self.train.ids[update.examples].tolist(), batches[-1], self.train))
        return result

    batches: list[GlobalBatch] = []
    monkeypatch.setattr(BatchCutter, "cut", watched)
    monkeypatch.setattr(train.Trainer, "step", stepped)
    flags = [word for name, value in choice.items() if value is not None for word in (f"--{name}", value)]
    needs_dev = choice["on-policy"] == "adaptive" or choice["advance"] == "converged"
    flags += ["--num-train", 16, "--num-stages", 2, "--num-dev", 2 if needs_dev else 0, "--patience", 1]
    result = call(train, train_arguments(folders, tmp_path, *flags, teacher=choice["type"] != "sft"))
    assert result.status == 0, result.output
    run = tmp_path / choice["type"] / "seed10"
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]
    assert len(records) == len(steps) >= 2
    assert all(math.isfinite(record["loss"]) and record["gradient_norm"] > 0 for record in records)
    check_pools(choice, run, records, [ids for ids, _, _ in steps])
    for _, whole, split in steps:
        for micro in whole.micro_batches:
            check_targets(micro, split)
    student_texts = sum(whole.num_student_texts for _, whole, _ in steps)
    assert json.loads((run / "ledger.json").read_text())["student_texts"] == student_texts
    assert student_texts == 0 or choice["on-policy"] != "off"


def check_pools(choice: Choice, run: Path, records: list[dict[str, Any]], steps: list[list[int]]) -> None:
    """Each step's examples are of its stage's pool, under the ranking that was in force."""
    stages = json.loads((run / "stages.json").read_text())
    scheme = CURRICULA[choice["curriculum"]]
    trained: set[int] = set()
    for record, ids in zip(records, steps, strict=True):
        start, stop = stages[record["stage"]]["pool"]
        assert record["pool"] == stop - start and len(ids) == len(set(ids)) == 8
        places = [
            f"difficulty-stage{record['stage'] + 1}-epoch1",
            f"difficulty-stage{record['stage'] + 1}",
            "difficulty",
        ]
        rankings = [run / f"{place}.jsonl" for place in places if (run / f"{place}.jsonl").is_file()]
        if scheme.order != "ranked" or not rankings:
            continue
        order = [row["id"] for row in read_jsonl(rankings[0])]
        if scheme.left_behind:  # what was trained on before stays behind
            behind = trained if start else set()
            pool = [i for i in order if i not in behind][: stop - start]
            trained |= set(pool) if stop < len(order) else set()
        else:
            pool = order[start:stop]
        assert set(ids) <= set(pool)


def check_targets(micro: MicroBatch, split: Any) -> None:
    """Every label is the next token of the example's own prompt and response; gold text has gold targets."""
    rows = split.table[micro.positions.tolist()]
    known = zip(rows["prompt_ids"], rows["response_ids"], micro.of_student, strict=True)
    for (prompt, gold, of_student), (inputs, labels) in zip(known, examples_of(micro.batch), strict=True):
        first = len(prompt) - 1
        response = labels[first:]
        assert inputs[: len(prompt)] == prompt and response and IGNORE not in response
        assert labels[:first] == [IGNORE] * first
        assert inputs[len(prompt) :] == response[:-1]
        if not of_student:
            assert response == gold
