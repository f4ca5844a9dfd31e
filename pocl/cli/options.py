"""The options of train.py: one frozen field, one flag, one help line with its unit, its bounds.

Here stands what a run is made of and how it is made; what is learnt, and when, is in method_options.py. A group's
``check`` is for what concerns its own options together; pocl/cli/checks.py has what concerns several groups. Nobody
writes to these objects after parsing; below the entry points functions take plain values.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

from pocl.cli.evaluate_options import GenerationOptions
from pocl.cli.flags import defaults, flag
from pocl.cli.method_options import CurriculumOptions, LossOptions, OnPolicyOptions
from pocl.common.errors import UserError
from pocl.training.hub import check_name
from pocl.training.trackers import NONE, TRACKERS, check_trackers


@dataclass(frozen=True)
class ModelOptions:
    """Which models, in which precision."""

    _argument_group_name: ClassVar[str] = "models"
    model: str = flag("the student: a Hugging Face model folder (safetensors) or hub name")
    teacher: str | None = flag("the teacher, likewise; required by every --type except sft", None)
    teacher_cache: str = flag(
        "off, a folder for the teacher's hidden states, or auto: beside the processed data, if examples are seen "
        "more than once and the disk has twice the room",
        "auto",
    )
    teacher_offload: Literal["auto", "on", "off"] = flag(
        "keep the teacher's weights in CPU memory and copy its layers to the GPU one by one in each forward pass; "
        "auto: if teacher and student would take more than four fifths of the GPU's memory",
        "auto",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = flag("precision of student and teacher; master weights stay fp32", "fp32")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = flag(
        "attention implementation, by its name in transformers; auto: transformers' choice, with sdpa replaced by "
        "this project's for packed examples; flash_attention_2 needs a GPU, --dtype bf16 and the package flash-attn",
        "auto",
    )
    train_last_layers: int | None = flag(
        "train only the last N layers and the final norm [layers; default: all]", None, above=0
    )
    gradient_checkpointing: bool = flag("recompute the student's activations in the backward pass", False)


@dataclass(frozen=True)
class LoraOptions:
    """Training low-rank adapters beside frozen weights, instead of the weights."""

    _argument_group_name: ClassVar[str] = "LoRA"
    lora_rank: int | None = flag(
        "train adapters of this rank and no other weights [default: train all weights]", None, above=0
    )
    lora_alpha: float | None = flag("adapters are scaled by alpha over rank [default: twice the rank]", None, above=0)
    lora_dropout: float = flag("dropout before the adapters [0 to below 1]", 0.0, at_least=0, below=1)
    lora_targets: list[str] = flag(
        "linear layers with an adapter, by the last part of their names (q_proj v_proj); all-linear: all but the head",
        ["all-linear"],
    )

    def check(self) -> None:
        """Raise UserError for values that have no effect."""
        if self.lora_rank is None and self != LoraOptions():
            raise UserError(
                "--lora-alpha, --lora-dropout and --lora-targets do nothing alone; give --lora-rank as well"
            )


@dataclass(frozen=True)
class DataOptions:
    """Which processed data, and how much of it."""

    _argument_group_name: ClassVar[str] = "data"
    data_dir: str = flag("folder that tools/process_data.py wrote")
    num_train: int | None = flag("train on the first N examples only [examples; default: all]", None, above=0)
    num_dev: int | None = flag(
        "evaluate on the first N dev examples only [examples; default: all; 0: none]", None, at_least=0
    )
    max_length: int = flag("prompt and response together are truncated to this [tokens]", 512, above=0)


@dataclass(frozen=True)
class OptimiserOptions:
    """AdamW, the cosine schedule, and how a batch is cut."""

    _argument_group_name: ClassVar[str] = "optimiser"
    lr: float = flag("peak learning rate", 1e-4, above=0)
    min_lr: float = flag("learning rate at the end of the cosine", 1e-7, at_least=0)
    warmup_steps: float = flag(
        "steps in which the learning rate rises to its peak, or their share if below 1; in each stage if the "
        "optimiser restarts [steps]",
        0.0,
        at_least=0,
    )
    lr_schedule: Literal["cosine", "constant"] = flag("what the learning rate does behind its peak", "cosine")
    weight_decay: float = flag("AdamW's weight decay", 0.01, at_least=0)
    clip_grad: float = flag("gradient clipping: maximum global L2 norm", 1.0, above=0)
    max_skipped_steps: int = flag(
        "skip up to N steps whose loss or gradient is not finite, then stop; 0 stops at the first [steps]",
        0,
        at_least=0,
    )
    global_batch_size: int = flag(
        "examples per optimiser step, over all ranks and micro-batches [examples]", 64, above=0
    )
    max_tokens: int | None = flag(
        "largest micro-batch of one rank, padding included; a single example may exceed it [tokens; default: 4096, "
        "on a GPU up to 16384 by its memory]",
        None,
        above=0,
    )
    batch_size: int | None = flag(
        "largest micro-batch of one rank [examples; default: as --max-tokens allows]", None, above=0
    )
    packing: Literal["auto", "on", "off"] = flag(
        "concatenate the examples of a micro-batch, without padding. auto: if a trial run shows that the models read "
        "them as they read each alone; not with --attention sdpa or eager, which keep them apart by a mask of all "
        "tokens times all tokens",
        "auto",
    )
    seed: int = flag("seed of shuffling, dropout and sampling", 10, at_least=0)
    deepspeed_config: str = flag("DeepSpeed JSON; sets the ZeRO stage", "scripts/deepspeed/zero1.json")

    def check(self) -> None:
        """Raise UserError for a cosine that rises, and for a part of a step."""
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.warmup_steps >= 1 and self.warmup_steps % 1:
            raise UserError(f"--warmup-steps is {self.warmup_steps}; it is a whole number, or a share below 1")


@dataclass(frozen=True)
class RunOptions:
    """Where the run is kept and what it reports."""

    _argument_group_name: ClassVar[str] = "run"
    output_dir: str = flag("results folder of the method; the run is OUTPUT_DIR/TYPE/RUN_NAME")
    run_name: str | None = flag("name of the run [default: seed<SEED>]", None)
    plan: bool = flag("print what the run would take (steps, tokens, memory, disk), and stop", False)
    eval_every: int = flag(
        "dev evaluation and checkpoint every N epochs, and at each stage's end [epochs]", 1, above=0
    )
    log_every: int = flag("print and record every N optimiser steps [steps]", 1, above=0)
    select_by: str = flag(
        "metric on dev that chooses the best student: rouge_l, chrf, token_f1, exact_match, rouge_1, rouge_2, or "
        "MODULE:FUNCTION, your own function of an answer and its references [0 to 1]",
        "rouge_l",
    )
    keep_stages: bool = flag("keep the student at each stage's end, in stages/ of the run folder", False)
    resume_weights: bool = flag(
        "resume with another number of ranks than the checkpoint's: from its weights alone, without AdamW's moments, "
        "random states and replay buffers",
        False,
    )
    bucket_examples: int = flag(
        "evaluate N examples of each quarter of the ranking at each stage's end; 0: none [examples]", 16, at_least=0
    )
    report_to: list[str] = flag(
        f"trackers beside metrics.jsonl, one or several: {', '.join(TRACKERS)}; or {NONE}",
        ["tensorboard"],
        known=(*TRACKERS, NONE),
    )
    push_to_hub: str | None = flag(
        "upload best/ with its model card to this repository of the hub (OWNER/NAME) at the end; a new one is private",
        None,
    )

    def check(self) -> None:
        """Raise UserError for a tracker that is not installed, and for what is no name of a repository."""
        check_trackers(self.report_to)
        if self.push_to_hub is not None:
            check_name(self.push_to_hub)


@dataclass(frozen=True)
class Sizes:
    """What is computed at once."""

    chunk_tokens: int
    max_tokens: int
    eval_batch_size: int


@dataclass(frozen=True)
class TrainConfig:
    """All options of train.py."""

    models: ModelOptions
    lora: LoraOptions
    data: DataOptions
    loss: LossOptions
    curriculum: CurriculumOptions
    on_policy: OnPolicyOptions
    optimiser: OptimiserOptions
    generation: GenerationOptions
    run: RunOptions

    @property
    def sizes(self) -> Sizes:
        """The sizes, once they are decided (``resolve.with_sizes``)."""
        chunk_tokens, max_tokens = self.loss.chunk_tokens, self.optimiser.max_tokens
        eval_batch_size = self.generation.eval_batch_size
        if chunk_tokens is None or max_tokens is None or eval_batch_size is None:
            raise ValueError("the sizes are not decided yet")
        return Sizes(chunk_tokens, max_tokens, eval_batch_size)


def train_defaults() -> dict[str, dict[str, Any]]:
    """The default of each option that has one, by group."""
    return {name: defaults(group) for name, group in get_type_hints(TrainConfig).items()}
