"""PAPER  The objective: divergences, one token, chunks of tokens from hidden states (torch alone)."""

from pocl.losses.chunked import LossValues, distillation_objective
from pocl.losses.distillation_loss import DistillationLoss
from pocl.losses.divergences import ALIASES, LOSSES, Divergence, Softmax, slope_by_autograd, softmax
from pocl.losses.head import Head, HiddenStates
from pocl.losses.token import StageObjective, Weights, token_objective

__all__ = [
    "ALIASES",
    "LOSSES",
    "DistillationLoss",
    "Divergence",
    "Head",
    "HiddenStates",
    "LossValues",
    "Softmax",
    "StageObjective",
    "Weights",
    "distillation_objective",
    "slope_by_autograd",
    "softmax",
    "token_objective",
]
