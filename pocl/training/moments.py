"""AdamW's moments, wherever a wrapper keeps them."""

import torch
from torch import Tensor


def clear_moments(optimizer: torch.optim.Optimizer) -> None:
    """Reset AdamW's moments and its step count, as in a new optimiser; weights stay.

    ``optimizer`` may be wrapped, by DeepSpeed or accelerate.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    # In place: ZeRO keeps references to these tensors.
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.zero_() if isinstance(value, Tensor) else type(value)(0)
