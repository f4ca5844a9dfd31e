"""A global batch in micro-batches: its examples are dealt to the ranks, and each rank's share is cut."""

from dataclasses import dataclass

import numpy as np

from pocl.common.errors import UserError

# The time that one more micro-batch costs, in tokens. Measured on the CPU: about 40, for students of 16M and 57M.
# Assumed for a GPU, not measured: launching the kernels of 12 layers, forward and backward, takes about 12 ms, in
# which a student of 124M processes some 4,000 tokens; one of 350M, in twice the time for 24 layers, 3,000.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class MicroBatchLimits:
    """What one micro-batch may hold, and what it costs to have one more."""

    max_tokens: int  # padding included, unless packed; only a single example may have more
    batch_size: int | None  # examples; None: any number
    overhead: int  # tokens that one more micro-batch is worth (``OVERHEAD_TOKENS`` of the device)
    packed: bool = False  # whether its examples stand in one row, without padding


def check_shares(global_batch_size: int, world_size: int) -> None:
    """Raise UserError if the ranks' shares of a global batch would differ."""
    if global_batch_size % world_size:
        raise UserError(
            f"`global_batch_size` {global_batch_size} cannot be split evenly over {world_size} ranks; give a "
            f"multiple of {world_size}, or another number of ranks"
        )


def micro_batches(
    positions: np.ndarray, lengths: np.ndarray, limits: MicroBatchLimits, *, rank: int, world_size: int
) -> list[np.ndarray]:
    """This rank's part of one global batch, in micro-batches of similar length, longest first.

    ``positions`` [G] is the global batch; which examples are in it does not depend on lengths or ranks. All ranks cut
    their shares in the same places, so they have the same number of micro-batches (ZeRO's collectives need that).
    """
    shares = deal(positions, lengths, world_size)
    cuts = cut(lengths[shares].max(axis=1), limits)
    return [shares[rows, rank] for rows in cuts]


def deal(positions: np.ndarray, lengths: np.ndarray, world_size: int) -> np.ndarray:
    """The examples of each rank, longest first, with about as many tokens on all.  [G] -> [G / ranks, ranks].

    They are dealt in rounds: in each every rank gets one, and the rank with the fewest tokens so far gets the longest.
    G is a multiple of ``world_size`` (``check_shares``).
    """
    rounds = positions[np.argsort(-lengths[positions], kind="stable")].reshape(-1, world_size)
    shares, tokens = rounds.copy(), np.zeros(world_size, dtype=np.int64)
    for number, examples in enumerate(rounds if world_size > 1 else ()):
        ranks = np.argsort(tokens, kind="stable")
        shares[number, ranks] = examples
        tokens[ranks] += lengths[examples]
    return shares


def cut(widths: np.ndarray, limits: MicroBatchLimits) -> list[slice]:
    """Rows of these lengths [R], longest first, as the micro-batches that cost least.  -> slices that cover them all.

    A micro-batch costs its tokens (rows times its longest; packed: the sum of its rows) plus the overhead. Packed cuts
    all have the same number of tokens, so one with about equal micro-batches is chosen: the largest decides the
    memory.
    """
    num_rows, overhead = len(widths), limits.overhead
    cost = np.full(num_rows + 1, np.inf)  # of the best cut of the first rows, by number of rows
    cost[0] = 0.0
    start = np.zeros(num_rows + 1, dtype=np.int64)  # where its last micro-batch begins
    for first, width in enumerate(widths.tolist()):
        left = num_rows - first
        tokens = np.cumsum(widths[first:]) if limits.packed else width * np.arange(1, left + 1)
        most = min(max(1, int((tokens <= limits.max_tokens).sum())), limits.batch_size or num_rows, left)
        with_this = cost[first] + overhead + tokens[:most]
        if limits.packed:  # less than one more micro-batch would cost
            with_this += 0.5 * overhead * (tokens[:most] / limits.max_tokens) ** 2
        better = first + 1 + np.flatnonzero(with_this < cost[first + 1 : first + 1 + most])
        cost[better], start[better] = with_this[better - first - 1], first
    slices, stop = [], num_rows
    while stop:
        slices.append(slice(int(start[stop]), stop))
        stop = int(start[stop])
    return slices[::-1]
