"""The curriculum as pure data: which examples are in the pool, for how long, at which temperature and KD ratio.

A curriculum is a tuple of stages over positions 0..N-1 of an easy-to-hard order, which a ranking gives.
To add one, write a function from (N, n) to ranges and name it in ``CURRICULA``; ``--curriculum NAME`` then exists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pocl.common.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One stage: train ``epochs`` times over ``pool`` with this temperature and KD ratio."""

    index: int
    pool: range  # positions in the easy-to-hard order
    epochs: int
    temperature: float
    kd_ratio: float
    max_steps: int | None = None  # optimiser steps; None: those of its epochs. The last epoch may end before its end
    loss: str | None = None  # the name of its loss; None: that of the run

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """Optimiser steps of one epoch; an incomplete last batch is dropped."""
        return len(self.pool) // global_batch_size

    def steps(self, global_batch_size: int) -> int:
        """Optimiser steps of the whole stage."""
        steps = self.epochs * self.steps_per_epoch(global_batch_size)
        return steps if self.max_steps is None else min(self.max_steps, steps)


Curriculum = tuple[Stage, ...]


def baby_step_pools(num_examples: int, num_stages: int) -> list[range]:
    """Nested pools: the easiest floor(N/n)*(i+1) examples at stage i, and all N at the last.

    Source: POCL, arXiv 2506.05695, section 3; Baby Step: Spitkovsky et al., NAACL 2010.
    """
    size = num_examples // num_stages
    return [range(size * (i + 1)) for i in range(num_stages - 1)] + [range(num_examples)]


def one_pass_pools(num_examples: int, num_stages: int) -> list[range]:
    """Disjoint subsets, each trained on once and left behind.  Source: Bengio et al., ICML 2009."""
    size = num_examples // num_stages
    starts = [size * i for i in range(num_stages)] + [num_examples]
    return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def whole_pool(num_examples: int, num_stages: int) -> list[range]:
    """Every example at every stage: no curriculum."""
    return [range(num_examples)] * num_stages


def hard_to_easy_pools(num_examples: int, num_stages: int) -> list[range]:
    """Baby Step from the other end: the hardest floor(N/n)*(i+1) examples at stage i, and all N at the last."""
    size = num_examples // num_stages
    return [range(num_examples - size * (i + 1), num_examples) for i in range(num_stages - 1)] + [range(num_examples)]


@dataclass(frozen=True)
class Scheme:
    """A named curriculum: its pools, and the order of examples that their positions refer to."""

    pools: Callable[[int, int], list[range]]
    order: Literal["ranked", "random", "any"]  # easy to hard; shuffled once by the run's seed; no meaning
    left_behind: bool = False  # examples before a pool are not trained on again: a new ranking leaves them there
    shuffled_visits: bool = False  # the same visits to the same examples, over the whole run in one random order


CURRICULA: dict[str, Scheme] = {
    "baby-step": Scheme(baby_step_pools, "ranked"),
    "one-pass": Scheme(one_pass_pools, "ranked", left_behind=True),
    "hard-to-easy": Scheme(hard_to_easy_pools, "ranked"),
    "random": Scheme(baby_step_pools, "random"),  # a control: pools of the same sizes, without their meaning
    "whole-pool": Scheme(whole_pool, "any"),
    # A control: Baby Step shows the easiest examples most often, which is no matter of their order.
    "exposure-matched": Scheme(baby_step_pools, "ranked", shuffled_visits=True),
}


def ramp(values: float | Sequence[float], num_stages: int, *, name: str = "ramp") -> tuple[float, ...]:
    """One value per stage: a constant, a line from first to last value, or the values as they are.

    Raises UserError if the number of values is none of 1, 2 and ``num_stages``.
    """
    if isinstance(values, int | float):
        values = (values,)
    if len(values) == num_stages:
        return tuple(float(value) for value in values)
    if len(values) == 1:
        return (float(values[0]),) * num_stages
    if len(values) == 2 and num_stages > 2:
        first, last = values
        return tuple(first + (last - first) * i / (num_stages - 1) for i in range(num_stages))
    raise UserError(
        f"`{name}` has {len(values)} values for {num_stages} stage(s); give one, first and last, or one per stage"
    )


def plan_stages(
    num_examples: int,
    *,
    curriculum: str,
    num_stages: int,
    epochs: int,
    temperature: float | Sequence[float],
    kd_ratio: float | Sequence[float],
    first_look: bool = False,
) -> Curriculum:
    """The stages of a named curriculum over ``num_examples`` examples, with their ramps of T and r.

    ``first_look`` puts one epoch over every example in front, at the first stage's T and r: a ranking by training
    losses needs each example to have had one. A curriculum that begins with every example does not need it.
    Raises UserError if there are fewer examples than stages.
    """
    if num_examples < num_stages:
        raise UserError(f"{num_examples} training examples cannot fill {num_stages} stages; lower `num_stages`")
    temperatures = ramp(temperature, num_stages, name="temperature")
    kd_ratios = ramp(kd_ratio, num_stages, name="kd_ratio")
    pools = CURRICULA[curriculum].pools(num_examples, num_stages)
    rows = [(pool, epochs, temperatures[i], kd_ratios[i]) for i, pool in enumerate(pools)]
    if first_look and len(pools[0]) < num_examples:
        rows.insert(0, (range(num_examples), 1, temperatures[0], kd_ratios[0]))
    return tuple(Stage(i, *row) for i, row in enumerate(rows))


def baby_step(
    num_examples: int,
    *,
    num_stages: int = 4,
    epochs: int = 8,
    temperature: float | Sequence[float] = (1.0, 2.0),
    kd_ratio: float | Sequence[float] = (0.7, 1.0),
) -> Curriculum:
    """POCL's stages: the easiest N/n, 2 N/n … of N examples and at last all, ``epochs`` over each, T and r rising.

    ``temperature`` and ``kd_ratio`` are one value, the first and the last, or one per stage.  Raises UserError if
    there are fewer examples than stages, or another number of values.
    """
    return plan_stages(
        num_examples,
        curriculum="baby-step",
        num_stages=num_stages,
        epochs=epochs,
        temperature=temperature,
        kd_ratio=kd_ratio,
    )


def limit_steps(stages: Curriculum, max_steps: int, global_batch_size: int) -> Curriculum:
    """The same stages in ``max_steps`` optimiser steps, shared out in proportion to what their epochs would take.

    Each has at least one; what is left of whole shares goes to the largest remainders. Stages that would be longer
    than their epochs have more of these.  Raises UserError if there are fewer steps than stages, or if a stage's pool
    does not fill one global batch.
    """
    if max_steps < len(stages):
        raise UserError(
            f"`max_steps` {max_steps} is fewer than the {len(stages)} stages; raise it, or lower `num_stages`"
        )
    planned = np.array([stage.steps(global_batch_size) for stage in stages])
    if not planned.all():
        raise UserError(f"a stage's pool does not fill one batch of {global_batch_size}; lower `global_batch_size`")
    wanted = max_steps * planned / planned.sum()
    steps = np.maximum(1, np.floor(wanted).astype(np.int64))
    while steps.sum() != max_steps:
        difference = wanted - steps
        if steps.sum() < max_steps:
            steps[int(np.argmax(difference))] += 1
        else:  # a small stage was given its one
            steps[int(np.argmin(np.where(steps > 1, difference, np.inf)))] -= 1
    return tuple(
        replace(stage, epochs=-(-count // stage.steps_per_epoch(global_batch_size)), max_steps=count)
        for stage, count in zip(stages, steps.tolist(), strict=True)
    )


def with_losses(stages: Curriculum, names: Sequence[str]) -> Curriculum:
    """The same stages, each with a loss of its own; one that was put in front (``first_look``) has the first."""
    names = [names[0]] * (len(stages) - len(names)) + list(names)
    return tuple(replace(stage, loss=name) for stage, name in zip(stages, names, strict=True))


def stage_order(stage: Stage, epoch: int, *, seed: int) -> NDArray[np.int64]:
    """The positions of a stage's pool in the order of one epoch, shuffled.  -> [len(pool)], int64.

    A pure function of (seed, stage, epoch): a resumed run and a run on more ranks see the same order.
    """
    positions = np.arange(stage.pool.start, stage.pool.stop)
    return np.random.default_rng([seed, stage.index, epoch]).permutation(positions)
