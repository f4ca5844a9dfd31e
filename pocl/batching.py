"""How examples are put together: micro-batches of a global batch, and blocks of texts to read or to answer."""

import numpy as np
import torch

from pocl.errors import UserError

# One micro-batch more costs as much time as so many tokens would. Measured on the CPU: about 40, for students of 16M
# and 57M. Assumed for a GPU, not measured: to start the kernels of 12 layers, forward and backward, takes about 12 ms,
# in which a student of 124M gets through some 4,000 tokens; one of 350M, in twice the time for 24 layers, 3,000.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}
# Of texts that a model reads together without learning, padding included.
READING_TOKENS = {"cpu": 2048, "cuda": 16_384}


def blocks_by_length(lengths: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Positions cut into blocks of neighbours in length, longest first.  [N] -> list of [<= block_size].

    The longest are first, so that memory runs out at once or never.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + block_size] for start in range(0, len(order), block_size)]


def blocks_to_read(lengths: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """Positions cut into blocks of neighbours in length, longest first, for a pass without learning.  [N] -> list.

    The same blocks whatever the world size. An example that is longer is alone.
    """
    max_tokens, order, blocks = READING_TOKENS[device.type], np.argsort(-lengths, kind="stable"), []
    while len(order):
        count = max(1, max_tokens // int(lengths[order[0]]))
        blocks.append(order[:count])
        order = order[count:]
    return blocks


def check_shares(global_batch_size: int, world_size: int) -> None:
    """Raise UserError where the ranks' shares of a global batch would differ."""
    if global_batch_size % world_size:
        raise UserError(
            f"--global-batch-size {global_batch_size} cannot be shared by {world_size} ranks; give a multiple of "
            f"{world_size}, or another number of ranks"
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
    """This rank's part of one global batch, in micro-batches of neighbours in length, longest first.

    ``positions`` [G] is the global batch; which examples are in it does not depend on lengths or ranks. A micro-batch
    holds at most ``max_tokens`` tokens, padding included unless it is ``packed``, and ``batch_size`` examples
    (``cut_rows``).

    The examples are dealt in rounds from the longest down: of each round every rank gets one, and the rank with the
    fewest tokens so far gets the longest. All ranks cut behind the same rounds, so they have equally many
    micro-batches (ZeRO's collectives need that) of about the same size. G is a multiple of ``world_size``
    (``check_shares``).
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

    A micro-batch costs its tokens (rows times its longest; ``packed``: the sum of its rows) and ``overhead`` tokens
    for being one more (``OVERHEAD_TOKENS`` of the device). It holds at most ``max_tokens`` of them, but for one row
    alone that is longer, and at most ``batch_size`` rows where that is given. Of packed cuts, which all have as many
    tokens, one of about equal micro-batches is taken: the largest decides the memory.
    """
    num_rows = len(widths)
    cost = np.full(num_rows + 1, np.inf)  # of the best cut of the first rows, by their number
    cost[0] = 0.0
    start = np.zeros(num_rows + 1, dtype=np.int64)  # where its last micro-batch begins
    for first, width in enumerate(widths.tolist()):
        left = num_rows - first
        tokens = np.cumsum(widths[first:]) if packed else width * np.arange(1, left + 1)
        most = min(max(1, int((tokens <= max_tokens).sum())), batch_size or num_rows, left)
        with_this = cost[first] + overhead + tokens[:most]
        if packed:  # less than one micro-batch more would cost
            with_this += 0.5 * overhead * (tokens[:most] / max_tokens) ** 2
        better = first + 1 + np.flatnonzero(with_this < cost[first + 1 : first + 1 + most])
        cost[better], start[better] = with_this[better - first - 1], first
    slices, stop = [], num_rows
    while stop:
        slices.append(slice(int(start[stop]), stop))
        stop = int(start[stop])
    return slices[::-1]
