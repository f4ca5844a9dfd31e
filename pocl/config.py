"""The options of train.py and evaluate.py: one frozen field, one flag, one help line with its unit.

Nobody writes to these objects after parsing; below the entry points functions take plain values.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pocl.curriculum import CURRICULA, ramp
from pocl.errors import UserError, closest
from pocl.flags import flag, parse
from pocl.lora_options import LoraOptions, check_lora
from pocl.losses import loss_type
from pocl.ranking import SIGNALS

Backend = Literal["auto", "builtin", "vllm"]


@dataclass(frozen=True)
class ModelOptions:
    """Which models, in which precision."""

    _argument_group_name: ClassVar[str] = "models"
    model: str = flag("the student: a Hugging Face model folder (safetensors) or hub name")
    teacher: str | None = flag("the teacher, likewise; needed by every --type but sft", None)
    teacher_cache: str = flag(
        "off, a folder for the teacher's hidden states, or auto: beside the processed data, where examples are seen "
        "more than once and the disk has twice the room",
        "auto",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = flag("precision of student and teacher; master weights stay fp32", "fp32")
    train_last_layers: int | None = flag(
        "train the last N layers and the final norm only [layers; default: all]", None
    )
    gradient_checkpointing: bool = flag("recompute the student's activations in the backward pass", False)


@dataclass(frozen=True)
class DataOptions:
    """Which processed data, and how much of it."""

    _argument_group_name: ClassVar[str] = "data"
    data_dir: str = flag("folder that tools/process_data.py wrote")
    num_train: int | None = flag("train on the first N examples only [examples; default: all]", None)
    num_dev: int | None = flag("evaluate on the first N dev examples only [examples; default: all; 0: none]", None)
    max_length: int = flag("prompt and response together are cut here [tokens]", 512)


@dataclass(frozen=True)
class LossOptions:
    """The objective: (1 - r) * cross-entropy + r * T^k * divergence."""

    _argument_group_name: ClassVar[str] = "objective"
    type: str = flag(
        "sft, a divergence (fkl rkl jsd tvd sfkl srkl) or its tempered form (tfkl trkl tjsd ttvd tsfkl tsrkl)", "tfkl"
    )
    temperature: list[float] | None = flag(
        "T of the tempered types: one value, first and last, or one a stage [default: 1 2, with one stage 1]", None
    )
    kd_ratio: list[float] | None = flag(
        "r: one value, first and last, or one a stage [0 to 1; default: 0.7 1, with one stage 1]", None
    )
    loss_scaling: Literal["uniform", "published"] = flag(
        "k of T^k. uniform: 2, and 1 for total variation; published: 2 for tfkl, tjsd, tsrkl and 0 for the rest",
        "uniform",
    )
    selective_reliance: Literal["off", "hard", "linear"] = flag(
        "KD ratio by difficulty. hard: r at or above the threshold and 0 below; linear: r times the percentile", "off"
    )
    reliance_threshold: float = flag("difficulty percentile of --selective-reliance hard [0 to 1]", 0.5)
    skew: float = flag("weight of the distribution itself in the mixture of sfkl and srkl [0 to 1]", 0.1)
    teacher_weight: float = flag("weight of the teacher in the mixture of jsd [0 to 1]", 0.1)
    chunk_tokens: int | None = flag(
        "response tokens whose logits are held at a time [tokens; default: by vocabulary and memory]", None
    )


@dataclass(frozen=True)
class CurriculumOptions:
    """Which examples when."""

    _argument_group_name: ClassVar[str] = "curriculum"
    curriculum: str = flag(f"which pool at which stage: {', '.join(CURRICULA)}", "baby-step")
    num_stages: int = flag("stages; 1 is plain distillation without a curriculum", 4)
    epochs: int = flag("epochs over the pool in each stage; with --advance converged the most of them", 8)
    advance: Literal["interval", "converged"] = flag(
        "when a stage ends. interval: after its epochs; converged: once dev ROUGE-L has not risen for --patience "
        "evaluations",
        "interval",
    )
    patience: int = flag("dev evaluations without a rise that end a stage with --advance converged", 2)
    restart_optimizer: bool = flag("fresh optimiser state and fresh cosine at each stage", True)
    difficulty: list[str] = flag(
        f"what ranks the examples, fused where several are named: {', '.join(SIGNALS)}", ["student"]
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
    mixed_alpha: float = flag("probability that a micro-batch is sampled in mixed [0 to 1]", 0.5)
    replay_buffer: int = flag("samples that each rank keeps to train on again; 0: none [examples]", 0)
    on_policy_cross_entropy: bool = flag("student text has a cross-entropy term as well", False)


@dataclass(frozen=True)
class OptimiserOptions:
    """AdamW, a cosine, and how a batch is cut."""

    _argument_group_name: ClassVar[str] = "optimiser"
    lr: float = flag("peak learning rate", 1e-4)
    min_lr: float = flag("learning rate at the end of the cosine", 1e-7)
    weight_decay: float = flag("AdamW's weight decay", 0.01)
    clip_grad: float = flag("largest norm of the whole gradient", 1.0)
    global_batch_size: int = flag("examples of one optimiser step, over all ranks and micro-batches [examples]", 64)
    max_tokens: int = flag(
        "largest micro-batch of one rank, padding included; one example may be longer [tokens]", 4096
    )
    batch_size: int | None = flag("largest micro-batch of one rank [examples; default: as --max-tokens allows]", None)
    seed: int = flag("seed of shuffling, dropout and sampling", 10)
    deepspeed_config: str = flag("DeepSpeed JSON; says the ZeRO stage", "scripts/deepspeed/zero1.json")


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are sampled; ranking and --temperature 0 are greedy."""

    _argument_group_name: ClassVar[str] = "generation"
    eval_batch_size: int = flag("prompts that are answered together on one rank [examples]", 32)
    sampling_temperature: float = flag("temperature of evaluation; 0 is greedy", 1.0)
    top_p: float = flag("nucleus of evaluation; 1 keeps all", 1.0)
    top_k: int = flag("most likely tokens kept in evaluation; 0 keeps all [tokens]", 0)
    no_repeat_ngram: int = flag("ban a repeated n-gram over prompt and answer (paper: 6); 0 turns it off [tokens]", 6)
    generation_backend: Backend = flag(
        "what answers in the first ranking and in evaluate.py: builtin, vllm, or auto: vllm on a GPU where it is "
        "installed and loads the model, else builtin; a model that trains (dev evaluation, on-policy text, later "
        "rankings) is always asked by builtin",
        "auto",
    )


@dataclass(frozen=True)
class RunOptions:
    """Where the run lives and what it tells."""

    _argument_group_name: ClassVar[str] = "run"
    output_dir: str = flag("results folder of the method; the run is OUTPUT_DIR/TYPE/RUN_NAME")
    run_name: str | None = flag("name of the run [default: seed<SEED>]", None)
    eval_every: int = flag("dev evaluation and checkpoint every N epochs, and at each stage's end [epochs]", 1)
    log_every: int = flag("print and record every N optimiser steps [steps]", 1)
    bucket_examples: int = flag(
        "at each stage's end ask N examples of each quarter of the ranking again; 0: none [examples]", 16
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
    clean: bool = flag("answer greedily and without a ban of n-grams as well; results in clean/ of the folder", False)
    train_data: str | None = flag(
        "processed data that the model was trained on: prompts that stand in it are listed, and the scores without "
        "them given",
        None,
    )
    output_dir: str | None = flag("results folder [default: eval/ beside a run's best/]", None)
    num_examples: int | None = flag("first N prompts of each set only [examples; default: all]", None)
    max_length: int = flag("prompt limit and longest answer together [tokens]", 512)
    max_prompt_length: int = flag(
        "longer prompts lose their beginning; answers get max-length less this [tokens]", 256
    )
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


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The checked options of train.py.  Raises UserError for values that cannot work together."""
    types = [f.type for f in dataclasses.fields(TrainConfig)]
    config = TrainConfig(*parse(types, "Distil a language model with a curriculum (POCL), or train a baseline.", argv))
    check_train(config)
    return resolve(config)


def check_train(config: TrainConfig) -> None:
    """Raise UserError for what would only be noticed after a model is loaded."""
    loss = loss_type(config.loss.type)
    if loss is None and config.models.teacher:
        raise UserError(f"--type {config.loss.type} uses no teacher; drop --teacher {config.models.teacher}")
    if loss is not None:
        if not config.models.teacher:
            raise UserError(f"--type {config.loss.type} distils from a teacher; give --teacher PATH (or --type sft)")
        loss.bind(skew=config.loss.skew, teacher_weight=config.loss.teacher_weight)
    if not 0.0 <= config.loss.reliance_threshold <= 1.0:
        raise UserError(f"--reliance-threshold is {config.loss.reliance_threshold}; it must be within 0 to 1")
    if loss is None and config.loss.selective_reliance != "off":
        raise UserError(f"--type {config.loss.type} has no teacher to rely on; drop --selective-reliance")
    if config.curriculum.curriculum not in CURRICULA:
        name = config.curriculum.curriculum
        raise UserError(f"unknown --curriculum {name!r}{closest(name, CURRICULA)} (known: {', '.join(CURRICULA)})")
    _check_difficulty(config)
    _check_positive(config)
    check_lora(config.lora, config.models.train_last_layers)
    _check_on_policy(config)


def _check_difficulty(config: TrainConfig) -> None:
    options = config.curriculum
    for name in options.difficulty:
        if name not in SIGNALS:
            raise UserError(f"unknown --difficulty {name!r}{closest(name, SIGNALS)} (known: {', '.join(SIGNALS)})")
    if not options.difficulty:
        raise UserError(f"--difficulty wants at least one of {', '.join(SIGNALS)}")
    if "teacher" in options.difficulty and not config.models.teacher:
        raise UserError(f"--difficulty teacher wants a teacher, and --type {config.loss.type} has none")
    if "snapshot" in options.difficulty and options.rerank == "off":
        raise UserError(
            "--difficulty snapshot ranks by the losses of training; drop --rerank off, or give stage or epoch"
        )
    if options.advance == "converged" and config.data.num_dev == 0:
        raise UserError("--advance converged follows dev ROUGE-L; --num-dev 0 leaves none")


def _check_on_policy(config: TrainConfig) -> None:
    options = config.on_policy
    if not 0.0 <= options.mixed_alpha <= 1.0:
        raise UserError(f"--mixed-alpha is {options.mixed_alpha}; it must be within 0 to 1")
    if options.replay_buffer < 0:
        raise UserError(f"--replay-buffer is {options.replay_buffer}; it must be 0 (none) or above")
    if options.on_policy == "off":
        return
    if loss_type(config.loss.type) is None:
        raise UserError(f"--type {config.loss.type} has no teacher to judge the student's text; drop --on-policy")
    if config.models.teacher_cache not in ("auto", "off"):
        raise UserError("--on-policy needs the teacher online: its text is not known beforehand; drop --teacher-cache")
    if options.on_policy == "adaptive" and config.data.num_dev == 0:
        raise UserError("--on-policy adaptive follows the dev loss; --num-dev 0 leaves none")


def _check_positive(config: TrainConfig) -> None:
    counts = {
        "num-stages": config.curriculum.num_stages,
        "epochs": config.curriculum.epochs,
        "patience": config.curriculum.patience,
        "global-batch-size": config.optimiser.global_batch_size,
        "max-tokens": config.optimiser.max_tokens,
        "eval-batch-size": config.generation.eval_batch_size,
        "eval-every": config.run.eval_every,
        "log-every": config.run.log_every,
        "max-length": config.data.max_length,
        "lr": config.optimiser.lr,
        "clip-grad": config.optimiser.clip_grad,
    }
    for name, value in (
        ("num-train", config.data.num_train),
        ("batch-size", config.optimiser.batch_size),
        ("chunk-tokens", config.loss.chunk_tokens),
        ("train-last-layers", config.models.train_last_layers),
    ):
        if value is not None:
            counts[name] = value
    for name, value in counts.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name} is {value}; it must be above 0 and finite")
    optional = {
        "min-lr": config.optimiser.min_lr,
        "weight-decay": config.optimiser.weight_decay,
        "seed": config.optimiser.seed,
        "num-dev": config.data.num_dev or 0,
        "bucket-examples": config.run.bucket_examples,
    }
    for name, value in optional.items():
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} is {value}; it must be 0 or above, and finite")
    if config.optimiser.min_lr > config.optimiser.lr:
        raise UserError(f"--min-lr {config.optimiser.min_lr} is above --lr {config.optimiser.lr}")
    check_generation(config.generation)


def check_evaluate(what: EvaluateOptions, generation: GenerationOptions) -> None:
    """Raise UserError for options of evaluate.py that cannot work together."""
    if (what.model is None) == (what.answers is None):
        raise UserError("give either --model FOLDER or --answers FILE")
    if what.answers and len(what.sets) != 1:
        raise UserError(f"--answers belongs to one set, --sets names {len(what.sets)}")
    if not what.sets or not what.seeds:
        raise UserError("--sets and --seeds want at least one value each")
    if min(what.seeds) < 0:
        raise UserError(f"--seeds holds {min(what.seeds)}; a seed is 0 or above")
    if what.num_examples is not None and what.num_examples <= 0:
        raise UserError(f"--num-examples is {what.num_examples}; it must be above 0")
    if not 0 < what.max_prompt_length < what.max_length:
        raise UserError(
            f"--max-prompt-length {what.max_prompt_length} must be above 0 and leave room for an answer in "
            f"--max-length {what.max_length}"
        )
    if generation.eval_batch_size <= 0:
        raise UserError(f"--eval-batch-size is {generation.eval_batch_size}; it must be above 0")
    check_generation(generation)


def check_generation(options: GenerationOptions) -> None:
    """Raise UserError for sampling values outside their range."""
    if not 0 <= options.sampling_temperature < math.inf:
        raise UserError(f"--sampling-temperature is {options.sampling_temperature}; it must be 0 (greedy) or above")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p is {options.top_p}; it must be above 0 and at most 1")
    for name, value in (("top-k", options.top_k), ("no-repeat-ngram", options.no_repeat_ngram)):
        if value < 0:
            raise UserError(f"--{name} is {value}; it must be 0 (off) or above")


def resolve(config: TrainConfig) -> TrainConfig:
    """The same options with what was left open decided: T and r of every stage, and when to rank again.

    Raises UserError where a type was given what it does not have.
    """
    temperature, kd_ratio = stage_temperatures(config), stage_kd_ratios(config)
    loss = dataclasses.replace(config.loss, temperature=list(temperature), kd_ratio=list(kd_ratio))
    rerank = config.curriculum.rerank or ("stage" if "snapshot" in config.curriculum.difficulty else "off")
    curriculum = dataclasses.replace(config.curriculum, rerank=rerank)
    return dataclasses.replace(config, loss=loss, curriculum=curriculum)


def stage_temperatures(config: TrainConfig) -> tuple[float, ...]:
    """T of each stage: 1 for the types that have no temperature.  Raises UserError where one was given to them."""
    loss, num_stages, given = loss_type(config.loss.type), config.curriculum.num_stages, config.loss.temperature
    if loss is None or not loss.tempered:
        if given is not None and set(given) != {1.0}:
            raise UserError(
                f"--type {config.loss.type} has T = 1, but --temperature is {' '.join(map(str, given))}; "
                f"for a temperature use --type t{loss.name if loss else 'fkl'}"
            )
        return (1.0,) * num_stages
    temperatures = ramp(_or_default(given, (1.0, 2.0), num_stages), num_stages, name="temperature")
    if not all(0 < temperature < math.inf for temperature in temperatures):
        raise UserError(f"--temperature {' '.join(map(str, temperatures))} must be above 0 and finite at every stage")
    return temperatures


def stage_kd_ratios(config: TrainConfig) -> tuple[float, ...]:
    """r of each stage; 0 for SFT, which has no teacher.  Raises UserError for values outside 0 to 1."""
    num_stages, given = config.curriculum.num_stages, config.loss.kd_ratio
    if loss_type(config.loss.type) is None:
        if given is not None and set(given) != {0.0}:
            raise UserError(f"--type {config.loss.type} has no teacher, but --kd-ratio is {' '.join(map(str, given))}")
        return (0.0,) * num_stages
    ratios = ramp(_or_default(given, (0.7, 1.0), num_stages), num_stages, name="kd-ratio")
    for ratio in ratios:
        if not 0.0 <= ratio <= 1.0:
            raise UserError(f"--kd-ratio {ratio} is outside 0 to 1")
    return ratios


def _or_default(given: list[float] | None, first_and_last: tuple[float, float], num_stages: int) -> Sequence[float]:
    if given is not None:
        return given
    return first_and_last if num_stages > 1 else (1.0,)


def as_dict(config: Any) -> dict[str, Any]:
    """The options as plain JSON values."""
    return dataclasses.asdict(config)
