"""Texts in blocks of similar length, longest first: what is answered together, or read without gradients."""

import numpy as np
import torch

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
