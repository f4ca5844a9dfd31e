"""The options of train.py and evaluate.py: one frozen field, one flag, one help line with its unit.

Nobody writes to these objects after parsing; below the entry points functions take plain values.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pocl.cli.flags import flag
from pocl.curriculum.stages import CURRICULA
from pocl.difficulty.ranking import SIGNALS
from pocl.generation.vllm_backend import Backend
from pocl.losses.divergences import LOSSES


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
        "train only the last N layers and the final norm [layers; default: all]", None
    )
    gradient_checkpointing: bool = flag("recompute the student's activations in the backward pass", False)


@dataclass(frozen=True)
class LoraOptions:
    """Training low-rank adapters beside frozen weights, instead of the weights."""

    _argument_group_name: ClassVar[str] = "LoRA"
    lora_rank: int | None = flag("train adapters of this rank and no other weights [default: train all weights]", None)
    lora_alpha: float | None = flag("adapters are scaled by alpha over rank [default: twice the rank]", None)
    lora_dropout: float = flag("dropout before the adapters [0 to below 1]", 0.0)
    lora_targets: list[str] = flag(
        "linear layers with an adapter, by the last part of their names (q_proj v_proj); all-linear: all but the head",
        ["all-linear"],
    )


@dataclass(frozen=True)
class DataOptions:
    """Which processed data, and how much of it."""

    _argument_group_name: ClassVar[str] = "data"
    data_dir: str = flag("folder that tools/process_data.py wrote")
    num_train: int | None = flag("train on the first N examples only [examples; default: all]", None)
    num_dev: int | None = flag("evaluate on the first N dev examples only [examples; default: all; 0: none]", None)
    max_length: int = flag("prompt and response together are truncated to this [tokens]", 512)


@dataclass(frozen=True)
class LossOptions:
    """The objective: (1 - r) * cross-entropy + r * T^k * divergence."""

    _argument_group_name: ClassVar[str] = "objective"
    type: str = flag(
        f"sft, a divergence ({_names(tempered=False)}) or its tempered form ({_names(tempered=True)})", "tfkl"
    )
    temperature: list[float] | None = flag(
        "T of the tempered types: one value, first and last, or one per stage [default: 1 2; one stage: 1]", None
    )
    kd_ratio: list[float] | None = flag(
        "r: one value, first and last, or one per stage [0 to 1; default: 0.7 1; one stage: 1]", None
    )
    loss_scaling: Literal["uniform", "published"] = flag(
        "k of T^k. uniform: 2, and 1 for total variation; published: 2 for tfkl, tjsd, tsrkl and 0 for the rest",
        "uniform",
    )
    selective_reliance: Literal["off", "hard", "linear"] = flag(
        "KD ratio by difficulty. hard: r at or above the threshold and 0 below; linear: r times the percentile", "off"
    )
    reliance_threshold: float = flag("difficulty percentile of --selective-reliance hard [0 to 1]", 0.5)
    skew: float = flag("weight of the teacher (sfkl) or the student (srkl) in the mixture [0 to 1]", 0.1)
    teacher_weight: float = flag("weight of the teacher in the mixture of jsd [0 to 1]", 0.1)
    chunk_tokens: int | None = flag(
        "response tokens whose logits are held at a time [tokens; default: by vocabulary and memory]", None
    )
    fused_objective: Literal["auto", "on", "off"] = flag(
        "cross-entropy, divergence and gradient of a token in one kernel (Triton). auto: on a GPU, if a trial run "
        "gives the same as torch's operations",
        "auto",
    )


@dataclass(frozen=True)
class CurriculumOptions:
    """Which examples are trained on, and when."""

    _argument_group_name: ClassVar[str] = "curriculum"
    curriculum: str = flag(f"which pool at which stage: {', '.join(CURRICULA)}", "baby-step")
    num_stages: int = flag("stages; 1 is plain distillation without a curriculum", 4)
    epochs: int = flag("epochs over the pool in each stage; with --advance converged, at most this many", 8)
    advance: Literal["interval", "converged"] = flag(
        "when a stage ends. interval: after its epochs; converged: once dev ROUGE-L has not risen for --patience "
        "evaluations",
        "interval",
    )
    patience: int = flag("dev evaluations without a rise that end a stage with --advance converged", 2)
    restart_optimizer: bool = flag("fresh optimiser state and fresh cosine at each stage", True)
    difficulty: list[str] = flag(
        f"signals that rank the examples, fused if several are named: {', '.join(SIGNALS)}", ["student"]
    )
    rerank: Literal["off", "stage", "epoch"] | None = flag(
        "rank again before each stage or epoch [default: stage with --difficulty snapshot, else off]", None
    )
    difficulty_file: str | None = flag(
        "take the first ranking from another run's difficulty.jsonl [default: rank now]", None
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
    mixed_alpha: float = flag("mixed: probability that the student samples an example's response [0 to 1]", 0.5)
    replay_buffer: int = flag("samples that are kept to train on again; 0: none [examples]", 0)
    on_policy_cross_entropy: bool = flag("apply the cross-entropy term to the student's text as well", False)


@dataclass(frozen=True)
class OptimiserOptions:
    """AdamW, the cosine schedule, and how a batch is cut."""

    _argument_group_name: ClassVar[str] = "optimiser"
    lr: float = flag("peak learning rate", 1e-4)
    min_lr: float = flag("learning rate at the end of the cosine", 1e-7)
    weight_decay: float = flag("AdamW's weight decay", 0.01)
    clip_grad: float = flag("gradient clipping: maximum global L2 norm", 1.0)
    max_skipped_steps: int = flag(
        "skip up to N steps whose loss or gradient is not finite, then stop; 0 stops at the first [steps]", 0
    )
    global_batch_size: int = flag("examples per optimiser step, over all ranks and micro-batches [examples]", 64)
    max_tokens: int | None = flag(
        "largest micro-batch of one rank, padding included; a single example may exceed it [tokens; default: 4096, "
        "on a GPU up to 16384 by its memory]",
        None,
    )
    batch_size: int | None = flag("largest micro-batch of one rank [examples; default: as --max-tokens allows]", None)
    packing: Literal["auto", "on", "off"] = flag(
        "concatenate the examples of a micro-batch, without padding. auto: if a trial run shows that the models read "
        "them as they read each alone; not with --attention sdpa or eager, which keep them apart by a mask of all "
        "tokens times all tokens",
        "auto",
    )
    seed: int = flag("seed of shuffling, dropout and sampling", 10)
    deepspeed_config: str = flag("DeepSpeed JSON; sets the ZeRO stage", "scripts/deepspeed/zero1.json")


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are sampled; ranking and --sampling-temperature 0 are greedy."""

    _argument_group_name: ClassVar[str] = "generation"
    eval_batch_size: int | None = flag(
        "prompts that are answered together on one rank [examples; default: up to 64, on a GPU up to 1024, by memory]",
        None,
    )
    sampling_temperature: float = flag("sampling temperature in evaluation; 0 is greedy", 1.0)
    top_p: float = flag("nucleus sampling probability; 1 disables it", 1.0)
    top_k: int = flag("top-k sampling: most likely tokens kept; 0 keeps all [tokens]", 0)
    no_repeat_ngram: int = flag("ban repeated n-grams over prompt and answer (paper: 6); 0 disables it [tokens]", 6)
    generation_backend: Backend = flag(
        "what generates in the first ranking and in evaluate.py: builtin, vllm, or auto: vllm on a GPU if it is "
        "installed and loads the model, else builtin; a model in training (dev evaluation, on-policy text, later "
        "rankings) always uses builtin",
        "auto",
    )


@dataclass(frozen=True)
class RunOptions:
    """Where the run is kept and what it reports."""

    _argument_group_name: ClassVar[str] = "run"
    output_dir: str = flag("results folder of the method; the run is OUTPUT_DIR/TYPE/RUN_NAME")
    run_name: str | None = flag("name of the run [default: seed<SEED>]", None)
    plan: bool = flag("print what the run would take (steps, tokens, memory, disk, time), and stop", False)
    eval_every: int = flag("dev evaluation and checkpoint every N epochs, and at each stage's end [epochs]", 1)
    log_every: int = flag("print and record every N optimiser steps [steps]", 1)
    keep_stages: bool = flag("keep the student at each stage's end, in stages/ of the run folder", False)
    resume_weights: bool = flag(
        "resume with another number of ranks than the checkpoint's: from its weights alone, without AdamW's moments, "
        "random states and replay buffers",
        False,
    )
    bucket_examples: int = flag(
        "evaluate N examples of each quarter of the ranking at each stage's end; 0: none [examples]", 16
    )


@dataclass(frozen=True)
class EvaluateOptions:
    """What evaluate.py evaluates."""

    _argument_group_name: ClassVar[str] = "evaluation"
    sets: list[str] = flag("evaluation sets: folders under --data-root with a valid.jsonl")
    model: str | None = flag("model folder or hub name whose answers are sampled", None)
    answers: str | None = flag("score this JSONL of answers (key: text) instead of a model's; one set", None)
    tokenizer: str | None = flag("tokenizer folder [default: the model's]", None)
    seeds: list[int] = flag("one sampled answer per prompt and seed", [10, 20, 30, 40, 50])
    data_root: str = flag("folder that holds the evaluation sets", "data")
    clean: bool = flag("also answer greedily without the n-gram ban; results in clean/ of the results folder", False)
    train_data: str | None = flag(
        "processed data that the model was trained on: prompts found in it are listed, and the scores without them "
        "reported",
        None,
    )
    output_dir: str | None = flag("results folder [default: eval/ beside a run's best/]", None)
    num_examples: int | None = flag("only the first N prompts of each set [examples; default: all]", None)
    max_length: int = flag("prompt limit and longest answer together [tokens]", 512)
    max_prompt_length: int = flag("longer prompts are left-truncated; answers get max-length minus this [tokens]", 256)
    dtype: Literal["fp32", "bf16", "fp16"] = flag("precision of the model", "fp32")


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
