"""Micro-batches: each example once, within the budget, as many on every rank, little padding, the cheapest cut."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocl.data.micro_batches import MicroBatchLimits, cut, micro_batches

RANKS = [1, 2, 4]


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as ragged as those of instructions: most are short, a few are cut at 511."""
    return np.minimum(np.random.default_rng(seed).lognormal(4.7, 0.8, size=count).astype(np.int64) + 1, 511)


def shares_of(
    positions: np.ndarray, lengths: np.ndarray, *, world_size: int, max_tokens: int, batch_size: int | None = None
) -> list[list[np.ndarray]]:
    """The micro-batches of every rank."""
    limits = MicroBatchLimits(max_tokens, batch_size, overhead=64)
    return [micro_batches(positions, lengths, limits, rank=rank, world_size=world_size) for rank in range(world_size)]


def padded(lengths: np.ndarray, batches: list[np.ndarray]) -> int:
    """The tokens that are processed, padding included."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("global_batch", [4, 8, 20, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
@pytest.mark.parametrize("max_tokens", [1, 300, 1024, 100_000])
def test_micro_batches_of_all_ranks_are_the_global_batch_once_and_within_the_limits(
    world_size: int, global_batch: int, batch_size: int | None, max_tokens: int
) -> None:
    lengths = lengths_of(200)
    positions = np.random.default_rng(1).permutation(200)[:global_batch]
    shares = shares_of(positions, lengths, world_size=world_size, max_tokens=max_tokens, batch_size=batch_size)
    everything = [int(position) for share in shares for batch in share for position in batch]
    assert sorted(everything) == sorted(positions.tolist())
    assert len({len(share) for share in shares}) == 1  # ZeRO's collectives
    for batch in (batch for share in shares for batch in share):
        assert 0 < len(batch) <= (batch_size or global_batch)
        assert padded(lengths, [batch]) <= max_tokens or len(batch) == 1


@pytest.mark.parametrize("world_size", RANKS)
def test_micro_batches_hold_neighbours_in_length_longest_first(world_size: int) -> None:
    lengths = lengths_of(64)
    for share in shares_of(np.arange(64), lengths, world_size=world_size, max_tokens=2048):
        in_order = lengths[np.concatenate(share)].tolist()
        assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize("world_size", RANKS)
def test_the_cut_depends_on_the_set_of_examples_and_on_nothing_else(world_size: int) -> None:
    lengths = 1 + np.random.default_rng(3).permutation(500)  # no two alike
    positions = np.random.default_rng(4).permutation(500)[:64]
    cuts = [
        [batch.tolist() for share in shares_of(p, lengths, world_size=world_size, max_tokens=2048) for batch in share]
        for p in (positions, positions[::-1])
    ]
    assert cuts[0] == cuts[1]


def test_the_rank_with_the_fewest_tokens_gets_the_longest_of_a_round() -> None:
    lengths = np.array([10, 80, 20, 70, 30, 60, 40, 50])
    shares = shares_of(np.arange(8), lengths, world_size=2, max_tokens=10_000, batch_size=2)
    # 80 70 | 50 60 | 40 30 | 10 20, by the sums 80 70, 130 130, 170 160
    assert [[lengths[batch].tolist() for batch in share] for share in shares] == [
        [[80, 50], [40, 10]],
        [[70, 60], [30, 20]],
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_get_equal_shares_of_the_tokens(world_size: int, seed: int) -> None:
    lengths = lengths_of(64, seed)
    tokens = [
        sum(int(lengths[batch].sum()) for batch in share)
        for share in shares_of(np.arange(64), lengths, world_size=world_size, max_tokens=4096)
    ]
    # The shares differ at the end by no more than the examples of one round do.
    assert max(tokens) - min(tokens) <= lengths.max() - lengths.min()
    assert max(tokens) <= 1.05 * np.mean(tokens)


def test_an_example_above_the_budget_is_alone() -> None:
    widths = np.array([900, 700, 200, 200, 100])
    limits = MicroBatchLimits(400, None, overhead=10)
    assert cut(widths, limits) == [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5)]


def every_cut(num_rows: int) -> Iterator[list[slice]]:
    """Every way of cutting rows into runs."""
    for pattern in range(2 ** (num_rows - 1)):
        edges = [0, *(i + 1 for i in range(num_rows - 1) if pattern >> i & 1), num_rows]
        yield [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(("max_tokens", "overhead"), [(320, 10), (1600, 50), (1600, 2000), (6400, 0), (6400, 200)])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_cut_costs_less(seed: int, max_tokens: int, overhead: int, batch_size: int | None) -> None:
    widths = np.sort(lengths_of(11, seed))[::-1]

    def cost(slices: list[slice]) -> float:
        rows = [row.stop - row.start for row in slices]
        tokens = [count * int(widths[row.start]) for count, row in zip(rows, slices, strict=True)]
        allowed = all(
            count == 1 or (padded <= max_tokens and count <= (batch_size or count))
            for count, padded in zip(rows, tokens, strict=True)
        )
        return sum(tokens) + len(slices) * overhead if allowed else float("inf")

    found = cut(widths, MicroBatchLimits(max_tokens, batch_size, overhead))
    assert cost(found) == min(map(cost, every_cut(11)))


@pytest.mark.parametrize(
    ("global_batch", "world_size"), [(64, 1), (64, 2), (64, 4), (64, 8), (8, 1), (32, 1), (32, 4), (128, 4)]
)
def test_padding_adds_at_most_a_quarter_to_an_epoch_of_dolly(
    shared_data: Path, global_batch: int, world_size: int
) -> None:
    """Real lengths, in global batches of the paper's sizes, with the default budget."""
    index = (shared_data / "published" / "dolly-gpt2-train.idx").read_bytes()
    sizes = np.frombuffer(index, dtype=np.int32, offset=34, count=11_435)
    lengths = np.minimum(sizes - 1, 512).astype(np.int64) - 1  # without the separator; the last is only ever a label
    order = np.random.default_rng(0).permutation(len(lengths))
    processed = real = 0
    for start in range(0, len(order) - global_batch + 1, global_batch):
        examples = order[start : start + global_batch]
        for share in shares_of(examples, lengths, world_size=world_size, max_tokens=4096):
            processed += padded(lengths, share)
        real += int(lengths[examples].sum())
    assert real <= processed <= 1.25 * real
