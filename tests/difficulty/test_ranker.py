"""Every signal against a naive computation; rankings in memory, resumed in a folder, known in a run."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from pocl.common.errors import UserError
from pocl.curriculum.stages import plan_stages
from pocl.data.batch import collate
from pocl.data.dataset import Split, load_split
from pocl.difficulty.measuring import ScoringSettings
from pocl.difficulty.ranker import Ranker, measures_nothing, new_ranking, rank
from pocl.difficulty.ranking import COLUMNS, SIGNALS, columns_of, rank_examples
from pocl.difficulty.ranking_file import read_ranking, write_ranking
from pocl.difficulty.training_losses import TrainingLosses
from pocl.generation.decoding import BuiltIn
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from tests.difficulty.naive import reference_losses
from tests.runs import (
    MAX_LENGTH,
    MAX_PROMPT,
    Folders,
)

SETTINGS = ScoringSettings(max_new_tokens=MAX_LENGTH - MAX_PROMPT, batch_size=16)


def test_every_column_belongs_to_a_signal() -> None:
    assert set(columns_of(list(SIGNALS))) == set(COLUMNS)
    assert columns_of(["length", "student", "rouge-l"]) == ["rouge_l", "cross_entropy", "response_tokens"]


def test_an_example_without_a_value_is_behind_those_with_one() -> None:
    measured = [{"id": 3, "snapshot_cross_entropy": None}, {"id": 5, "snapshot_cross_entropy": 9.0}]
    measured += [{"id": 1, "snapshot_cross_entropy": None}, {"id": 2, "snapshot_cross_entropy": 1.0}]
    records = rank_examples(measured, ["snapshot_cross_entropy"])
    assert [record["id"] for record in records] == [2, 5, 1, 3]
    assert [record["snapshot_cross_entropy_rank"] for record in records] == [1, 2, 3, 4]


def test_teacher_and_length_are_fused_as_a_naive_count_has_it(gpt2: Folders, split: Split) -> None:
    teacher = Teacher.open(str(gpt2.teacher))
    ranked = rank(split, None, signals=["teacher", "length"], teacher=teacher)
    losses = reference_losses(gpt2, gpt2.teacher)
    lengths = {r["id"]: len(r["response_ids"]) for r in datasets.load_from_disk(str(gpt2.data / "train"))}
    for record in ranked.records:
        assert record["teacher_cross_entropy"] == pytest.approx(losses[record["id"]], rel=1e-5)
        assert record["response_tokens"] == lengths[record["id"]]
        assert "answer" not in record  # nothing was generated
    ids = sorted(losses)
    ranks = [sorted(ids, key=lambda i: (values[i], i)) for values in (losses, lengths)]
    score = {i: sum(1 / (61 + places.index(i)) for places in ranks) for i in ids}
    wanted = sorted(ids, key=lambda i: (-score[i], i))
    assert split.ids[ranked.order].tolist() == [record["id"] for record in ranked.records] == wanted
    assert ranked.scores.tolist() == pytest.approx([score[i] for i in wanted], abs=1e-12)


class Stopped(Exception):
    """Where a pass is cut off."""


@pytest.mark.parametrize("signals", [["student"], ["teacher", "rouge-l", "snapshot"]])
def test_a_ranking_is_the_same_in_memory_and_resumed_in_a_folder_where_nothing_is_left(
    gpt2: Folders,
    split: Split,
    student: Student,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: list[str],
) -> None:
    teacher = Teacher.open(str(gpt2.teacher))
    known = {"signals": signals, "teacher": teacher, "losses": np.arange(48.0) % 7, "settings": SETTINGS}
    wanted, answer, asked = rank(split, student, **known), BuiltIn.__call__, []

    def stopped(self: BuiltIn, *arguments: object) -> object:
        asked.append(len(arguments[1]))  # type: ignore[arg-type]
        if len(asked) == 3:
            raise Stopped
        return answer(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BuiltIn, "__call__", stopped)
    with pytest.raises(Stopped):
        rank(split, student, folder=tmp_path / "passes", **known)
    found = rank(split, student, folder=tmp_path / "passes", **known)
    assert asked == [16, 16, 16, 16]  # two blocks were kept, the third was asked for again
    assert found.order.tolist() == wanted.order.tolist() and found.order.dtype == np.int64
    assert found.scores.tolist() == wanted.scores.tolist()
    assert found.records == wanted.records
    assert list(tmp_path.iterdir()) == []


def test_a_ranking_leaves_alone_what_others_keep_in_its_folder(split: Split, student: Student, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    rank(split, student, signals=["cross-entropy"], folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_pass_over_other_texts_is_not_resumed(gpt2: Folders, split: Split, student: Student) -> None:
    shorter = load_split(gpt2.data, "train", max_length=MAX_LENGTH - 1)
    fewer = load_split(gpt2.data, "train", max_length=MAX_LENGTH, num_examples=47)
    other = Split(split.table.map(lambda row: {"response_ids": row["response_ids"][::-1]}), MAX_LENGTH)
    assert len({json.dumps(one.key) for one in (split, shorter, fewer, other)}) == 4
    assert load_split(gpt2.data, "train", max_length=MAX_LENGTH).key == split.key
    assert (
        Split(split.table, MAX_LENGTH).fingerprint == Split(split.table, MAX_LENGTH).fingerprint != other.fingerprint
    )


@pytest.mark.parametrize(
    ("signals", "told"),
    [
        (["lenght"], "unknown signal 'lenght'; did you mean 'length'"),
        ([], "`signals` names none"),
        (["rouge-l"], "give `student`"),
        (["teacher"], "give `teacher`"),
        (["snapshot"], "give `losses`"),
    ],
)
def test_a_signal_without_what_measures_it_is_refused(split: Split, signals: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        rank(split, None, signals=signals)


def test_a_ranking_is_the_same_read_from_its_file(split: Split, tmp_path: Path) -> None:
    ranked = rank(split, None, signals=["length", "snapshot"], losses=np.array([np.nan, *range(47)]))
    write_ranking(tmp_path / "difficulty.jsonl", ranked)
    again = read_ranking(tmp_path / "difficulty.jsonl", split)
    assert again.order.tolist() == ranked.order.tolist() and again.scores.tolist() == ranked.scores.tolist()
    assert again.records == ranked.records


def test_a_ranker_knows_what_was_made_and_forgets_what_came_later(split: Split, tmp_path: Path) -> None:
    made = Ranker(tmp_path, split, signals=["snapshot"], rerank="epoch")
    never = pytest.fail
    assert made.rank("difficulty", never, np.full(48, np.nan)) is None  # nothing is known of any example
    names = ["difficulty-stage1-epoch2", "difficulty-stage2-epoch1", "difficulty-stage10-epoch1"]
    losses = [np.random.default_rng(seed).permutation(48) / 7 for seed in range(3)]
    ranked = [made.rank(name, never, values) for name, values in zip(names, losses, strict=True)]
    assert made.rank(names[0], never, losses[2]).records == ranked[0].records  # type: ignore[union-attr]
    (tmp_path / "difficulty-mine.jsonl").write_text("")  # a person's
    again = Ranker(tmp_path, split, signals=["snapshot"], rerank="epoch")
    for name, ranking in zip(names, ranked, strict=True):
        assert again.known(name).order.tolist() == ranking.order.tolist()  # type: ignore[union-attr]
    assert again.known("difficulty") is None and again.known("difficulty-mine") is None and again.known(None) is None
    again.forget_after(1, 0)
    assert [name for name in names if again.known(name)] == names[:2]
    again.forget_after(0, -1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["difficulty-mine.jsonl"]


def test_cross_entropy_alone_generates_nothing(gpt2: Folders, split: Split, student: Student) -> None:
    records = rank(split, student, signals=["cross-entropy"], settings=SETTINGS).records
    losses = reference_losses(gpt2, gpt2.student)
    assert [record["id"] for record in records] == sorted(losses, key=lambda i: losses[i])
    assert all("answer" not in record and "rouge_l" not in record for record in records)


def test_a_snapshot_keeps_the_last_loss_of_each_example() -> None:
    snapshot = TrainingLosses(4)
    both = collate([22, 20], [[5], [6, 7]], [[8, 9], [4]], max_length=8)  # two response tokens and one
    snapshot.note(np.array([2, 0]), np.array([False, False]), both, torch.tensor([1.0, 3.0, 5.0]))
    snapshot.note(np.array([2]), np.array([False]), collate([22], [[5]], [[8]], max_length=8), torch.tensor([7.0]))
    snapshot.note(np.array([2]), np.array([True]), collate([22], [[5]], [[8]], max_length=8), torch.tensor([9.0]))
    assert np.isnan(snapshot.values).all()
    snapshot.share()
    assert snapshot.as_json() == [5.0, None, 7.0, None]
    again = TrainingLosses(4)
    again.restore(snapshot.as_json())
    assert again.as_json() == snapshot.as_json()


def test_a_loss_that_is_not_finite_changes_no_difficulty() -> None:
    snapshot = TrainingLosses(2)
    snapshot.restore([3.0, None])
    both = collate([20, 21], [[5], [6]], [[8], [4]], max_length=8)
    snapshot.note(np.array([0, 1]), np.array([False, False]), both, torch.tensor([torch.inf, torch.nan]))
    snapshot.share()
    assert snapshot.as_json() == [3.0, None]


def test_a_ranker_asks_for_rankings_only_where_it_was_told_to() -> None:
    stages = plan_stages(8, curriculum="baby-step", num_stages=2, epochs=2, temperature=[1.0], kd_ratio=[1.0])

    def names(rerank: str) -> list[str | None]:
        return [new_ranking(rerank, stage.index, epoch) for stage in stages for epoch in range(2)]

    assert names("off") == [None, None, None, None]
    assert names("stage") == [None, None, "difficulty-stage2", None]
    wanted = [None, "difficulty-stage1-epoch2", "difficulty-stage2-epoch1", "difficulty-stage2-epoch2"]
    assert names("epoch") == wanted


def test_answers_that_tell_no_example_from_another_are_said() -> None:
    varied = [{"answer": f"answer {i}", "rouge_l": i / 40} for i in range(40)]
    assert measures_nothing(varied) is None
    assert measures_nothing([{"answer": "the", "rouge_l": 0.0}] * 19) is None  # too few to say
    assert measures_nothing([{"cross_entropy": 1.0}] * 40) is None  # nobody answered
    said = measures_nothing([{"answer": "the", "rouge_l": 0.0}] * 39 + varied[:1])
    assert said and "40 prompts got 2 different answers, and 40 of them have ROUGE-L 0.00" in said
    # different words that all miss
    assert measures_nothing([record | {"rouge_l": 0.0} for record in varied])
