"""Facts about the stages: the published count of steps, pools, ramps, shuffled orders."""

import numpy as np
import pytest

from pocl.common.errors import UserError
from pocl.curriculum.stages import (
    CURRICULA,
    Stage,
    plan_stages,
    ramp,
    stage_order,
)

SIZES = [(11435, 4), (10, 3), (4, 4), (7, 1), (64, 8), (101, 7)]  # (examples, stages)


def plan(num_examples: int, num_stages: int, curriculum: str = "baby-step") -> tuple[Stage, ...]:
    return plan_stages(
        num_examples,
        curriculum=curriculum,
        num_stages=num_stages,
        epochs=8,
        temperature=[1.0, 2.0] if num_stages > 1 else [1.0],
        kd_ratio=[1.0],
    )


def test_baby_step_has_the_published_number_of_steps() -> None:
    stages = plan_stages(
        11435, curriculum="baby-step", num_stages=4, epochs=8, temperature=[1.0, 2.0], kd_ratio=[0.7, 1]
    )
    assert [len(stage.pool) for stage in stages] == [2858, 5716, 8574, 11435]
    assert [stage.steps_per_epoch(64) for stage in stages] == [44, 89, 133, 178]
    assert [stage.steps(64) for stage in stages] == [352, 712, 1064, 1424]
    assert sum(stage.steps(64) for stage in stages) == 3552


def test_baby_step_stages_carry_their_ramps() -> None:
    stages = plan_stages(
        100, curriculum="baby-step", num_stages=4, epochs=3, temperature=[1, 1.33, 1.67, 2], kd_ratio=[0.7, 1]
    )
    assert [stage.index for stage in stages] == [0, 1, 2, 3]
    assert [stage.epochs for stage in stages] == [3, 3, 3, 3]
    assert [stage.temperature for stage in stages] == [1.0, 1.33, 1.67, 2.0]
    assert [stage.kd_ratio for stage in stages] == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-12)


@pytest.mark.parametrize(("num_examples", "num_stages"), SIZES)
def test_baby_step_pools_nest_and_end_with_every_example(num_examples: int, num_stages: int) -> None:
    pools = [stage.pool for stage in plan(num_examples, num_stages)]
    assert len(pools) == num_stages
    assert [list(pool) for pool in pools[:-1]] == [
        list(range(num_examples // num_stages * i)) for i in range(1, num_stages)
    ]
    assert list(pools[-1]) == list(range(num_examples))


@pytest.mark.parametrize(("num_examples", "num_stages"), SIZES)
def test_one_pass_pools_are_disjoint_and_cover_every_example(num_examples: int, num_stages: int) -> None:
    pools = [list(stage.pool) for stage in plan(num_examples, num_stages, "one-pass")]
    assert sum(pools, []) == list(range(num_examples))
    assert len(pools) == num_stages and all(pools)


@pytest.mark.parametrize(("num_examples", "num_stages"), SIZES)
def test_whole_pool_holds_every_example_at_every_stage(num_examples: int, num_stages: int) -> None:
    stages = plan(num_examples, num_stages, "whole-pool")
    assert [list(stage.pool) for stage in stages] == [list(range(num_examples))] * num_stages


def test_a_ramp_of_one_value_is_constant() -> None:
    assert ramp([0.7], 4) == ramp(0.7, 4) == (0.7, 0.7, 0.7, 0.7)
    assert ramp([2], 1) == (2.0,)


def test_a_ramp_of_two_values_is_a_line() -> None:
    assert ramp([1, 2], 4) == pytest.approx((1, 4 / 3, 5 / 3, 2), abs=1e-15)
    assert ramp([0.7, 1.0], 4) == pytest.approx((0.7, 0.8, 0.9, 1.0), abs=1e-15)
    assert ramp([2, 1], 3) == (2.0, 1.5, 1.0)
    assert ramp([1, 2], 2) == (1.0, 2.0)


@pytest.mark.parametrize("num_stages", range(2, 12))
def test_a_ramp_ends_exactly_at_its_last_value(num_stages: int) -> None:
    assert ramp([0.7, 1.0], num_stages)[0] == 0.7
    assert ramp([0.7, 1.0], num_stages)[-1] == 1.0


def test_a_ramp_of_all_values_is_kept_as_it_is() -> None:
    assert ramp([1, 1.33, 1.67, 2], 4) == (1.0, 1.33, 1.67, 2.0)
    assert ramp([3, 1, 2], 3) == (3.0, 1.0, 2.0)


@pytest.mark.parametrize(("values", "num_stages"), [([1, 2, 3], 4), ([1, 2], 1), ([1, 2, 3, 4, 5], 4), ([], 4)])
def test_a_ramp_of_any_other_count_is_refused(values: list[float], num_stages: int) -> None:
    with pytest.raises(UserError, match=f"`kd_ratio` has {len(values)} values for {num_stages} stage"):
        ramp(values, num_stages, name="kd_ratio")


@pytest.mark.parametrize("curriculum", sorted(CURRICULA))
def test_an_epochs_order_is_a_permutation_of_the_pool(curriculum: str) -> None:
    for stage in plan(103, 4, curriculum):
        order = stage_order(stage, 2, seed=10)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(stage.pool)


def test_an_epochs_order_is_the_same_every_time() -> None:
    stage = plan(103, 4)[1]
    assert stage_order(stage, 3, seed=10).tolist() == stage_order(stage, 3, seed=10).tolist()


def test_orders_differ_between_epochs_stages_and_seeds() -> None:
    first, second = plan(103, 2, "whole-pool")
    orders = [(first, 0, 10), (first, 1, 10), (second, 0, 10), (first, 0, 11)]
    assert len({tuple(stage_order(stage, epoch, seed=seed).tolist()) for stage, epoch, seed in orders}) == 4


def test_fewer_examples_than_stages_are_refused() -> None:
    with pytest.raises(UserError, match="3 training examples cannot fill 4 stages"):
        plan(3, 4)


def test_a_last_short_batch_is_dropped() -> None:
    stage = Stage(0, range(130), 3, 1.0, 1.0)
    assert stage.steps_per_epoch(64) == 2
    assert stage.steps(64) == 6


def test_hard_to_easy_starts_at_the_hardest_and_ends_with_every_example() -> None:
    assert CURRICULA["hard-to-easy"].pools(10, 3) == [range(7, 10), range(4, 10), range(10)]


def test_the_random_control_has_the_sizes_of_baby_step() -> None:
    assert CURRICULA["random"].pools(11435, 4) == CURRICULA["baby-step"].pools(11435, 4)
