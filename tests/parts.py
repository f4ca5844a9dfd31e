"""Parts of a training run that tests make by themselves."""

from pathlib import Path

from transformers import PreTrainedModel

from pocl.cli import process
from pocl.models.states import make_head
from pocl.training.engine import Engine, OptimiserSettings
from pocl.training.module import Chunking, StudentObjective


def module_of(
    model: PreTrainedModel, chunk_tokens: int, vocab_size: int | None = None, *, fused: bool = False
) -> StudentObjective:
    """Student and objective as one module."""
    return StudentObjective(model, make_head(model, vocab_size), Chunking(chunk_tokens, fused))


def engine_of(
    model: PreTrainedModel,
    config_path: Path,
    *,
    dtype: str = "fp32",
    global_batch_size: int = 2,
    weight_decay: float = 0.1,
) -> Engine:
    """A model under the engine, with chunks of 20 tokens and a learning rate of 0.01."""
    device = process.start()
    settings = OptimiserSettings(
        lr=1e-2,
        weight_decay=weight_decay,
        clip_grad=1.0,
        dtype=dtype,
        global_batch_size=global_batch_size,
        deepspeed_config=config_path,
    )
    return Engine(module_of(model, 20), settings, device)
