"""On-policy distillation: which text is trained on, what its labels are, and that going on changes nothing."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from pocl.common import distributed
from pocl.data.batch import IGNORE
from pocl.data.dataset import load_split
from pocl.data.micro_batches import MicroBatchLimits
from pocl.evaluation.likelihood import mean_cross_entropy
from pocl.models.student import Student
from pocl.training.batches import BatchCutter, GlobalBatch, Texts
from pocl.training.on_policy import OnPolicy, OnPolicyState, StudentTexts
from tests.ranks import on_ranks
from tests.runs import (
    MAX_LENGTH,
    Folders,
    call,
    examples_of,
    read_jsonl,
    train_arguments,
    train_until_stage,
)
from tests.tiny import tiny_tokenizer

LONGEST = MAX_LENGTH - 160


def schedule(mode: str = "mixed", alpha: float = 0.5, buffer_size: int = 0) -> OnPolicy:
    return OnPolicy(mode, alpha, buffer_size, cross_entropy=False, seed=10)  # type: ignore[arg-type]


def sources(settings: OnPolicy, **state: object) -> list[str]:
    state = {"progress": 0.0, "threshold": 0.0, "buffer_full": False} | state
    return [settings.source(step, i, **state) for step in range(500) for i in range(4)]  # type: ignore[arg-type]


def test_mixed_samples_with_its_probability() -> None:
    drawn = sources(schedule(alpha=0.3))
    assert set(drawn) == {"gold", "sample"}
    assert drawn.count("sample") / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert set(sources(schedule(alpha=0.0))) == {"gold"}
    assert set(sources(schedule(alpha=1.0))) == {"sample"}


def test_the_choice_is_the_same_every_time_and_differs_between_steps_and_examples() -> None:
    drawn = sources(schedule())
    assert drawn == sources(schedule())
    assert len(set(map(tuple, np.array(drawn).reshape(500, 4).tolist()))) > 4


def test_adaptive_starts_with_the_data_and_turns_to_the_buffer_as_the_run_goes_on() -> None:
    adaptive = schedule("adaptive", buffer_size=8)
    assert set(sources(adaptive)) == {"gold"}
    early = sources(adaptive, threshold=0.4, buffer_full=True, progress=0.0)
    late = sources(adaptive, threshold=0.4, buffer_full=True, progress=0.9)
    for drawn in (early, late):
        assert drawn.count("gold") / len(drawn) == pytest.approx(0.6, abs=0.03)
    assert "replay" not in early
    assert late.count("sample") / len(late) == pytest.approx(0.04, abs=0.02)
    assert "replay" not in sources(adaptive, threshold=0.4, buffer_full=False, progress=0.9)


def test_the_threshold_rises_only_where_the_dev_loss_did() -> None:
    state = OnPolicyState().after_dev_loss(2.0)
    assert state.threshold == 0.0
    assert state.after_dev_loss(2.05).threshold == 0.0  # within the margin
    risen = state.after_dev_loss(2.2)
    assert risen.threshold == pytest.approx(0.1)
    assert risen.after_dev_loss(1.0).threshold == pytest.approx(0.1)
    for _ in range(20):
        risen = risen.after_dev_loss((risen.last_dev_loss or 0) + 1)
    assert risen.threshold == 1.0


def test_the_threshold_rises_where_the_dev_loss_creeps_up_in_steps_within_the_margin() -> None:
    state = OnPolicyState()
    thresholds = []
    for loss in (2.0, 2.06, 2.12, 2.18, 2.24, 2.3):  # 2.12 and 2.24 are a margin above where it stood before
        state = state.after_dev_loss(loss)
        thresholds.append(state.threshold)
    assert thresholds == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2])


def test_the_buffer_keeps_the_newest_and_survives_json() -> None:
    state = OnPolicyState().add([(i, [i, 0]) for i in range(5)], 3)
    assert [position for position, _ in state.buffer] == [2, 3, 4]
    assert OnPolicyState.from_json(json.loads(json.dumps(dataclasses.asdict(state)))) == state
    drawn = state.draw(3, [1, 2])
    assert sorted(position for position, _ in drawn) == [2, 3, 4]
    assert drawn == state.draw(3, [1, 2])
    assert len(state.draw(7, [1])) == 7


def arguments(folders: Folders, output_dir: Path, *extra: object) -> list[str]:
    """Two stages of 1 and 3 steps."""
    short = ["--num-train", 24, "--num-stages", 2]
    return train_arguments(folders, output_dir, "--type", "tjsd", "--on-policy", "mixed", *short, *extra)


def test_labels_of_student_text_are_its_own_next_tokens(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GlobalBatch] = []
    cut, end = BatchCutter.cut, tiny_tokenizer().eos_token_id

    def watched(self: BatchCutter, texts: Texts, step: int) -> GlobalBatch:
        whole = cut(self, texts, step)
        seen.append(whole)
        found = [example for micro in whole.micro_batches for example in examples_of(micro.batch)]
        assert whole.num_tokens == sum(len(ids) for ids, _ in found)
        assert whole.num_response_tokens == sum(label != IGNORE for _, labels in found for label in labels)
        assert whole.num_student_texts == sum(micro.of_student.sum() for micro in whole.micro_batches)
        for micro in whole.micro_batches:
            rows = self.train.table[micro.positions.tolist()]
            known = zip(
                rows["prompt_ids"], rows["response_ids"], micro.of_student, examples_of(micro.batch), strict=True
            )
            for prompt, gold, of_student, (ids, labels) in known:
                first = len(prompt) - 1
                assert ids[: len(prompt)] == prompt
                assert labels[:first] == [IGNORE] * first
                response = labels[first:]
                assert response[:-1] == ids[len(prompt) :]  # each label is the next input
                assert (response == gold) != of_student
                if of_student:
                    assert end not in response[:-1]
                    assert response[-1] == end or len(response) == LONGEST
        return whole

    monkeypatch.setattr(BatchCutter, "cut", watched)
    assert call(train, arguments(folders, tmp_path, "--num-dev", 0)).status == 0
    mixed = [micro for whole in seen for micro in whole.micro_batches if len(set(micro.of_student)) == 2]
    assert mixed  # a micro-batch holds texts of both kinds
    run = tmp_path / "tjsd" / "seed10"
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["student_texts"] == sum(whole.num_student_texts for whole in seen)
    records = read_jsonl(run / "metrics.jsonl")
    shares = np.array([record["student_text"] for record in records])  # of 8 examples
    assert 0 < shares.mean() < 1 and np.array_equal(8 * shares, (8 * shares).round())


def test_student_text_has_no_cross_entropy_unless_asked_for(folders: Folders, tmp_path: Path) -> None:
    extra = ["--mixed-alpha", 1, "--num-dev", 0, "--epochs", 1]
    assert call(train, arguments(folders, tmp_path / "plain", *extra)).status == 0
    assert call(train, arguments(folders, tmp_path / "asked", *extra, "--on-policy-cross-entropy")).status == 0
    for name in ("plain", "asked"):
        for record in read_jsonl(tmp_path / name / "tjsd" / "seed10" / "metrics.jsonl"):
            r, t = record["kd_ratio"], record["temperature"]
            part = (1 - r) * record["cross_entropy"] if name == "asked" else 0.0
            assert record["loss"] == pytest.approx(part + r * t**2 * record["divergence"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("extra", [["--replay-buffer", 6], ["--on-policy", "adaptive", "--replay-buffer", 4]], ids=str)
def test_a_run_that_is_cut_off_ends_with_the_same_weights(
    folders: Folders, tmp_path: Path, extra: list[object]
) -> None:
    train_until_stage(arguments(folders, tmp_path / "cut", *extra), 1)
    for name in ("cut", "whole"):
        assert call(train, arguments(folders, tmp_path / name, *extra)).status == 0
    for name in ("best/model.safetensors", "ledger.json", "checkpoints/last.json"):
        cut, whole = (tmp_path / run / "tjsd" / "seed10" / name for run in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("extra", [[], ["--replay-buffer", 6]], ids=str)
def test_the_choice_depends_on_neither_ranks_nor_micro_batches(
    folders: Folders, tmp_path: Path, extra: list[object]
) -> None:
    extra = [*extra, "--num-dev", 0]
    assert call(train, arguments(folders, tmp_path / "one", *extra)).status == 0
    assert (
        call(train, arguments(folders, tmp_path / "cut", *extra, "--max-tokens", 300, "--batch-size", 2)).status == 0
    )
    result = on_ranks("train.py", arguments(folders, tmp_path / "two", *extra), num_ranks=2)
    assert result.status == 0, result.output
    runs = [read_jsonl(tmp_path / name / "tjsd" / "seed10" / "metrics.jsonl") for name in ("one", "cut", "two")]
    shares = [[record["student_text"] for record in run] for run in runs]
    assert 0 < np.mean(shares[0]) < 1 and shares[0] == shares[1] == shares[2]
    # The samples are drawn by example, so all see the same text, until rounding tips a draw.
    for run in runs[1:]:
        losses = [[record["loss"] for record in records[:2]] for records in (run, runs[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def texts_of(folders: Folders, plan: OnPolicy, monkeypatch: pytest.MonkeyPatch) -> StudentTexts:
    """The texts of a student that answers example i with so many tokens as i says, all of them 5, 6, ... by call."""
    calls = iter(range(5, 100))

    def answers(student: object, prompts: list[list[int]], ids: list[int], sampling: object) -> list[list[int]]:
        token = next(calls)
        return [[token] * (1 + 7 * i % LONGEST) for i in ids]

    monkeypatch.setattr("pocl.training.on_policy.generate", answers)
    train, student = (
        load_split(folders.data, "train", max_length=MAX_LENGTH),
        SimpleNamespace(tokenizer=tiny_tokenizer()),
    )
    return StudentTexts(plan, train, lambda: student, max_new_tokens=LONGEST, total_steps=10)  # type: ignore[arg-type, return-value]


def cutter_of(texts: StudentTexts) -> BatchCutter:
    return BatchCutter(texts.train, None, MicroBatchLimits(600, None, 64), torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_student_text_is_cut_by_its_own_length_and_alike_on_every_rank(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Also on a rank whose share has no prompt to answer."""
    source = texts_of(folders, schedule(alpha=0.2), monkeypatch)
    ids = {int(i) for i in source.train.ids}
    sampled = [
        i for i in sorted(ids) if source.plan.source(0, i, progress=0, threshold=0, buffer_full=False) == "sample"
    ]
    gold = [i for i in sorted(ids) if i not in sampled]
    chosen = [*sampled[:3], *gold[:13]]  # three answers for four ranks
    position_of = {int(i): position for position, i in enumerate(source.train.ids)}
    examples = np.array([position_of[i] for i in chosen])
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    everybody = {position_of[i]: [5] * (1 + 7 * i % LONGEST) for i in sampled[:3]}
    monkeypatch.setattr(distributed, "gather_by_id", lambda own: everybody)
    texts, _ = source.choose(examples, 0, OnPolicyState())
    whole = cutter_of(source).cut(texts, 0)
    assert whole.num_student_texts == 3
    assert sum(len(micro.positions) for micro in whole.micro_batches) == 4
    shapes = [micro.batch.input_ids.shape for micro in whole.micro_batches]
    assert all(rows == 1 or rows * length <= 600 for rows, length in shapes)
    lengths = sorted(int(length) for micro in whole.micro_batches for length in micro.batch.attention_mask.sum(1))
    rows = [position for micro in whole.micro_batches for position in micro.positions.tolist()]
    answered = {p: min(source.train.prompt_lengths[p] + len(everybody[p]) + 1, MAX_LENGTH) - 1 for p in everybody}
    assert lengths == sorted(int(answered.get(p, source.train.lengths[p])) for p in rows)


def test_adaptive_trains_on_what_it_has_just_sampled_and_mixed_on_the_buffer(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_tokens(settings: OnPolicy) -> list[set[int]]:
        """The tokens that the student's texts of each step are made of."""
        source = texts_of(folders, settings, monkeypatch)
        state, found, end = OnPolicyState(threshold=1.0), [], tiny_tokenizer().eos_token_id
        for step in range(3):
            texts, state = source.choose(np.arange(16), step, state)
            micros = cutter_of(source).cut(texts, step).micro_batches
            labels = [micro.batch.labels[micro.of_student] for micro in micros]
            kept = [tensor[(tensor != IGNORE) & (tensor >= 5)] for tensor in labels]
            found.append({int(token) for tensor in kept for token in tensor} - {end})
        return found

    assert first_tokens(schedule("adaptive", buffer_size=1000)) == [{5}, {6}, {7}]
    mixed = first_tokens(schedule(alpha=1.0, buffer_size=1000))
    assert mixed[0] == {5} and mixed[2] == {5, 6, 7}


def test_the_adaptive_threshold_is_measured_from_the_loss_before_training(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    after_dev_loss = OnPolicyState.after_dev_loss
    monkeypatch.setattr(
        OnPolicyState, "after_dev_loss", lambda self, loss: (seen.append(loss), after_dev_loss(self, loss))[1]
    )
    command = arguments(folders, tmp_path, "--on-policy", "adaptive", "--epochs", 1, "--num-stages", 1)
    assert call(train, command).status == 0
    dev = [r for r in read_jsonl(tmp_path / "tjsd" / "seed10" / "metrics.jsonl") if "dev_cross_entropy" in r]
    assert len(seen) == 2 and seen[1] == dev[-1]["dev_cross_entropy"]
    student = Student.load(str(folders.student))
    split = load_split(folders.data, "dev", max_length=MAX_LENGTH, num_examples=4)
    assert seen[0] == pytest.approx(mean_cross_entropy(student, split, chunk_tokens=64), rel=1e-6)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--mixed-alpha", 1.5], "--mixed-alpha is 1.5"),
        (["--replay-buffer", -1], "--replay-buffer is -1"),
        (["--teacher-cache", "somewhere"], "needs the teacher online"),
        (["--on-policy", "adaptive", "--num-dev", 0], "follows the dev loss"),
    ],
    ids=str,
)
def test_mistakes_are_refused(folders: Folders, tmp_path: Path, extra: list[object], words: str) -> None:
    result = call(train, arguments(folders, tmp_path, *extra))
    assert result.status == 2
    assert words in result.last_line
