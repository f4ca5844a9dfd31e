"""From the command line to checked and resolved options of train.py, before anything is loaded."""

import dataclasses
from collections.abc import Sequence
from typing import get_type_hints

from pocl.cli.flags import parse
from pocl.cli.options import TrainConfig
from pocl.cli.recipes import RECIPES
from pocl.common.errors import UserError
from pocl.curriculum.stages import ramp
from pocl.difficulty.ranking import columns_of, sources_of
from pocl.evaluation.metrics import metric_named
from pocl.losses.divergences import loss_type


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The checked options of train.py.  Raises UserError for values that cannot work together."""
    groups = get_type_hints(TrainConfig)
    what = "Distil a language model with a curriculum (POCL), or train a baseline."
    config = TrainConfig(*parse(groups, what, argv, recipes=RECIPES))
    _check_teacher(config)
    _check_difficulty(config)
    if config.loss.weighting == "paced" and "pass_rate" not in columns_of(config.curriculum.difficulty):
        raise UserError("--weighting paced weighs by the pass rate; give --difficulty pass-rate, alone or with others")
    given, num_stages = config.loss.type_of_stage, config.curriculum.num_stages
    if given and len(given) != num_stages:
        raise UserError(f"--type-of-stage has {len(given)} names for {num_stages} stage(s); give one per stage")
    _check_on_policy(config)
    if config.lora.lora_rank is not None and config.models.train_last_layers is not None:
        raise UserError("--lora-rank trains adapters, --train-last-layers layers; give only one of them")
    metric_named(config.run.select_by)
    return resolve(config)


def _check_teacher(config: TrainConfig) -> None:
    name, teacher = config.loss.type, config.models.teacher
    needed = loss_type(name) is not None
    if needed and not teacher:
        raise UserError(f"--type {name} distils from a teacher; give --teacher PATH (or --type sft)")
    if teacher and not needed:
        raise UserError(f"--type {name} uses no teacher; drop --teacher {teacher}")


def _check_difficulty(config: TrainConfig) -> None:
    options = config.curriculum
    sources = sources_of(options.difficulty)
    if "teacher" in sources and not config.models.teacher:
        raise UserError(
            f"--difficulty {' '.join(options.difficulty)} needs a teacher, and --type {config.loss.type} has none"
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
    if options.on_policy == "off":
        return
    if loss_type(config.loss.type) is None:
        raise UserError(f"--type {config.loss.type} has no teacher to judge the student's text; drop --on-policy")
    if config.models.teacher_cache not in ("auto", "off"):
        raise UserError("--on-policy needs the teacher online: its text is not known beforehand; drop --teacher-cache")
    if options.on_policy == "adaptive" and config.data.num_dev == 0:
        raise UserError("--on-policy adaptive follows the dev loss; --num-dev 0 leaves none")


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
    return ramp(_or_default(given, (1.0, 2.0), num_stages), num_stages, name="temperature")


def stage_kd_ratios(config: TrainConfig) -> tuple[float, ...]:
    """r of each stage; 0 for SFT, which has no teacher.  Raises UserError if another is given for it."""
    num_stages, given = config.curriculum.num_stages, config.loss.kd_ratio
    if loss_type(config.loss.type) is None:
        if given is not None and set(given) != {0.0}:
            raise UserError(f"--type {config.loss.type} has no teacher, but --kd-ratio is {' '.join(map(str, given))}")
        return (0.0,) * num_stages
    return ramp(_or_default(given, (0.7, 1.0), num_stages), num_stages, name="kd_ratio")


def _or_default(given: list[float] | None, first_and_last: tuple[float, float], num_stages: int) -> Sequence[float]:
    if given is not None:
        return given
    return first_and_last if num_stages > 1 else (1.0,)
