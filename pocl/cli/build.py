"""From options to the parts of a run: data, teacher, ranker, engine, recipe. train.py puts them together.

Like the entry points, this file reads the options.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from numerize.numerize import numerize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.cli.options import TrainConfig
from pocl.cli.resolve import cache_key, cache_place, needs_ranking, offloads_teacher, wants_packing
from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import ROOT, value_sha256
from pocl.curriculum.stages import Curriculum
from pocl.data.dataset import Split, load_split, read_manifest
from pocl.difficulty.measuring import ScoringSettings
from pocl.difficulty.ranker import Ranker
from pocl.evaluation.sets import DevSet, Example
from pocl.generation.sampling import Sampling
from pocl.losses.divergences import loss_type
from pocl.losses.fused import why_not_fused
from pocl.losses.token import StageObjective
from pocl.models.identity import (
    check_positions,
    check_same_tokenizer,
    check_tokenizer,
    count_parameters,
    shared_vocabulary,
    weights_bytes,
    weights_fingerprint,
)
from pocl.models.loading import DTYPES, load_model
from pocl.models.lora import add_adapters
from pocl.models.offload import place
from pocl.models.packing import why_not_packed
from pocl.models.states import check_head
from pocl.models.teacher import OnlineTeacher, TeacherSource, cached_teacher
from pocl.models.tuning import recompute_activations, train_only_last_layers
from pocl.training.engine import Engine
from pocl.training.on_policy import OnPolicy
from pocl.training.run_folder import RunFolder
from pocl.training.settings import TrainSettings
from pocl.training.student import StudentObjective


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Split, DevSet | None]:
    """The training split, and the dev split as prompts and references (None with --num-dev 0)."""
    data_dir = Path(config.data.data_dir)
    check_tokenizer(data_dir, tokenizer, config.models.model)
    for model in filter(None, (config.models.model, config.models.teacher)):
        check_positions(model, config.data.max_length)
    train = load_split(data_dir, "train", max_length=config.data.max_length, num_examples=config.data.num_train)
    if len(train) == 0:
        raise UserError(f"{data_dir} holds no training examples; run tools/process_data.py with a smaller --num-dev")
    dev = load_split(data_dir, "dev", max_length=config.data.max_length, num_examples=config.data.num_dev)
    if len(dev) == 0:
        if config.curriculum.advance == "converged" or config.on_policy.on_policy == "adaptive":
            raise UserError(
                f"{data_dir} holds no dev examples, but --advance converged and --on-policy adaptive need them"
            )
        return train, None
    generation = config.generation
    sampling = Sampling(
        answer_length(config),
        temperature=generation.sampling_temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        no_repeat_ngram=generation.no_repeat_ngram,
        seed=config.optimiser.seed,
    )
    rows = zip(dev.column("id"), dev.column("prompt"), dev.column("response"), strict=True)
    examples = [Example(example_id, prompt, (response,)) for example_id, prompt, response in rows]
    return train, DevSet(examples, dev.column("prompt_ids"), sampling, generation.eval_batch_size, dev)


def answer_length(config: TrainConfig) -> int:
    """The longest answer in tokens: what --max-length leaves after the longest prompt that was kept."""
    longest_prompt = read_manifest(Path(config.data.data_dir))["max_prompt_length"]
    if longest_prompt >= config.data.max_length:
        raise UserError(
            f"--max-length {config.data.max_length} leaves no room for an answer after prompts of up to "
            f"{longest_prompt} tokens; raise it, or run tools/process_data.py with a lower --max-prompt-length"
        )
    return config.data.max_length - longest_prompt


def load_teacher(
    config: TrainConfig,
    run: RunFolder,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Split,
    device: torch.device,
) -> tuple[TeacherSource | None, int | None]:
    """(the teacher or None for SFT, how many logits student and teacher keep: None for all)."""
    if config.models.teacher is None:
        return None, shared_vocabulary(len(tokenizer), student=student)
    check_same_tokenizer(config.models.model, config.models.teacher, tokenizer)
    model = load_model(config.models.teacher, config.models.dtype, config.models.attention)
    say(f"teacher {config.models.teacher}: {numerize(count_parameters(model))} parameters")
    vocab_size = shared_vocabulary(len(tokenizer), student=student, teacher=model)
    folder, key = teacher_cache(config, model, train, begun=run.begun_with_cache())
    layerwise = offloads_teacher(config, weights_bytes(student), weights_bytes(model), device)
    if layerwise:
        say("the teacher stays in CPU memory; its layers go to the device one by one")
    place(model, device, layerwise=layerwise)
    check_head(model, config.models.teacher, device)
    if folder is None:
        return OnlineTeacher(model, device, fingerprint=key["teacher"], vocab_size=vocab_size), vocab_size
    return cached_teacher(model, train, folder, device, key=key, vocab_size=vocab_size), vocab_size


def teacher_cache(
    config: TrainConfig, teacher: PreTrainedModel, train: Split, *, begun: bool | None
) -> tuple[Path | None, dict[str, Any]]:
    """(where the teacher's states are kept, or None for an online teacher; what they depend on).

    ``begun``: whether the resumed run had a cache; it keeps to that, since the two may round differently.
    """
    key: dict[str, Any] = {"teacher": weights_fingerprint(teacher)} | cache_key(config, train)
    beside = Path(config.data.data_dir) / "teacher-cache" / value_sha256([key, config.models.dtype])[:16]
    # A cache that was begun has its disk space already.
    made = distributed.broadcast((beside / "manifest.json").is_file() or (beside / "done" / "key.json").is_file())
    chosen = cache_place(config, train, teacher, made=made)
    if config.models.teacher_cache == "auto" and begun is not None:
        chosen = "auto" if begun else "off"
    if chosen == "off":
        return None, key
    if chosen == "auto":
        return beside, key
    return Path(chosen), key


def make_ranker(config: TrainConfig, run: RunFolder, teacher: TeacherSource | None, train: Split) -> Ranker | None:
    """What orders the examples from easy to hard; None if nothing needs it."""
    given = config.curriculum
    if not needs_ranking(config) and not given.difficulty_file:
        return None
    settings = ScoringSettings(
        max_new_tokens=answer_length(config),
        no_repeat_ngram=config.generation.no_repeat_ngram,
        batch_size=config.generation.eval_batch_size,
        chunk_tokens=config.loss.chunk_tokens,
        backend=config.generation.generation_backend,
    )
    return Ranker(
        run.path,
        train,
        signals=given.difficulty,
        rerank=given.rerank,
        teacher=teacher,
        settings=settings,
        given=Path(given.difficulty_file) if given.difficulty_file else None,
    )


def prepare_student(config: TrainConfig, student: PreTrainedModel) -> None:
    """Freeze what is not trained, add adapters, turn on gradient checkpointing: as the options say."""
    if config.models.train_last_layers:
        train_only_last_layers(student, config.models.train_last_layers)
    if config.lora.lora_rank:
        add_adapters(student, config.models.model, seed=config.optimiser.seed, **asdict(config.lora))
    if config.models.gradient_checkpointing:
        recompute_activations(student)


def deepspeed_config_path(config: TrainConfig) -> Path:
    """The DeepSpeed JSON, relative to the working directory or else to the project's root."""
    path = Path(config.optimiser.deepspeed_config)
    return path if path.is_file() else ROOT / path


def make_engine(config: TrainConfig, student: PreTrainedModel, vocab_size: int | None, device: torch.device) -> Engine:
    """Student and objective under DeepSpeed."""
    prepare_student(config, student)
    fused = use_fused_objective(config, vocab_size or student.get_output_embeddings().out_features, device)
    return Engine(
        StudentObjective(student, chunk_tokens=config.loss.chunk_tokens, vocab_size=vocab_size, fused=fused),
        lr=config.optimiser.lr,
        weight_decay=config.optimiser.weight_decay,
        clip_grad=config.optimiser.clip_grad,
        dtype=config.models.dtype,
        config_path=deepspeed_config_path(config),
        global_batch_size=config.optimiser.global_batch_size,
        world_size=distributed.world_size(),
        device=device,
    )


def use_packing(
    config: TrainConfig, student: PreTrainedModel, teacher: TeacherSource | None, device: torch.device
) -> bool:
    """Whether micro-batches are packed.  Raises UserError if --packing on is given for models that cannot be."""
    if not wants_packing(config):
        return False
    models = {"student": student} | ({"teacher": teacher.model} if isinstance(teacher, OnlineTeacher) else {})
    for name, model in models.items():
        why = why_not_packed(model, device, learns=model is student)
        if why is None:
            continue
        if config.optimiser.packing == "on":
            raise UserError(f"--packing on is not possible for the {name}: {why}; give --packing off")
        say(f"micro-batches are padded, as they cannot be packed for the {name}: {why}")
        return False
    say("micro-batches are packed, without padding")
    return True


def use_fused_objective(config: TrainConfig, vocab_size: int, device: torch.device) -> bool:
    """Whether the objective runs in the GPU's kernel.  Raises UserError if --fused-objective on is not possible."""
    wanted = config.loss.fused_objective
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False
    loss = loss_type(config.loss.type)
    divergence = loss and loss.bind(**vars(config.loss))
    why = why_not_fused(divergence, device, DTYPES[config.models.dtype], vocab_size=vocab_size)
    if why is None:
        say("cross-entropy, divergence and gradient are computed in one kernel")
        return True
    if wanted == "on":
        raise UserError(f"--fused-objective on: {why}; give --fused-objective off")
    say(f"cross-entropy, divergence and gradient are computed by torch's operations: {why}")
    return False


def make_settings(config: TrainConfig, stages: Curriculum, *, packed: bool) -> TrainSettings:
    """How the stages are trained: one objective per stage, and the optimiser's settings."""
    loss = loss_type(config.loss.type)
    if loss is None:
        terms = (StageObjective(),) * len(stages)
    else:
        divergence = loss.bind(**vars(config.loss))
        power = loss.power(config.loss.loss_scaling)
        terms = tuple(StageObjective(divergence, s.temperature, s.temperature**power, s.kd_ratio) for s in stages)
    return TrainSettings(
        stages=stages,
        terms=terms,
        global_batch_size=config.optimiser.global_batch_size,
        max_tokens=config.optimiser.max_tokens,
        batch_size=config.optimiser.batch_size,
        packed=packed,
        lr=config.optimiser.lr,
        min_lr=config.optimiser.min_lr,
        restart_optimizer=config.curriculum.restart_optimizer,
        patience=config.curriculum.patience if config.curriculum.advance == "converged" else None,
        seed=config.optimiser.seed,
        eval_every=config.run.eval_every,
        log_every=config.run.log_every,
        chunk_tokens=config.loss.chunk_tokens,
        max_new_tokens=answer_length(config),
        bucket_examples=config.run.bucket_examples,
        keep_stages=config.run.keep_stages,
        max_skipped_steps=config.optimiser.max_skipped_steps,
    )


def make_on_policy(config: TrainConfig) -> OnPolicy | None:
    """When to train on the student's own text; None for never."""
    given = config.on_policy
    if given.on_policy == "off":
        return None
    return OnPolicy(
        given.on_policy, given.mixed_alpha, given.replay_buffer, given.on_policy_cross_entropy, config.optimiser.seed
    )
