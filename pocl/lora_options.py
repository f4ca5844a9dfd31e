"""The options of LoRA, and what they must be."""

import math
from dataclasses import dataclass
from typing import ClassVar

from pocl.errors import UserError
from pocl.flags import flag


@dataclass(frozen=True)
class LoraOptions:
    """Training low-rank adapters beside frozen weights, in place of the weights."""

    _argument_group_name: ClassVar[str] = "LoRA"
    lora_rank: int | None = flag("train adapters of this rank, and no other weight [default: train all weights]", None)
    lora_alpha: float | None = flag("adapters are scaled by alpha over rank [default: twice the rank]", None)
    lora_dropout: float = flag("dropout before the adapters [0 to below 1]", 0.0)
    lora_targets: list[str] = flag(
        "linear layers with an adapter, by the last part of their names (q_proj v_proj); all-linear: all but the head",
        ["all-linear"],
    )


def check_lora(lora: LoraOptions, train_last_layers: int | None) -> None:
    """Raise UserError for values outside their range, or that say nothing without the others."""
    if lora.lora_rank is None:
        if lora != LoraOptions():
            raise UserError("--lora-alpha, --lora-dropout and --lora-targets say how; give --lora-rank as well")
        return
    if lora.lora_rank <= 0:
        raise UserError(f"--lora-rank is {lora.lora_rank}; it must be above 0")
    if lora.lora_alpha is not None and not 0 < lora.lora_alpha < math.inf:
        raise UserError(f"--lora-alpha is {lora.lora_alpha}; it must be above 0 and finite")
    if not 0 <= lora.lora_dropout < 1:
        raise UserError(f"--lora-dropout is {lora.lora_dropout}; it must be 0 or above, and below 1")
    if train_last_layers is not None:
        raise UserError("--lora-rank trains adapters, --train-last-layers layers; give one of them")
