"""The DeepSpeed JSON: read, and checked against what train.py's own options set."""

from pathlib import Path
from typing import Any

import torch

from pocl.common.errors import UserError
from pocl.common.files import read_json


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed JSON.  Raises UserError for keys that train.py's own flags set."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}; a DeepSpeed configuration is a JSON object")
    ours = {
        "train_batch_size": "`global_batch_size`",
        "train_micro_batch_size_per_gpu": "`batch_size`",
        "gradient_accumulation_steps": "`global_batch_size` and `batch_size`",
        "gradient_clipping": "`clip_grad`",
        "optimizer": "`lr` and `weight_decay`",
        "scheduler": "`lr` and `min_lr`",
        "fp16": "`dtype`",
        "bf16": "`dtype`",
    }
    for key, parameters in ours.items():
        if key in config:
            raise UserError(f"{path} sets {key!r}; use {parameters} instead")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"{path}: 'zero_optimization' must be an object whose 'stage' is 0, 1, 2 or 3")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    return config.get("zero_optimization", {}).get("stage", 0)


def check_precision(path: Path | None, dtype: str, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed JSON at ``path``; without one ZeRO stage 0, and 1 below fp32.

    Raises UserError if it or the device cannot train in ``dtype``.
    """
    config = read_deepspeed_config(path) if path else {"zero_optimization": {"stage": int(dtype != "fp32")}}
    if dtype == "fp16" and device.type != "cuda":
        raise UserError("`dtype` fp16 needs a GPU; on the CPU use fp32 (or bf16)")
    if dtype != "fp32" and zero_stage(config) == 0:
        raise UserError(
            f"`dtype` {dtype} needs ZeRO stage 1 to 3, which keep fp32 master weights; {path} sets stage 0 "
            f"(use `deepspeed_config` scripts/deepspeed/zero1.json)"
        )
    return config
