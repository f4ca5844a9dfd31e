"""From options to the parts of a run: data, student, teacher, ranker, settings. train.py puts them together."""

from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch
from numerize.numerize import numerize
from transformers import PreTrainedModel

from pocl.cli.options import TrainConfig
from pocl.cli.resolve import cache_place, needs_ranking, offloads_teacher, wants_packing
from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import ROOT, value_sha256
from pocl.data.dataset import Split, load_split, read_manifest
from pocl.data.micro_batches import OVERHEAD_TOKENS, MicroBatchLimits
from pocl.data.templates import check_template
from pocl.difficulty.measuring import ScoringSettings
from pocl.difficulty.ranker import Ranker
from pocl.difficulty.ranking import columns_of
from pocl.difficulty.ranking_file import read_ranking
from pocl.difficulty.student import needs_answers
from pocl.evaluation.metrics import metric_named
from pocl.evaluation.sets import DevSet, Example, say_what_is_banned
from pocl.evaluation.words import check_readable
from pocl.generation.vllm_backend import choose_backend
from pocl.losses import DistillationLoss
from pocl.losses.fused import why_not_fused
from pocl.models.identity import (
    check_ids,
    check_positions,
    check_same_ids,
    check_same_tokenizer,
    count_parameters,
    vocab_rows,
    weights_bytes,
    weights_fingerprint,
)
from pocl.models.loading import DTYPES, load_model, load_template, load_tokenizer
from pocl.models.lora import add_adapters, lora_places
from pocl.models.packing import why_not_packed
from pocl.models.states import check_head
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from pocl.models.tuning import check_last_layers, recompute_activations, train_only_last_layers
from pocl.training.engine import OptimiserSettings
from pocl.training.on_policy import OnPolicy
from pocl.training.run_folder import RunFolder
from pocl.training.settings import TrainSettings

_LOOKED_AT = 32  # examples whose special tokens are compared with the teacher's


def load_data(config: TrainConfig) -> tuple[Split, Split]:
    """The training and the dev split, checked against the models that are to read them."""
    data_dir, limit = Path(config.data.data_dir), config.data.max_length
    models = [path for path in (config.models.model, config.models.teacher) if path]
    for model in models:
        check_positions(model, limit)
    if config.models.teacher:
        check_same_tokenizer(config.models.model, config.models.teacher, load_tokenizer(config.models.model))
    train = load_split(data_dir, "train", max_length=limit, num_examples=config.data.num_train)
    if len(train) == 0:
        raise UserError(f"{data_dir} holds no training examples; run tools/process_data.py with a smaller --num-dev")
    dev = load_split(data_dir, "dev", max_length=limit, num_examples=config.data.num_dev)
    if len(dev) == 0 and (config.curriculum.advance == "converged" or config.on_policy.on_policy == "adaptive"):
        raise UserError(
            f"{data_dir} holds no dev examples, but --advance converged and --on-policy adaptive need them"
        )
    for model in models:
        check_template(train.template, str(data_dir), model, load_template(model))
    if config.models.teacher and train.template.jinja:
        some = train.table.select(range(min(_LOOKED_AT, len(train))))
        ids = chain.from_iterable(chain(some["prompt_ids"], some["response_ids"]))
        check_same_ids(ids, load_tokenizer(config.models.model), config.models.teacher)
    check_ids(max(train.highest_id, dev.highest_id), str(data_dir), *models)
    ranks_by_rouge = needs_ranking(config) and "rouge_l" in columns_of(config.curriculum.difficulty)
    for split, name in ((dev, "dev"), *(((train, "train"),) if ranks_by_rouge else ())):
        check_readable(split.column("response"), config.generation.rouge_tokenizer, str(data_dir / name))
    return train, dev


def make_dev_set(config: TrainConfig, dev: Split) -> DevSet | None:
    """The dev split as prompts and references; None if it is empty."""
    if len(dev) == 0:
        return None
    sampling = config.generation.sampling(answer_length(config), seed=config.optimiser.seed)
    say_what_is_banned("dev", dev.column("prompt_ids"), dev.column("response_ids"), sampling.no_repeat_ngram)
    rows = zip(dev.column("id"), dev.column("prompt"), dev.column("response"), strict=True)
    examples = [Example(example_id, prompt, (response,)) for example_id, prompt, response in rows]
    words, batch_size = config.generation.rouge_tokenizer, config.sizes.eval_batch_size
    select_by = metric_named(config.run.select_by)
    return DevSet(examples, dev.column("prompt_ids"), sampling, batch_size, dev, words, select_by)


def answer_length(config: TrainConfig) -> int:
    """The longest answer in tokens: what --max-length leaves after the longest prompt that was kept."""
    longest_prompt = read_manifest(Path(config.data.data_dir))["max_prompt_length"]
    if longest_prompt >= config.data.max_length:
        raise UserError(
            f"--max-length {config.data.max_length} leaves no room for an answer after prompts of up to "
            f"{longest_prompt} tokens; raise it, or run tools/process_data.py with a lower --max-prompt-length"
        )
    return config.data.max_length - longest_prompt


def load_student(config: TrainConfig, device: torch.device) -> Student:
    """The student, as it was saved: what is trained of it is decided by ``prepare_student``."""
    models = config.models
    most = vocab_rows(models.teacher) if models.teacher else None
    student = Student.load(
        models.model, dtype=models.dtype, attention=models.attention, device=device, most_tokens=most
    )
    say(f"student {models.model}: {numerize(count_parameters(student.model))} parameters")
    return student


def load_teacher(config: TrainConfig, run: RunFolder, student: Student, train: Split) -> Teacher | None:
    """The teacher, online or from its cache, on the student's device; None for SFT."""
    path, device = config.models.teacher, student.device
    if path is None:
        return None
    model = load_model(path, config.models.dtype, config.models.attention)
    say(f"teacher {path}: {numerize(count_parameters(model))} parameters")
    folder = teacher_cache(config, model, train, begun=run.begun_with_cache())
    layerwise = offloads_teacher(config, weights_bytes(student.model), weights_bytes(model), device)
    if layerwise:
        say("the teacher stays in CPU memory; its layers go to the device one by one")
    teacher = Teacher.of(model, device, num_tokens=student.head.num_logits, layerwise=layerwise)
    check_head(model, path, device)
    return teacher if folder is None else teacher.cached(train, folder)


def teacher_cache(config: TrainConfig, teacher: PreTrainedModel, train: Split, *, begun: bool | None) -> Path | None:
    """Where the teacher's states are kept; None for an online teacher.

    ``begun``: whether the resumed run had a cache; it keeps to that, since the two may round differently.
    """
    key = {"teacher": weights_fingerprint(teacher)} | train.key
    beside = Path(config.data.data_dir) / "teacher-cache" / value_sha256([key, config.models.dtype])[:16]
    # A cache that was begun has its disk space already.
    made = distributed.broadcast((beside / "manifest.json").is_file() or (beside / "done" / "key.json").is_file())
    chosen = cache_place(config, train, teacher, made=made)
    if config.models.teacher_cache == "auto" and begun is not None:
        chosen = "auto" if begun else "off"
    return {"off": None, "auto": beside}.get(chosen, Path(chosen))


def make_ranker(config: TrainConfig, run: RunFolder, train: Split, teacher: Teacher | None) -> Ranker | None:
    """What orders the examples from easy to hard; None if nothing needs it."""
    given = config.curriculum
    if not needs_ranking(config) and not given.difficulty_file:
        return None
    settings = ScoringSettings(
        max_new_tokens=answer_length(config),
        no_repeat_ngram=config.generation.no_repeat_ngram,
        batch_size=config.sizes.eval_batch_size,
        chunk_tokens=config.sizes.chunk_tokens,
        backend=config.generation.generation_backend,
        rouge_tokenizer=config.generation.rouge_tokenizer,
        samples=given.pass_samples,
    )
    return Ranker(
        run.path,
        train,
        signals=given.difficulty,
        rerank=given.rerank or "off",
        teacher=teacher,
        settings=settings,
        given=Path(given.difficulty_file) if given.difficulty_file else None,
    )


def check_before_start(config: TrainConfig, student: Student, train: Split) -> None:
    """Raise UserError for what would otherwise be refused behind the ranking, when the run's folder is written."""
    given = config.curriculum
    if config.models.train_last_layers:
        check_last_layers(student.model, config.models.train_last_layers)
    if config.lora.lora_rank:
        lora_places(student.model, config.lora.lora_targets)
    if given.difficulty_file:
        read_ranking(Path(given.difficulty_file), train)
    elif needs_ranking(config) and needs_answers(columns_of(given.difficulty)):
        choose_backend(config.generation.generation_backend, config.models.model, student.device)


def prepare_student(config: TrainConfig, student: PreTrainedModel) -> None:
    """Freeze what is not trained, add adapters, turn on gradient checkpointing: as the options say."""
    if config.models.train_last_layers:
        train_only_last_layers(student, config.models.train_last_layers)
    if config.lora.lora_rank:
        add_adapters(student, config.models.model, seed=config.optimiser.seed, **asdict(config.lora))
    if config.models.gradient_checkpointing:
        recompute_activations(student)


def make_loss(config: TrainConfig, student: Student) -> DistillationLoss:
    """The objective that --type names, by the GPU's kernel where that was tried and is right."""
    given = config.loss
    loss = DistillationLoss(
        given.type,
        scaling=given.loss_scaling,
        skew=given.skew,
        teacher_weight=given.teacher_weight,
        chunk_tokens=config.sizes.chunk_tokens,
    )
    return replace(loss, fused=use_fused_objective(config, student, loss))


def make_settings(config: TrainConfig, student: Student, teacher: Teacher | None) -> TrainSettings:
    """How the steps are made, after a trial of what the models can read and the device can compute."""
    optimiser, on_policy = config.optimiser, config.on_policy
    policy = None
    if on_policy.on_policy != "off":
        policy = OnPolicy(
            on_policy.on_policy,
            on_policy.mixed_alpha,
            on_policy.replay_buffer,
            on_policy.on_policy_cross_entropy,
            optimiser.seed,
        )
    return TrainSettings(
        optimiser=OptimiserSettings(optimiser.weight_decay, optimiser.clip_grad, deepspeed_config_path(config)),
        limits=MicroBatchLimits(
            config.sizes.max_tokens,
            optimiser.batch_size,
            OVERHEAD_TOKENS[student.device.type],
            packed=use_packing(config, student, teacher),
        ),
        max_new_tokens=answer_length(config),
        on_policy=policy,
        patience=config.curriculum.patience if config.curriculum.advance == "converged" else None,
        eval_every=config.run.eval_every,
        log_every=config.run.log_every,
        bucket_examples=config.run.bucket_examples,
        keep_stages=config.run.keep_stages,
        max_skipped_steps=optimiser.max_skipped_steps,
        report_to=tuple(config.run.report_to),
    )


def deepspeed_config_path(config: TrainConfig) -> Path:
    """The DeepSpeed JSON, relative to the working directory or else to the project's root."""
    path = Path(config.optimiser.deepspeed_config)
    return path if path.is_file() else ROOT / path


def use_packing(config: TrainConfig, student: Student, teacher: Teacher | None) -> bool:
    """Whether micro-batches are packed.  Raises UserError if --packing on is given for models that cannot be."""
    if not wants_packing(config):
        return False
    models = {"student": student.model} | ({"teacher": teacher.model} if teacher and teacher.model else {})
    for name, model in models.items():
        why = why_not_packed(model, student.device, learns=model is student.model)
        if why is None:
            continue
        if config.optimiser.packing == "on":
            raise UserError(f"--packing on is not possible for the {name}: {why}; give --packing off")
        say(f"micro-batches are padded, as they cannot be packed for the {name}: {why}")
        return False
    say("micro-batches are packed, without padding")
    return True


def use_fused_objective(config: TrainConfig, student: Student, loss: DistillationLoss) -> bool:
    """Whether the objective runs in the GPU's kernel.  Raises UserError if --fused-objective on is not possible."""
    wanted, device = config.loss.fused_objective, student.device
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False
    dtype, vocab_size = DTYPES[config.models.dtype], student.head.num_logits
    divergences = [loss.named(name).divergence for name in config.loss.type_of_stage or [loss.name]]
    reasons = (why_not_fused(one, device, dtype, vocab_size=vocab_size) for one in divergences)
    why = next(filter(None, reasons), None)
    if why is None:
        say("cross-entropy, divergence and gradient are computed in one kernel")
        return True
    if wanted == "on":
        raise UserError(f"--fused-objective on: {why}; give --fused-objective off")
    say(f"cross-entropy, divergence and gradient are computed by torch's operations: {why}")
    return False
