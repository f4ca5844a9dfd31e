"""From the command line to checked and resolved options, before anything is loaded."""

import dataclasses
import math
from collections.abc import Sequence

from pocl.cli.flags import parse
from pocl.cli.options import EvaluateOptions, GenerationOptions, LoraOptions, TrainConfig
from pocl.common.errors import UserError, closest
from pocl.curriculum.stages import CURRICULA, ramp
from pocl.difficulty.ranking import SIGNALS, sources_of
from pocl.losses.divergences import loss_type


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The checked options of train.py.  Raises UserError for values that cannot work together."""
    types = [f.type for f in dataclasses.fields(TrainConfig)]
    config = TrainConfig(*parse(types, "Distil a language model with a curriculum (POCL), or train a baseline.", argv))
    check_train(config)
    return resolve(config)


def check_train(config: TrainConfig) -> None:
    """Raise UserError for mistakes that would otherwise only be noticed after a model is loaded."""
    loss = loss_type(config.loss.type)
    if loss is None and config.models.teacher:
        raise UserError(f"--type {config.loss.type} uses no teacher; drop --teacher {config.models.teacher}")
    if loss is not None:
        if not config.models.teacher:
            raise UserError(f"--type {config.loss.type} distils from a teacher; give --teacher PATH (or --type sft)")
        loss.bind(**vars(config.loss))
    if not 0.0 <= config.loss.reliance_threshold <= 1.0:
        raise UserError(f"--reliance-threshold is {config.loss.reliance_threshold}; it must be between 0 and 1")
    if loss is None and config.loss.selective_reliance != "off":
        raise UserError(f"--type {config.loss.type} has no teacher to rely on; drop --selective-reliance")
    if config.curriculum.curriculum not in CURRICULA:
        name = config.curriculum.curriculum
        raise UserError(f"unknown --curriculum {name!r}{closest(name, CURRICULA)} (known: {', '.join(CURRICULA)})")
    _check_difficulty(config)
    _check_positive(config)
    _check_lora(config.lora, config.models.train_last_layers)
    _check_on_policy(config)


def _check_lora(lora: LoraOptions, train_last_layers: int | None) -> None:
    """Raise UserError for values outside their range, or that have no effect without the others."""
    if lora.lora_rank is None:
        if lora != LoraOptions():
            raise UserError(
                "--lora-alpha, --lora-dropout and --lora-targets do nothing alone; give --lora-rank as well"
            )
        return
    if lora.lora_rank <= 0:
        raise UserError(f"--lora-rank is {lora.lora_rank}; it must be above 0")
    if lora.lora_alpha is not None and not 0 < lora.lora_alpha < math.inf:
        raise UserError(f"--lora-alpha is {lora.lora_alpha}; it must be above 0 and finite")
    if not 0 <= lora.lora_dropout < 1:
        raise UserError(f"--lora-dropout is {lora.lora_dropout}; it must be at least 0 and below 1")
    if train_last_layers is not None:
        raise UserError("--lora-rank trains adapters, --train-last-layers layers; give only one of them")


def _check_difficulty(config: TrainConfig) -> None:
    options = config.curriculum
    for name in options.difficulty:
        if name not in SIGNALS:
            raise UserError(f"unknown --difficulty {name!r}{closest(name, SIGNALS)} (known: {', '.join(SIGNALS)})")
    if not options.difficulty:
        raise UserError(f"--difficulty needs at least one of {', '.join(SIGNALS)}")
    sources = sources_of(options.difficulty)
    if "teacher" in sources and not config.models.teacher:
        raise UserError(
            f"--difficulty {' '.join(options.difficulty)} needs a teacher, and --type {config.loss.type} has none"
        )
    if "training" in sources and options.rerank == "off":
        raise UserError(
            "--difficulty snapshot ranks by training losses; drop --rerank off, or give --rerank stage or epoch"
        )
    if sources == {"training"} and not options.difficulty_file:
        if config.on_policy.on_policy == "mixed" and config.on_policy.mixed_alpha == 1.0:
            raise UserError("--difficulty snapshot ranks by losses on references, but --mixed-alpha 1 trains on none")
        never_ranked = options.num_stages == 1 and (options.rerank != "epoch" or options.epochs == 1)
        if config.loss.selective_reliance != "off" and never_ranked:
            raise UserError(
                "--selective-reliance needs a ranking, but --difficulty snapshot has none before the only stage; "
                "give --rerank epoch and --epochs above 1"
            )
    if options.advance == "converged" and config.data.num_dev == 0:
        raise UserError("--advance converged follows dev ROUGE-L; --num-dev 0 leaves none")


def _check_on_policy(config: TrainConfig) -> None:
    options = config.on_policy
    if not 0.0 <= options.mixed_alpha <= 1.0:
        raise UserError(f"--mixed-alpha is {options.mixed_alpha}; it must be between 0 and 1")
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
        "eval-every": config.run.eval_every,
        "log-every": config.run.log_every,
        "max-length": config.data.max_length,
        "lr": config.optimiser.lr,
        "clip-grad": config.optimiser.clip_grad,
    }
    for name, value in (
        ("num-train", config.data.num_train),
        ("batch-size", config.optimiser.batch_size),
        ("max-tokens", config.optimiser.max_tokens),
        ("eval-batch-size", config.generation.eval_batch_size),
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
        "max-skipped-steps": config.optimiser.max_skipped_steps,
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
        raise UserError("--sets and --seeds need at least one value each")
    if min(what.seeds) < 0:
        raise UserError(f"--seeds holds {min(what.seeds)}; a seed is 0 or above")
    if what.num_examples is not None and what.num_examples <= 0:
        raise UserError(f"--num-examples is {what.num_examples}; it must be above 0")
    if not 0 < what.max_prompt_length < what.max_length:
        raise UserError(
            f"--max-prompt-length {what.max_prompt_length} must be above 0 and leave room for an answer in "
            f"--max-length {what.max_length}"
        )
    if generation.eval_batch_size is not None and generation.eval_batch_size <= 0:
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
    """The same options with open defaults decided: T and r of every stage, and when to rank again.

    Raises UserError if a type is given a T or an r that it does not have.
    """
    temperature, kd_ratio = stage_temperatures(config), stage_kd_ratios(config)
    loss = dataclasses.replace(config.loss, temperature=list(temperature), kd_ratio=list(kd_ratio))
    asks_training = "training" in sources_of(config.curriculum.difficulty)
    rerank = config.curriculum.rerank or ("stage" if asks_training else "off")
    curriculum = dataclasses.replace(config.curriculum, rerank=rerank)
    return dataclasses.replace(config, loss=loss, curriculum=curriculum)


def stage_temperatures(config: TrainConfig) -> tuple[float, ...]:
    """T of each stage: 1 for the types that have no temperature.  Raises UserError if one is given for them."""
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
    ratios = ramp(_or_default(given, (0.7, 1.0), num_stages), num_stages, name="kd_ratio")
    for ratio in ratios:
        if not 0.0 <= ratio <= 1.0:
            raise UserError(f"--kd-ratio {ratio} is outside 0 to 1")
    return ratios


def _or_default(given: list[float] | None, first_and_last: tuple[float, float], num_stages: int) -> Sequence[float]:
    if given is not None:
        return given
    return first_and_last if num_stages > 1 else (1.0,)
