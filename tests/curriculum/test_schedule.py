"""Facts about the schedule: steps, examples, learning rates, the order under rankings, selective reliance."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pocl.common.errors import UserError
from pocl.curriculum.schedule import CosineRate, Reliance, Schedule, unranked_order
from pocl.curriculum.stages import CURRICULA, baby_step, limit_steps, plan_stages


def small(**options: object) -> Schedule:
    """Three stages of 4, 8 and 12 examples, two epochs each, in batches of 3: 2, 4 and 8 steps."""
    stages = baby_step(12, num_stages=3, epochs=2, temperature=[1, 2], kd_ratio=[0.7, 1])
    return Schedule(stages, np.arange(12)[::-1], global_batch_size=3, seed=5, **options)  # type: ignore[arg-type]


def test_baby_step_of_dolly_has_the_published_number_of_steps() -> None:
    schedule = Schedule(baby_step(11435), np.arange(11435))
    assert schedule.starts == [0, 352, 1064, 2128, 3552]
    assert schedule.total_steps == 3552


def test_every_step_has_its_place() -> None:
    places = [(stage.index, epoch, index) for stage, epoch, index in map(small().place, range(14))]
    assert places[:6] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert places[6:] == [(2, epoch, index) for epoch in range(2) for index in range(4)]


@pytest.mark.parametrize("number", [-1, 14, 1000])
def test_a_step_that_the_run_lacks_is_refused(number: int) -> None:
    with pytest.raises(IndexError, match=f"step {number} of 14"):
        small().at(number)


def test_the_steps_in_turn_are_those_that_are_asked_for_one_by_one() -> None:
    schedule = small()
    steps = list(schedule)
    assert [step.number for step in steps] == list(range(14))
    for step in steps:
        alone = schedule.at(step.number)
        assert alone.examples.tolist() == step.examples.tolist()
        assert (alone.stage, alone.epoch, alone.index, alone.lr) == (step.stage, step.epoch, step.index, step.lr)


def test_an_epoch_sees_each_example_of_its_pool_at_most_once_and_whole_batches_alone() -> None:
    schedule = small()
    for stage in schedule.stages:
        pool = {11 - position for position in stage.pool}  # the order is backwards
        for epoch in range(stage.epochs):
            seen = schedule.batches(stage, epoch).ravel().tolist()
            assert len(seen) == len(set(seen)) == len(pool) // 3 * 3
            assert set(seen) <= pool


def test_a_resumed_epoch_goes_on_behind_the_steps_that_are_done() -> None:
    schedule = small()
    stage = schedule.stages[2]
    rest = list(schedule.epoch(stage, 1, done=3))
    assert [step.number for step in rest] == [13]
    assert rest[0].examples.tolist() == schedule.batches(stage, 1)[3].tolist()


def test_a_cosine_restarts_at_each_stage_or_spans_the_run() -> None:
    restarting = small(rate=CosineRate(1e-3, 1e-5, restarts=True))
    assert [step.lr for step in restarting if step.restarts or step.number == 0] == [1e-3] * 3
    assert restarting.at(1).lr == pytest.approx((1e-3 + 1e-5) / 2)
    spanning = small(rate=CosineRate(1e-3, 1e-5, restarts=False))
    for step in spanning:
        assert step.lr == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * step.number / 14)))


def test_a_pool_smaller_than_one_batch_is_refused() -> None:
    stages = plan_stages(100, curriculum="baby-step", num_stages=4, epochs=1, temperature=[1], kd_ratio=[1])
    Schedule(stages, np.arange(100), global_batch_size=25)
    with pytest.raises(UserError, match="stage 1 has 25 examples, fewer than one batch of 26"):
        Schedule(stages, np.arange(100), global_batch_size=26)


def test_stages_of_more_examples_than_the_order_holds_are_refused() -> None:
    with pytest.raises(UserError, match="stage 4 wants 100 examples, `order` has 99"):
        Schedule(baby_step(100), np.arange(99), global_batch_size=5)


def test_the_random_order_is_shuffled_once_by_the_seed() -> None:
    order = unranked_order(100, CURRICULA["random"], seed=3).tolist()
    assert sorted(order) == list(range(100)) != order
    assert order == unranked_order(100, CURRICULA["random"], seed=3).tolist()
    assert order != unranked_order(100, CURRICULA["random"], seed=4).tolist()
    assert unranked_order(5, CURRICULA["baby-step"], seed=3).tolist() == [0, 1, 2, 3, 4]


def test_reliance_rises_from_the_easiest_to_the_hardest() -> None:
    assert Reliance().factors(5).tolist() == [1.0] * 5
    assert Reliance("linear").factors(5).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Reliance("hard").factors(5).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert Reliance("hard", 0.8).factors(5).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert Reliance("linear").factors(1).tolist() == [0.0]


def test_factors_of_the_ratio_follow_the_newest_ranking_by_position() -> None:
    stages = baby_step(4, num_stages=1, temperature=[1], kd_ratio=[1])
    schedule = Schedule(stages, np.arange(4), global_batch_size=2, reliance=Reliance("linear"))
    assert schedule.ratio_factors is None  # nothing is ranked yet
    factors = schedule.rank(np.array([2, 0, 3, 1])).ratio_factors
    assert factors is not None and factors == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])


# Updates that are given, a rate that rises first, and visits in another order


def test_a_number_of_steps_is_shared_out_as_the_epochs_would_be() -> None:
    stages = baby_step(80, num_stages=4, epochs=2)  # 20, 40, 60, 80 examples: 4, 8, 12, 16 steps of 10
    limited = limit_steps(stages, 23, 10)  # 2.3, 4.6, 6.9, 9.2
    assert [stage.steps(10) for stage in limited] == [2, 5, 7, 9]
    assert [stage.epochs for stage in limited] == [1, 2, 2, 2]
    assert [stage.steps(10) for stage in limit_steps(stages, 4, 10)] == [1, 1, 1, 1]
    assert [stage.steps(10) for stage in limit_steps(stages, 80, 10)] == [8, 16, 24, 32]
    with pytest.raises(UserError, match="`max_steps` 3 is fewer than the 4 stages"):
        limit_steps(stages, 3, 10)


def test_a_stage_that_ends_within_an_epoch_sees_the_beginning_of_that_epoch() -> None:
    whole = Schedule(baby_step(80, num_stages=4, epochs=2), np.arange(80), 10)
    short = replace(whole, stages=limit_steps(whole.stages, 23, 10))
    assert short.total_steps == 23 == len(list(short))
    assert [update.number for update in short] == list(range(23))
    for update in short:
        assert short.at(update.number).examples.tolist() == update.examples.tolist()
        planned = whole.batches(whole.stages[update.stage.index], update.epoch)[update.index]
        assert update.examples.tolist() == planned.tolist()
    # each stage's cosine ends with the stage
    last = [update for update in short if update.stage.index == 1]
    assert [update.lr for update in last] == [short.rate.at(i, 5) for i in range(5)]


def test_the_rate_rises_in_equal_parts_and_then_falls_as_it_would() -> None:
    rate = CosineRate(1.0, 0.0, warmup=3)
    assert [rate.at(i, 7) for i in range(3)] == [0.25, 0.5, 0.75]
    assert [rate.at(i + 3, 7) for i in range(4)] == [CosineRate(1.0, 0.0).at(i, 4) for i in range(4)]
    assert CosineRate(1.0, 0.0, warmup=0.3).at(2, 10) == 0.75 and CosineRate(1.0, 0.0, warmup=0.3).at(3, 10) == 1.0
    assert [CosineRate(1.0, 0.0, warmup=1, decays=False).at(i, 4) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert CosineRate(1.0, 0.0, warmup=9).at(3, 4) == 0.8  # longer than the run: it only rises, to 4/5


@pytest.mark.parametrize("max_steps", [None, 23])
def test_exposure_matched_shows_each_example_as_often_as_baby_step_in_another_order(max_steps: int | None) -> None:
    stages = baby_step(83, num_stages=4, epochs=2)
    stages = stages if max_steps is None else limit_steps(stages, max_steps, 10)
    order = np.random.default_rng(0).permutation(83)
    pocl = Schedule(stages, order, 10)
    control = replace(pocl, scheme=CURRICULA["exposure-matched"])
    visits = [np.bincount(np.concatenate([u.examples for u in each]), minlength=83) for each in (pocl, control)]
    assert visits[0].tolist() == visits[1].tolist() and visits[0].max() > visits[0].min()
    plans = [[(u.number, u.stage, u.epoch, u.lr) for u in each] for each in (pocl, control)]
    assert plans[0] == plans[1]
    # the first quarter of the run is no longer the easiest quarter's
    easiest = set(order[:20].tolist())
    early = np.concatenate([update.examples for update in control][: len(stages)])
    assert not set(early.tolist()) <= easiest
    assert control.at(5).examples.tolist() == list(control)[5].examples.tolist()
