"""How examples are batched: micro-batches of a global batch, and blocks of texts to read or to answer."""

import numpy as np
import torch

from pocl.common.errors import UserError

# The time that one more micro-batch costs, in tokens. Measured on the CPU: about 40, for students of 16M and 57M.
# Assumed for a GPU, not measured: launching the kernels of 12 layers, forward and backward, takes about 12 ms, in
# which a student of 124M processes some 4,000 tokens; one of 350M, in twice the time for 24 layers, 3,000.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}
# Tokens that a model reads together without gradients, padding included.
READING_TOKENS = {"cpu": 2048, "cuda": 16_384}


def blocks_by_length(lengths: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Positions cut into blocks of similar length, longest first.  [N] -> list of [<= block_size].

    The longest are first, so that memory runs out at once or never.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + block_size] for start in range(0, len(order), block_size)]


def blocks_to_read(lengths: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """Positions cut into blocks of similar length, longest first, for a pass without gradients.  [N] -> list.

    The same blocks whatever the world size. An example longer than the limit is alone.
    """
    max_tokens, order, blocks = READING_TOKENS[device.type], np.argsort(-lengths, kind="stable"), []
    while len(order):
        count = max(1, max_tokens // int(lengths[order[0]]))
        blocks.append(order[:count])
        order = order[count:]
    return blocks


def check_shares(global_batch_size: int, world_size: int) -> None:
    """Raise UserError if the ranks' shares of a global batch would differ."""
    if global_batch_size % world_size:
        raise UserError(
            f"`global_batch_size` {global_batch_size} cannot be split evenly over {world_size} ranks; give a "
            f"multiple of {world_size}, or another number of ranks"
        )


def micro_batches(
    positions: np.ndarray,
    lengths: np.ndarray,
    *,
    max_tokens: int,
    batch_size: int | None,
    rank: int,
    world_size: int,
    overhead: int,
    packed: bool = False,
) -> list[np.ndarray]:
    """This rank's part of one global batch, in micro-batches of similar length, longest first.

    ``positions`` [G] is the global batch; which examples are in it does not depend on lengths or ranks. A micro-batch
    holds at most ``max_tokens`` tokens, padding included unless it is ``packed``, and ``batch_size`` examples
    (``cut_rows``).

    The examples are dealt in rounds, longest first: in each round every rank gets one, and the rank with the fewest
    tokens so far gets the longest. All ranks cut after the same rounds, so they have the same number of micro-batches
    (ZeRO's collectives need that) of about the same size. G is a multiple of ``world_size`` (``check_shares``).
    """
    rounds = positions[np.argsort(-lengths[positions], kind="stable")].reshape(-1, world_size)
    share, tokens = rounds[:, 0].copy(), np.zeros(world_size, dtype=np.int64)
    for number, examples in enumerate(rounds if world_size > 1 else ()):
        ranks = np.argsort(tokens, kind="stable")
        tokens[ranks] += lengths[examples]
        share[number] = examples[ranks == rank][0]
    limits = {"max_tokens": max_tokens, "batch_size": batch_size, "overhead": overhead}
    cuts = cut_rows(lengths[rounds[:, 0]], **limits, packed=packed)
    return [share[rows] for rows in cuts]


def cut_rows(
    widths: np.ndarray, *, max_tokens: int, batch_size: int | None = None, overhead: int, packed: bool = False
) -> list[slice]:
    """Rows of these lengths [R], longest first, as the micro-batches that cost least.  -> slices that cover them all.

    A micro-batch costs its tokens (rows times its longest; ``packed``: the sum of its rows) plus ``overhead`` tokens
    (``OVERHEAD_TOKENS`` of the device). It holds at most ``max_tokens`` tokens, except for a single longer row, and at
    most ``batch_size`` rows if given. Packed cuts all have the same number of tokens, so one with about equal
    micro-batches is chosen: the largest decides the memory.
    """
    num_rows = len(widths)
    cost = np.full(num_rows + 1, np.inf)  # of the best cut of the first rows, by number of rows
    cost[0] = 0.0
    start = np.zeros(num_rows + 1, dtype=np.int64)  # where its last micro-batch begins
    for first, width in enumerate(widths.tolist()):
        left = num_rows - first
        tokens = np.cumsum(widths[first:]) if packed else width * np.arange(1, left + 1)
        most = min(max(1, int((tokens <= max_tokens).sum())), batch_size or num_rows, left)
        with_this = cost[first] + overhead + tokens[:most]
        if packed:  # less than one more micro-batch would cost
            with_this += 0.5 * overhead * (tokens[:most] / max_tokens) ** 2
        better = first + 1 + np.flatnonzero(with_this < cost[first + 1 : first + 1 + most])
        cost[better], start[better] = with_this[better - first - 1], first
    slices, stop = [], num_rows
    while stop:
        slices.append(slice(int(start[stop]), stop))
        stop = int(start[stop])
    return slices[::-1]
