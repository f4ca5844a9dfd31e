"""The testbed: its tasks, its arms, its statistics, and a whole comparison of a tiny size."""

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import train
from pocl.cli import cpu, process
from pocl.cli.checks import parse_train
from pocl.cli.resolve import make_schedule
from pocl.common.errors import UserError
from pocl.data.dataset import load_split
from tests.runs import call
from tools import testbed
from tools.reporting.intervals import paired_t
from tools.testbedding import running
from tools.testbedding.arms import ARMS, BASELINE, QUICK, UPDATES, Arm, choose_arms, own_arm
from tools.testbedding.comparing import compare, notes, text_rows
from tools.testbedding.regimes import REGIMES, SHARED, Bench, Size
from tools.testbedding.running import flags_of
from tools.testbedding.tasks import KINDS, OPENINGS, Draw, make_records
from tools.testbedding.workers import workers

TINY = Size(
    teacher=(16, 1), student=(8, 1), teacher_examples=64, warmup_examples=40, teacher_epochs=1, held_out=8, shrink=4
)


@pytest.mark.parametrize(
    ("kind", "answer"),
    {
        "repeat": "a b c",
        "reverse": "c b a",
        "sort": "a b c",
        "double": "a a b b c c",
        "rotate": "b c a",
        "swap": "b a c",
        "number": "one a two b three c",
        "join": "a and b and c",
    }.items(),
)
def test_each_kind_of_task_answers_as_it_says(kind: str, answer: str) -> None:
    assert " ".join(KINDS[kind][1](["a", "b", "c"])) == answer


def test_records_are_new_and_clean_ones_are_right() -> None:
    taken: set[str] = set()
    first, second = (make_records(Draw(300, noisy=False), random.Random(seed), taken) for seed in (0, 1))
    assert len({record["instruction"] for record in first + second}) == len(taken) == 600
    for record in first:
        kind, grade = record["category"].split()
        words = record["instruction"].split(": ")[1].split()
        assert len(words) == int(grade)
        assert record["output"].split() == KINDS[kind][1](words)


def test_a_fifth_of_noisy_answers_open_otherwise_and_a_twelfth_have_a_wrong_word() -> None:
    records = make_records(Draw(4000), random.Random(0), set())
    opened = [record for record in records if record["output"].startswith(OPENINGS)]
    assert 0.18 < len(opened) / len(records) < 0.22
    plain = [record for record in records if record not in opened]
    wrong = 0
    for record in plain:
        kind = record["category"].split()[0]
        wrong += record["output"].split() != KINDS[kind][1](record["instruction"].split(": ")[1].split())
    assert 0.06 < wrong / len(plain) < 0.10


@pytest.mark.parametrize("regime", sorted(REGIMES))
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_makes_as_many_updates_of_as_many_examples(arm: Arm, regime: str) -> None:
    bench = Bench(Path("nowhere"), REGIMES[regime], 10)
    config = parse_train([*SHARED, *flags_of(arm, bench), "--output-dir", "results"])
    schedule = make_schedule(config, REGIMES[regime].num_train)
    assert schedule.total_steps == UPDATES
    assert config.optimiser.global_batch_size == REGIMES[regime].batch
    assert config.optimiser.lr == REGIMES[regime].lr


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.recipe], ids=lambda arm: arm.name)
def test_an_arm_that_names_a_recipe_trains_as_it_says(arm: Arm) -> None:
    bench = Bench(Path("nowhere"), REGIMES["P"], 10)
    given = [*SHARED, *flags_of(Arm("shared", ()), bench), "--output-dir", "results"]
    assert parse_train([*given, *arm.flags, "--epochs", "8"]) == parse_train([*given, "--recipe", str(arm.recipe)])
    assert arm.text.endswith(f" (--recipe {arm.recipe})")


def test_own_arms_stand_beside_the_baseline() -> None:
    arms = choose_arms(["SFT"], ["mine: --curriculum random --kd-ratio 0.5"], quick=False)
    assert [arm.name for arm in arms] == [BASELINE, "SFT", "mine"]
    assert arms[-1].flags == ("--curriculum", "random", "--kd-ratio", "0.5")
    assert {arm.name for arm in choose_arms(None, [], quick=True)} == set(QUICK)


@pytest.mark.parametrize(
    ("flags", "regimes", "seeds", "count"), [([], "PGO", 10, len(ARMS)), (["--quick"], "P", 5, len(QUICK))]
)
def test_the_command_alone_means_everything_and_quick_a_part(
    flags: list[str], regimes: str, seeds: int, count: int, monkeypatch: pytest.MonkeyPatch, ends_on_sigterm: object
) -> None:
    asked = []
    monkeypatch.setattr(testbed, "compare_all", lambda arms, benches, *_, **__: asked.append((arms, benches)))
    assert call(testbed, flags).status == 0
    ((arms, benches),) = asked
    assert len(arms) == count
    assert [bench.regime.name for bench in benches] == [name for name in regimes for _ in range(seeds)]


def test_the_list_is_printed_without_a_run(ends_on_sigterm: object) -> None:
    result = call(testbed, ["--list"])
    assert result.status == 0 and "--keep-share 0.75" in result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [("--curriculum random", "a name and flags"), ("SFT: --lr 1", "the name of an arm"), ("a: '", "quot")],
)
def test_an_own_arm_of_another_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        own_arm(text)


def test_unknown_flags_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    benches = testbed.benches_of(tmp_path / "new", ["P"], [10])
    with pytest.raises(UserError, match="arm 'mine': unknown argument '--tempo'"):
        testbed.compare_all([own_arm("mine: --tempo 2")], benches, tmp_path / "new", jobs=1)
    assert not (tmp_path / "new").exists()


def test_the_paired_t_interval_is_that_of_the_textbook() -> None:
    # Student's own sleep data: ten patients, two drugs; mean 1.58, t = 4.0621, p = 0.002833.
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, half, p = paired_t(differences)
    assert mean == pytest.approx(1.58)
    assert (mean - half, mean + half) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert p == pytest.approx(0.00283289, abs=1e-7)
    assert paired_t([0.0, 0.0]) == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="needs two"):
        paired_t([1.0])


def result(rouge_l: float, **others: float) -> dict[str, float]:
    """The result of an arm on a seed."""
    names = ("exact_match", "cross_entropy", "agreement", "tokens", "teacher_forward_passes", "seconds")
    return dict.fromkeys(names, 0.0) | {"rouge_l": rouge_l, "optimizer_steps": 400} | others


def test_differences_are_paired_by_seed_and_corrected_together() -> None:
    arms = [Arm(name, ()) for name in (BASELINE, "a", "b", "absent")]
    base = {10: result(50.0), 20: result(60.0), 30: result(40.0)}
    results = {
        BASELINE: base,
        "a": {10: result(51.0), 20: result(62.0), 30: result(43.0)},
        "b": {20: result(59.0), 30: result(41.0), 40: result(99.0)},  # 40 has no partner
    }
    rows = {row.name: row for row in compare(arms, results)}
    assert list(rows) == [BASELINE, "a", "b"]
    assert rows[BASELINE].difference is None and rows["a"].difference and rows["b"].difference
    assert rows["a"].difference.mean == pytest.approx(2.0)
    assert rows["b"].difference.mean == pytest.approx(0.0)
    assert rows["a"].difference.half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)  # t of 2 degrees, deviation 1
    assert rows["a"].difference.p == pytest.approx(2 * paired_t([1, 2, 3])[2])  # Holm: the smaller of two p
    assert rows["b"].difference.p == pytest.approx(1.0)


def test_other_updates_are_marked_and_one_seed_says_so() -> None:
    rows = compare(
        [Arm(BASELINE, ()), Arm("a", ())], {BASELINE: {10: result(1.0)}, "a": {10: result(2.0, optimizer_steps=80)}}
    )
    assert [cells[0] for cells in text_rows(rows)] == [BASELINE, "a † 80"]
    assert "One training seed" in notes(rows)[-1]


WORK = """
import pathlib, time
path = pathlib.Path({path!r})
path.touch()
try:
    time.sleep(600)
finally:
    path.unlink()
"""


def test_sigterm_ends_the_workers_at_once_and_they_leave_nothing(
    tmp_path: Path, ends_on_sigterm: Callable[..., None]
) -> None:
    paths = [tmp_path / name for name in "abcd"]
    ends_on_sigterm(lambda: len(list(tmp_path.iterdir())) == 2)
    process.stop_on_sigterm()
    with pytest.raises(KeyboardInterrupt), workers(2, os.getpid) as each:
        list(each([(exec, WORK.format(path=str(path))) for path in paths]))
    assert not multiprocessing.active_children() and list(tmp_path.iterdir()) == []


def test_what_needs_no_teacher_is_done_while_one_is_trained(tmp_path: Path) -> None:
    benches = testbed.benches_of(tmp_path, ["P"], [10, 20], TINY)
    arms = choose_arms([BASELINE, "SFT"], [], quick=False)
    missing = [(bench, arm) for bench in benches for arm in arms]

    def planned() -> list[list[str]]:
        phases = testbed.phases(tmp_path, benches, missing)
        return [[one[-1].name if one[0] is running.run_arm else one[0].__name__ for one in phase] for phase in phases]

    assert planned() == [["_teach", "_make", "_make", "SFT", "SFT"], [BASELINE, BASELINE]]
    benches[0].shared.mkdir(parents=True)
    (benches[0].shared / "made.json").touch()
    assert planned() == [["_make", "_make"], [BASELINE, "SFT", BASELINE, "SFT"]]


@contextmanager
def as_it_was() -> Iterator[None]:
    """Leave torch's threads and products as they were."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu.use_torchs_own()
    process.stop()


def test_a_tiny_comparison_trains_resumes_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "UPDATES", updates := 40)
    arms = choose_arms([BASELINE, "pools, easy first, one cosine"], [], quick=False)
    benches = testbed.benches_of(tmp_path, ["P"], [10, 20], TINY)
    with as_it_was():
        rows = testbed.compare_all(arms, benches, tmp_path, jobs=1)["P"]
        assert [(row.name, row.seeds, row.updates) for row in rows] == [(arm.name, 2, updates) for arm in arms]
        assert all(0 <= row.means["rouge_l"] <= 100 and row.means["cross_entropy"] > 0 for row in rows)
        by_arm = {row.name: row for row in rows}
        easy = by_arm["pools, easy first, one cosine"]
        found = json.loads((tmp_path / "outcomes.json").read_text(encoding="utf-8"))
        ours = [result["rouge_l"] for result in found if result["arm"] == easy.name]
        theirs = [result["rouge_l"] for result in found if result["arm"] == BASELINE]
        assert easy.difference and easy.difference.mean == pytest.approx(np.subtract(ours, theirs).mean())
        assert {result["samples"] for result in found} == {updates * 4}
        page = (tmp_path / "testbed.html").read_text(encoding="utf-8")
        assert easy.name in page and "<svg" in page and (tmp_path / "testbed.png").stat().st_size > 10_000
        monkeypatch.setattr(train, "distil", lambda *_: pytest.fail("nothing is left to train"))
        assert testbed.compare_all(arms, benches, tmp_path, jobs=1)["P"] == rows
    places = [(benches[0].data, "dev"), (benches[0].data, "train"), (benches[0].place / "warmup-data", "train")]
    places.append((benches[0].shared / "data", "train"))
    prompts = [load_split(folder, split, max_length=64).column("prompt") for folder, split in places]
    assert [len(of_split) for of_split in prompts] == [8, 160, 40, 64]
    assert len(set().union(*prompts)) == 8 + 160 + 40 + 64  # none stands in two
