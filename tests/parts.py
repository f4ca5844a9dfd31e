"""Parts of a training run that tests make by themselves."""

from pathlib import Path

from transformers import PreTrainedModel

from pocl.cli import process
from pocl.models.states import make_head
from pocl.training.engine import Engine, OptimiserSettings
from pocl.training.module import StudentObjective


def module_of(
    model: PreTrainedModel, chunk_tokens: int, vocab_size: int | None = None, *, fused: bool = False
) -> StudentObjective:
    """Student and objective as one module."""
    return StudentObjective(model, make_head(model, vocab_size), chunk_tokens=chunk_tokens, fused=fused)


def engine_of(model: PreTrainedModel, config_path: Path, *, weight_decay: float = 0.1) -> Engine:
    """A model under the engine, with chunks of 20 tokens."""
    device = process.start()
    return Engine(module_of(model, 20), OptimiserSettings(weight_decay, 1.0, config_path), device)
