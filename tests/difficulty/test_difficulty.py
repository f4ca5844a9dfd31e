"""Runs by every difficulty signal; ranking again; stages that end when they have converged."""

import json
import os
import shutil
import signal
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from pocl.curriculum.schedule import Reliance, Schedule, unranked_order
from pocl.curriculum.stages import CURRICULA, Stage, plan_stages
from pocl.difficulty import ranker
from pocl.difficulty.measuring import Column, Request, Values
from pocl.difficulty.ranking import COLUMNS, FILES, SIGNALS
from pocl.training.batches import BatchCutter, Texts
from pocl.training.checkpoints import Checkpoints
from pocl.training.position import DevScores, EpochEnd, Position, after_epoch
from pocl.training.run_folder import RunFolder
from tests.difficulty.naive import reference_losses
from tests.runs import (
    Folders,
    call,
    read_jsonl,
    train_arguments,
    train_until_stage,
)
from tools import plot_difficulty, report

FROZEN = ["--lr", 1e-30, "--min-lr", 0, "--num-dev", 0]  # the student stays as it is


def run(folders: Folders, output_dir: Path, *extra: object) -> Path:
    result = call(train, train_arguments(folders, output_dir, *extra))
    assert result.status == 0, result.output
    return output_dir / "tfkl" / "seed10"


def order(run_dir: Path, name: str = "difficulty") -> list[int]:
    return [record["id"] for record in read_jsonl(run_dir / f"{name}.jsonl")]


def test_a_new_signal_is_its_column_and_its_name(
    gpt2: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, diagnostics, picture and report take it from there."""

    def measure(request: Request, columns: Sequence[str]) -> Values:
        texts = zip(request.train.ids.tolist(), request.train.column("prompt"), strict=True)
        return {example_id: {"prompt_letters": len(text)} for example_id, text in texts}

    mine = types.SimpleNamespace(
        COLUMNS={"prompt_letters": Column("length of the prompt", "letters", "data")},
        SIGNALS={"prompt-length": ("prompt_letters",)},
        measure=measure,
    )
    # What its name in FILES does where they are read:
    monkeypatch.setattr(ranker, "FILES", (*FILES, mine))
    monkeypatch.setitem(COLUMNS, "prompt_letters", mine.COLUMNS["prompt_letters"])
    monkeypatch.setitem(SIGNALS, "prompt-length", mine.SIGNALS["prompt-length"])
    path = run(gpt2, tmp_path, "--difficulty", "prompt-length", "length", "--num-stages", 1, *FROZEN)
    records = read_jsonl(path / "difficulty.jsonl")
    by_prompt = sorted(records, key=lambda record: (record["prompt_letters"], record["id"]))
    assert [record["prompt_letters_rank"] for record in by_prompt] == list(range(1, len(records) + 1))
    agreement = json.loads((path / "diagnostics.json").read_text())["agreement"]
    assert list(agreement) == ["response length and length of the prompt"]
    for tool in (plot_difficulty, report):
        assert call(tool, ["--run", path]).status == 0


def test_the_teachers_confidence_is_the_same_online_and_cached(gpt2: Folders, tmp_path: Path) -> None:
    extra = ["--difficulty", "teacher", "--num-stages", 1, *FROZEN]
    cached = run(gpt2, tmp_path / "cached", *extra, "--teacher-cache", tmp_path / "states")
    online = run(gpt2, tmp_path / "online", *extra, "--teacher-cache", "off")
    assert order(cached) == order(online)


def test_snapshot_begins_with_one_epoch_over_all_and_ranks_by_its_losses(gpt2: Folders, tmp_path: Path) -> None:
    path = run(gpt2, tmp_path, "--difficulty", "snapshot", *FROZEN)
    stages = json.loads((path / "stages.json").read_text())
    assert [stage["pool"] for stage in stages] == [[0, 48], [0, 12], [0, 24], [0, 36], [0, 48]]
    assert not (path / "difficulty.jsonl").exists()
    losses = reference_losses(gpt2, gpt2.student)
    for record in read_jsonl(path / "difficulty-stage2.jsonl"):
        assert record["snapshot_cross_entropy"] == pytest.approx(losses[record["id"]], rel=1e-5)
    assert order(path, "difficulty-stage2") == sorted(losses, key=lambda i: losses[i])


def test_a_ranking_between_stages_is_by_the_student_of_that_moment(
    gpt2: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[int, Path] = {}
    save_last = Checkpoints.save_last

    def keep(self: Checkpoints, position: Position, state: object) -> None:
        save_last(self, position, state)  # type: ignore[arg-type]
        saved[position.stage] = (self.run.path / "best").rename(tmp_path / f"student{position.stage}")

    monkeypatch.setattr(Checkpoints, "save_last", keep)
    path = run(gpt2, tmp_path, "--rerank", "stage", "--difficulty", "cross-entropy", "--num-dev", 0)
    assert sorted(p.name for p in path.glob("difficulty*.jsonl")) == sorted(
        ["difficulty.jsonl", *(f"difficulty-stage{i}.jsonl" for i in (2, 3, 4))]
    )
    for stage in (1, 3):
        losses = reference_losses(gpt2, saved[stage])
        records = read_jsonl(path / f"difficulty-stage{stage + 1}.jsonl")
        assert [record["cross_entropy"] for record in records] == pytest.approx(
            [losses[record["id"]] for record in records], rel=1e-4
        )


def test_every_epoch_trains_on_the_easiest_of_the_ranking_in_force(
    gpt2: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    cut = BatchCutter.cut

    def watched(self: BatchCutter, texts: Texts, step: int) -> object:
        seen.append({int(i) for i in self.train.ids[texts.positions]})
        return cut(self, texts, step)

    monkeypatch.setattr(BatchCutter, "cut", watched)
    extra = ["--num-stages", 2, "--epochs", 2, "--rerank", "epoch", "--global-batch-size", 24, "--num-dev", 0]
    path = run(gpt2, tmp_path, "--difficulty", "snapshot", "length", "--lr", 0.05, *extra)
    names = ["difficulty", "difficulty-stage1-epoch2", "difficulty-stage2-epoch1", "difficulty-stage2-epoch2"]
    assert seen[0] == set(order(path, names[0])[:24])
    assert seen[1] == set(order(path, names[1])[:24])
    assert seen[2] | seen[3] == seen[4] | seen[5] == set(order(path, names[2]))
    assert len({tuple(order(path, name)) for name in names}) > 1


def test_pools_leave_behind_what_a_one_pass_curriculum_has_trained_on() -> None:
    ramps = {"temperature": [1.0], "kd_ratio": [1.0]}
    for name in ("one-pass", "baby-step"):
        stages = plan_stages(12, curriculum=name, num_stages=3, epochs=1, **ramps)
        first, again = np.arange(12), np.arange(12)[::-1]
        schedule = Schedule(stages, first, global_batch_size=1, scheme=CURRICULA[name]).rank(first)
        before = schedule.order[: stages[1].pool.start].tolist()
        schedule = schedule.rank(again, stages[1])
        chosen = sorted(schedule.batches(stages[1], 0).ravel().tolist())
        assert chosen == ([8, 9, 10, 11] if name == "one-pass" else list(range(4, 12)))
        assert schedule.order[: len(before)].tolist() == before
        assert sorted(schedule.order.tolist()) == list(range(12))


def test_a_ranking_moves_reliance_and_not_the_order_where_the_order_is_not_ranked() -> None:
    for name in ("whole-pool", "random"):
        order, linear = unranked_order(5, CURRICULA[name], seed=3), Reliance("linear")
        schedule = Schedule((), order, scheme=CURRICULA[name], reliance=linear)
        ranked = schedule.rank(np.array([4, 2, 0, 1, 3]))
        assert ranked.order.tolist() == order.tolist()
        assert ranked.ratio_factors is not None and ranked.ratio_factors.tolist() == [0.5, 0.75, 0.25, 1.0, 0.0]
    assert CURRICULA["random"].order == "random"


def test_a_student_that_gives_no_finite_loss_is_told_in_one_line(gpt2: Folders, tmp_path: Path) -> None:
    student = tmp_path / "nan"
    shutil.copytree(gpt2.student, student)
    model = AutoModelForCausalLM.from_pretrained(student)
    model.transformer.ln_f.bias.data.fill_(torch.nan)
    model.save_pretrained(student)
    result = call(train, train_arguments(gpt2, tmp_path, "--difficulty", "cross-entropy", "--model", student))
    assert result.status == 1 and "cross-entropy is not finite for" in result.last_line, result.output


def test_the_first_ranking_is_the_earliest_by_its_name(tmp_path: Path) -> None:
    run_dir = RunFolder(tmp_path)
    assert run_dir.first_ranking() is None
    for name in ("difficulty-stage10-epoch1", "difficulty-stage2-epoch3", "difficulty-stage2-epoch2"):
        (tmp_path / f"{name}.jsonl").write_text("")
    assert run_dir.first_ranking() == tmp_path / "difficulty-stage2-epoch2.jsonl"


def test_a_run_that_ranks_again_and_is_cut_off_ends_with_the_same_weights(gpt2: Folders, tmp_path: Path) -> None:
    extra = ["--rerank", "stage", "--difficulty", "snapshot", "length", "--curriculum", "one-pass", "--epochs", 2]
    extra += ["--global-batch-size", 6, "--selective-reliance", "linear"]
    save_last = Checkpoints.save_last

    def save_and_stop(self: Checkpoints, position: Position, state: object) -> None:
        save_last(self, position, state)  # type: ignore[arg-type]
        if (position.stage, position.epoch) == (2, 1):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save_last", save_and_stop)
        assert call(train, train_arguments(gpt2, tmp_path / "cut", *extra)).status == 130
    cut, whole = run(gpt2, tmp_path / "cut", *extra), run(gpt2, tmp_path / "whole", *extra)
    names = ["best/model.safetensors", "ledger.json", *(f"difficulty-stage{i}.jsonl" for i in (2, 3, 4))]
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_that_stops_within_its_first_look_ranks_by_the_losses_of_all(
    gpt2: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["--difficulty", "snapshot", "--num-stages", 2, "--num-dev", 0]
    cutter = BatchCutter.cut

    def asked(self: BatchCutter, texts: Texts, step: int) -> object:
        if step == 2:  # of the six that look at all examples
            os.kill(os.getpid(), signal.SIGTERM)
        return cutter(self, texts, step)

    with monkeypatch.context() as patch:
        patch.setattr(BatchCutter, "cut", asked)
        assert call(train, train_arguments(gpt2, tmp_path / "cut", *extra)).status == 143
    cut, whole = run(gpt2, tmp_path / "cut", *extra), run(gpt2, tmp_path / "whole", *extra)
    assert sorted(path.name for path in cut.glob("difficulty*")) == [
        "difficulty-stage2.jsonl",
        "difficulty-stage3.jsonl",
    ]
    for name in ("difficulty-stage2.jsonl", "best/model.safetensors", "ledger.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_resume_with_another_ranking_behind_the_same_path_is_refused(gpt2: Folders, tmp_path: Path) -> None:
    ranking = tmp_path / "mine.jsonl"
    lines = [json.dumps({"id": i}) + "\n" for i in range(8, 56)]  # made by hand: an order is enough
    ranking.write_text("".join(lines))
    arguments = train_arguments(gpt2, tmp_path, "--difficulty-file", ranking, "--num-dev", 0)
    train_until_stage(arguments, 1)
    ranking.write_text("".join(reversed(lines)))
    result = call(train, arguments)
    assert result.status == 2 and "its paths no longer hold the ranking that it was begun with" in result.last_line
    assert order(tmp_path / "tfkl" / "seed10") == list(range(8, 56))
    ranking.write_text("".join(lines))
    result = call(train, arguments)
    assert result.status == 0 and "resuming from step" in result.output, result.output
    assert json.loads((tmp_path / "tfkl" / "seed10" / "diagnostics.json").read_text())["examples"] == 48


@pytest.mark.parametrize(
    ("limit", "epochs", "steps"),
    [
        ([], 3, 3 * (3 + 6)),
        (["--max-steps", 40], 3, 3 * (3 + 6)),  # 13 and 27, which neither stage comes to
        (["--max-steps", 12], 2, 4 + 8),  # the second epochs are cut short, and the last evaluations not reached
    ],
)
def test_a_stage_ends_when_dev_rouge_l_has_not_risen_or_at_its_limit(
    limit: list[object], epochs: int, steps: int, gpt2: Folders, tmp_path: Path
) -> None:
    frozen = FROZEN[:-2]  # dev ROUGE-L never rises behind the first evaluation of a stage
    extra = ["--advance", "converged", "--patience", 2, "--epochs", 7, "--difficulty", "length"]
    extra += ["--num-stages", 2, "--num-dev", 2]
    path = run(gpt2, tmp_path, *frozen, *extra, *limit)
    records = read_jsonl(path / "metrics.jsonl")
    evaluated = [(record["stage"], record["epoch"]) for record in records if "dev_rouge_l" in record]
    assert evaluated == [(stage, epoch) for stage in range(2) for epoch in range(epochs)]
    ledger = json.loads((path / "ledger.json").read_text())
    assert ledger["optimizer_steps"] == steps and ledger["finished"]


def test_the_cap_ends_a_stage_that_keeps_rising() -> None:
    stage = Stage(1, range(8), epochs=4, temperature=1.0, kd_ratio=1.0)

    def after(scores: list[float]) -> EpochEnd:
        end = EpochEnd(Position(stage=1), stage_over=False, converged=False, is_best=False)
        for score in scores:
            end = after_epoch(end.position, stage, DevScores(score, 1.0), patience=3, last_stage=False)
        return end

    rising, capped = after([1.0, 2.0, 3.0]), after([1.0, 2.0, 3.0, 4.0])
    assert (rising.stage_over, rising.position.epoch, rising.position.evaluations_without_rise) == (False, 3, 0)
    assert after([3.0, 3.0, 2.0]).position.evaluations_without_rise == 2
    moved = after([3.0, 2.0, 2.0, 2.0]).position
    for position in (capped.position, moved):
        assert (position.stage, position.epoch, position.evaluations_without_rise, position.done) == (2, 0, 0, False)
        assert position.stage_best_score is None
    assert capped.stage_over and not capped.converged


def test_buckets_are_the_same_examples_at_every_stage_end(gpt2: Folders, probed: tuple[Path, str]) -> None:
    path, _ = probed
    records = [r for r in read_jsonl(path / "metrics.jsonl") if "bucket1_rouge_l" in r]
    assert [record["stage"] for record in records] == [0, 1, 2, 3]
    losses, ranked = reference_losses(gpt2, gpt2.student), order(path)
    for number in range(4):
        quarter = ranked[12 * number : 12 * number + 12]
        wanted = np.mean([losses[quarter[place]] for place in (0, 6, 11)])  # 5.5 is rounded to even
        for record in records:  # the student never changes
            assert record[f"bucket{number + 1}_cross_entropy"] == pytest.approx(wanted, rel=1e-5)


def test_the_ledger_counts_what_the_teacher_read_to_rank(gpt2: Folders, tmp_path: Path) -> None:
    extra = [
        "--difficulty",
        "teacher",
        "--rerank",
        "stage",
        "--num-stages",
        2,
        "--teacher-cache",
        "off",
        "--num-dev",
        0,
    ]
    assert call(train, train_arguments(gpt2, tmp_path, *extra)).status == 0
    ledger = json.loads((tmp_path / "tfkl" / "seed10" / "ledger.json").read_text())
    assert ledger["teacher_forward_passes"] == ledger["samples"] + 2 * 48
