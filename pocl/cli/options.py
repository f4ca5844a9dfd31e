"""The options of train.py: one frozen field, one flag, one help line with its unit, its bounds.

A group's ``check`` is for what concerns its own options together; pocl/cli/checks.py has what concerns several groups.
Nobody writes to these objects after parsing; below the entry points functions take plain values.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

from pocl.cli.evaluate_options import GenerationOptions
from pocl.cli.flags import defaults, flag
from pocl.common.errors import UserError
from pocl.curriculum.stages import CURRICULA
from pocl.difficulty.ranking import SIGNALS, sources_of
from pocl.losses.divergences import LOSSES, loss_type
from pocl.training.hub import check_name
from pocl.training.trackers import NONE, TRACKERS, check_trackers


def _names(*, tempered: bool) -> str:
    return " ".join(name for name, loss in LOSSES.items() if loss.tempered == tempered)


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
class LossOptions:
    """The objective: (1 - r) * cross-entropy + r * T^k * divergence."""

    _argument_group_name: ClassVar[str] = "objective"
    type: str = flag(
        f"sft, a divergence ({_names(tempered=False)}) or its tempered form ({_names(tempered=True)})", "tfkl"
    )
    type_of_stage: list[str] | None = flag(
        "a divergence for each stage, such as tfkl tfkl trkl trkl [default: --type in all]",
        None,
    )
    temperature: list[float] | None = flag(
        "T of the tempered types: one value, first and last, or one per stage [default: 1 2; one stage: 1]",
        None,
        above=0,
    )
    kd_ratio: list[float] | None = flag(
        "r: one value, first and last, or one per stage [0 to 1; default: 0.7 1; one stage: 1]",
        None,
        at_least=0,
        at_most=1,
    )
    loss_scaling: Literal["uniform", "published"] = flag(
        "k of T^k. uniform: 2, and 1 for total variation; published: 2 for tfkl, tjsd, tsrkl and 0 for the rest",
        "uniform",
    )
    selective_reliance: Literal["off", "hard", "linear"] = flag(
        "KD ratio by difficulty. hard: r at or above the threshold and 0 below; linear: r times the percentile", "off"
    )
    reliance_threshold: float = flag(
        "difficulty percentile of --selective-reliance hard [0 to 1]", 0.5, at_least=0, at_most=1
    )
    weighting: Literal["off", "paced"] = flag(
        "weigh examples. paced: by p(1 - p), p the pass rate that --difficulty pass-rate measures (arXiv 2603.11178)",
        "off",
    )
    skew: float = flag("weight of the teacher (sfkl) or the student (srkl) in the mixture [0 to 1]", 0.1)
    teacher_weight: float = flag("weight of the teacher in the mixture of jsd [0 to 1]", 0.1)
    chunk_tokens: int | None = flag(
        "response tokens whose logits are held at a time [tokens; default: by vocabulary and memory]", None, above=0
    )
    fused_objective: Literal["auto", "on", "off"] = flag(
        "cross-entropy, divergence and gradient of a token in one kernel (Triton). auto: on a GPU, if a trial run "
        "gives the same as torch's operations",
        "auto",
    )

    def check(self) -> None:
        """Raise UserError for an unknown type, and for parameters that it does not have or outside its range."""
        loss = loss_type(self.type)
        if loss is not None:
            loss.bind(**vars(self))
        elif self.selective_reliance != "off":
            raise UserError(f"--type {self.type} has no teacher to rely on; drop --selective-reliance")
        elif self.weighting != "off":
            raise UserError(
                f"--weighting {self.weighting} weighs a teacher's lessons, and --type {self.type} has none"
            )
        for name in self.type_of_stage or ():
            other = loss_type(name)
            if loss is None or other is None or other.tempered != loss.tempered:
                raise UserError(
                    f"--type-of-stage {name} beside --type {self.type}: both want a teacher and a temperature, or "
                    "neither does; give names of one kind"
                )


@dataclass(frozen=True)
class CurriculumOptions:
    """Which examples are trained on, and when."""

    _argument_group_name: ClassVar[str] = "curriculum"
    curriculum: str = flag(f"which pool at which stage: {', '.join(CURRICULA)}", "baby-step", known=CURRICULA)
    num_stages: int = flag("stages; 1 is plain distillation without a curriculum", 4, above=0)
    epochs: int = flag("epochs over the pool in each stage; with --advance converged, at most this many", 8, above=0)
    keep_share: float = flag(
        "keep this share of the ranking, the easiest, and schedule it alone, in the manner of SRD (arXiv 2508.06135) "
        "[above 0, to 1]",
        1.0,
        above=0,
        at_most=1,
    )
    max_steps: int | None = flag(
        "take N optimiser steps, shared out among the stages as their epochs would be, which it replaces [steps; "
        "default: all epochs]",
        None,
        above=0,
    )
    advance: Literal["interval", "converged"] = flag(
        "when a stage ends. interval: after its epochs; converged: once dev ROUGE-L has not risen for --patience "
        "evaluations",
        "interval",
    )
    patience: int = flag("dev evaluations without a rise that end a stage with --advance converged", 2, above=0)
    restart_optimizer: bool = flag("fresh optimiser state and fresh cosine at each stage", True)
    difficulty: list[str] = flag(
        f"signals that rank the examples, fused if several are named: {', '.join(SIGNALS)}", ["student"], known=SIGNALS
    )
    pass_samples: int = flag("answers that are sampled for --difficulty pass-rate [answers]", 4, above=0)
    rerank: Literal["off", "stage", "epoch"] | None = flag(
        "rank again before each stage or epoch [default: stage with --difficulty snapshot, else off]", None
    )
    difficulty_file: str | None = flag(
        "take the first ranking from another run's difficulty.jsonl [default: rank now]", None
    )

    def check(self) -> None:
        """Raise UserError if losses of training are to rank, and never may."""
        if "training" in sources_of(self.difficulty) and self.rerank == "off":
            raise UserError(
                "--difficulty snapshot ranks by training losses; drop --rerank off, or give --rerank stage or epoch"
            )
        if self.keep_share < 1:
            if CURRICULA[self.curriculum].order != "ranked":
                raise UserError(
                    f"--keep-share keeps the easiest examples, and --curriculum {self.curriculum} has no order"
                )
            if sources_of(self.difficulty) == {"training"}:
                raise UserError(
                    "--keep-share selects before the first step, when --difficulty snapshot knows nothing yet"
                )
        again = self.rerank not in (None, "off") or "training" in sources_of(self.difficulty)
        if again and CURRICULA[self.curriculum].shuffled_visits:
            raise UserError(
                f"--curriculum {self.curriculum} shuffles all visits before the first step; it cannot rank again: "
                "drop --rerank, and --difficulty snapshot"
            )


@dataclass(frozen=True)
class OnPolicyOptions:
    """Training on text that the student writes while it trains."""

    _argument_group_name: ClassVar[str] = "on-policy"
    on_policy: Literal["off", "mixed", "adaptive"] = flag(
        "train on the student's own samples. mixed: with a fixed probability (GKD); adaptive: with one that rises "
        "when the dev loss does (DistiLLM)",
        "off",
    )
    mixed_alpha: float = flag(
        "mixed: probability that the student samples an example's response [0 to 1]", 0.5, at_least=0, at_most=1
    )
    replay_buffer: int = flag("samples that are kept to train on again; 0: none [examples]", 0, at_least=0)
    on_policy_cross_entropy: bool = flag("apply the cross-entropy term to the student's text as well", False)


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
