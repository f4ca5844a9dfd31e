"""On-policy distillation: which text is trained on, what its labels are, and that going on changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from pocl import distributed
from pocl.data import IGNORE, load_split
from pocl.on_policy import OnPolicy, OnPolicyState
from pocl.texts import Text, TextSource
from tests.runs import (
    MAX_LENGTH,
    Folders,
    call,
    examples_of,
    launch,
    make_folders,
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
    return [settings.source(step, micro, **state) for step in range(500) for micro in range(4)]  # type: ignore[arg-type]


def test_mixed_samples_with_its_probability() -> None:
    drawn = sources(schedule(alpha=0.3))
    assert set(drawn) == {"gold", "sample"}
    assert drawn.count("sample") / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert set(sources(schedule(alpha=0.0))) == {"gold"}
    assert set(sources(schedule(alpha=1.0))) == {"sample"}


def test_the_choice_is_the_same_every_time_and_differs_between_steps_and_micro_batches() -> None:
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
    assert OnPolicyState.from_json(json.loads(json.dumps(state.as_json()))) == state
    drawn = state.draw(3, [1, 2])
    assert sorted(position for position, _ in drawn) == [2, 3, 4]
    assert drawn == state.draw(3, [1, 2])
    assert len(state.draw(7, [1])) == 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("on-policy"), "gpt2")


def arguments(folders: Folders, output_dir: Path, *extra: object) -> list[str]:
    return train_arguments(folders, output_dir, "--type", "tjsd", "--on-policy", "mixed", "--num-train", 32, *extra)


def test_labels_of_student_text_are_its_own_next_tokens(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Text] = []
    of_step = TextSource.of_step

    def watched(self: TextSource, examples: np.ndarray, step: int) -> list[Text]:
        texts = of_step(self, examples, step)
        seen.extend(texts)
        for text in texts:
            rows = self.train.table[[int(position) for position in text.positions]]
            known = zip(rows["prompt_ids"], rows["response_ids"], examples_of(text.batch), strict=True)
            for prompt, gold, (ids, labels) in known:
                first = len(prompt) - 1
                assert ids[: len(prompt)] == prompt
                assert labels[:first] == [IGNORE] * first
                response = labels[first:]
                assert response[:-1] == ids[len(prompt) :]  # each label is the next input
                assert (response == gold) != text.of_student
                if text.of_student:
                    end = self.tokenizer.eos_token_id
                    assert end not in response[:-1]
                    assert response[-1] == end or len(response) == LONGEST
        return texts

    monkeypatch.setattr(TextSource, "of_step", watched)
    assert call(train, arguments(folders, tmp_path, "--num-dev", 0)).status == 0
    share = np.mean([text.of_student for text in seen])
    assert 0.1 < share < 0.9
    run = tmp_path / "tjsd" / "seed10"
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["student_texts"] == sum(len(text.positions) for text in seen if text.of_student)
    records = read_jsonl(run / "metrics.jsonl")
    shares = np.array([record["student_text"] for record in records])  # of 8 examples, in micro-batches
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
    train_until_stage(arguments(folders, tmp_path / "cut", *extra), 2)
    for name in ("cut", "whole"):
        assert call(train, arguments(folders, tmp_path / name, *extra)).status == 0
    for name in ("best/model.safetensors", "ledger.json", "checkpoints/last.json"):
        cut, whole = (tmp_path / run / "tjsd" / "seed10" / name for run in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes()


def test_two_ranks_choose_alike_and_train_the_same_curve(folders: Folders, tmp_path: Path) -> None:
    # The ranks have other micro-batches than one has: with alpha 1 the choice cannot differ, the samples could.
    extra = ["--mixed-alpha", 1, "--num-dev", 0, "--max-tokens", 600]
    assert call(train, arguments(folders, tmp_path / "one", *extra)).status == 0
    result = launch("train.py", arguments(folders, tmp_path / "two", *extra), num_ranks=2)
    assert result.status == 0, result.output
    one, two = (
        [record["loss"] for record in read_jsonl(tmp_path / name / "tjsd" / "seed10" / "metrics.jsonl")]
        for name in ("one", "two")
    )
    # The samples are drawn by example, so both see the same text, until rounding tips a draw.
    assert two[:2] == pytest.approx(one[:2], rel=1e-3)


@pytest.mark.parametrize("widest", [0, MAX_LENGTH - 1])
def test_student_text_is_cut_by_its_own_length_and_alike_on_every_rank(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, widest: int
) -> None:
    """Beside a rank whose answers are all as short or as long as can be."""
    split = load_split(folders.data, "train", max_length=MAX_LENGTH)

    def answers(model: object, prompts: list[list[int]], ids: list[int], **_: object) -> list[list[int]]:
        return [[5] * (1 + 7 * i % LONGEST) for i in ids]

    monkeypatch.setattr("pocl.texts.generate", answers)
    monkeypatch.setattr(distributed, "gather_by_id", lambda own: own | {1: np.full_like(own[0], widest)})
    source = TextSource(
        split,
        tiny_tokenizer(),
        on_policy=schedule(alpha=1.0),
        student=lambda: None,  # type: ignore[arg-type, return-value]
        max_tokens=600,
        batch_size=None,
        packed=False,
        max_new_tokens=LONGEST,
        total_steps=1,
        device=torch.device("cpu"),
    )
    texts = source.of_step(np.arange(16), 0)
    assert all(text.of_student for text in texts)
    assert sorted(int(position) for text in texts for position in text.positions) == list(range(16))
    rows, lengths = zip(*(text.batch.input_ids.shape for text in texts), strict=True)
    assert all(count * max(length, widest) <= 600 for count, length in zip(rows, lengths, strict=True))
    assert max(rows) > 600 // MAX_LENGTH or widest


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
