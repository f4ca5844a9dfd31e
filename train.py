"""Train a student with POCL, or with one of its baselines: load, score, plan stages, fit.

    deepspeed train.py --model STUDENT --teacher TEACHER --data-dir processed_data/gpt2/dolly \\
        --output-dir results/gpt2/pocl --type tfkl

SFT, plain distillation and POCL are all this program: distillation is POCL with one stage, SFT has no teacher.
`python train.py --help` lists the flags; scripts/ holds the paper's settings.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from numerize.numerize import numerize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.cli import cpu, process
from pocl.cli.build import (
    deepspeed_config_path,
    load_data,
    load_teacher,
    make_engine,
    make_on_policy,
    make_ranker,
    make_settings,
    prepare_student,
    use_packing,
)
from pocl.cli.checks import parse_train
from pocl.cli.options import LoraOptions, TrainConfig
from pocl.cli.plan import show_plan
from pocl.cli.process import quiet_libraries, run_main
from pocl.cli.resolve import data_fingerprint, make_pools, make_stages, with_sizes
from pocl.common import distributed
from pocl.common.console import say
from pocl.common.files import read_jsonl, value_sha256, write_json
from pocl.curriculum.stages import Curriculum
from pocl.data.micro_batches import check_shares
from pocl.difficulty.diagnostics import write_diagnostics
from pocl.difficulty.ranker import FIRST
from pocl.models.identity import count_parameters, weights_fingerprint
from pocl.models.loading import load_model, load_tokenizer
from pocl.models.states import check_head
from pocl.models.student import Student
from pocl.models.teacher import TeacherSource
from pocl.training.engine import check_precision, read_deepspeed_config
from pocl.training.position import Position
from pocl.training.run_folder import RunFolder
from pocl.training.trainer import Trainer


def main() -> None:
    """Parse, open the run's folder, train."""
    quiet_libraries()
    config = parse_train()
    device = process.start()
    process.seed_everything(config.optimiser.seed)
    tokenizer = load_tokenizer(config.models.model)
    run = run_folder(config, device)
    config = with_sizes(config, len(tokenizer), device, begun=run.begun_with())
    # Before anything is loaded.
    run.check_options(run_options(config), distributed.world_size(), weights_only=config.run.resume_weights)
    if config.run.plan:
        plan(config, run, tokenizer, device)
        return
    with run.locked():
        distil(config, run, tokenizer, device)


def distil(config: TrainConfig, run: RunFolder, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    """The whole algorithm."""
    train, dev = load_data(config, tokenizer)
    stages = make_stages(config, len(train))

    student = load_model(config.models.model, config.models.dtype, config.models.attention).to(device)
    check_head(student, config.models.model, device)
    say(f"student {config.models.model}: {numerize(count_parameters(student))} parameters")
    teacher, vocab_size = load_teacher(config, run, student, tokenizer, train, device)
    packed = use_packing(config, student, teacher, device)
    start_run(run, config, stages, student, teacher)

    ranker = make_ranker(config, run, teacher, train)
    ranking = ranker.rank(FIRST, lambda: Student(student, tokenizer, config.models.model)) if ranker else None
    engine = make_engine(config, student, vocab_size, device)
    trainer = Trainer(
        make_settings(config, stages, packed=packed),
        run=run,
        engine=engine,
        student=student,
        tokenizer=tokenizer,
        teacher=teacher,
        train=train,
        pools=make_pools(config, len(train), ranking.order if ranking else None),
        ranker=ranker,
        dev=dev,
        on_policy=make_on_policy(config),
        device=device,
    )
    report(run, trainer.fit())


def plan(config: TrainConfig, run: RunFolder, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    """Print what the run would take; write nothing."""
    train, _ = load_data(config, tokenizer)
    show_plan(
        config,
        run,
        train,
        zero=read_deepspeed_config(deepspeed_config_path(config)).get("zero_optimization", {}),
        prepare=partial(prepare_student, replace(config, lora=LoraOptions())),
        device=device,
    )


def run_folder(config: TrainConfig, device: torch.device) -> RunFolder:
    """The run's folder, after checking that this machine can do what the options ask for."""
    check_shares(config.optimiser.global_batch_size, distributed.world_size())
    check_precision(deepspeed_config_path(config), config.models.dtype, device)
    name = config.run.run_name or f"seed{config.optimiser.seed}"
    return RunFolder(Path(config.run.output_dir) / config.loss.type / name)


def run_options(config: TrainConfig) -> dict[str, dict[str, object]]:
    """The options that define a run: all but where it is written, whether it is only planned and how it resumes."""
    values = asdict(config)
    for name in ("output_dir", "plan", "resume_weights"):
        values["run"].pop(name)
    return values


def start_run(
    run: RunFolder, config: TrainConfig, stages: Curriculum, student: PreTrainedModel, teacher: TeacherSource | None
) -> None:
    """Write what is decided before step 0: the options and the stages."""
    fingerprints = {"student": weights_fingerprint(student), "data": data_fingerprint(config)}
    if teacher:
        fingerprints["teacher"] = teacher.fingerprint
    if config.curriculum.difficulty_file:
        fingerprints["ranking"] = value_sha256(read_jsonl(Path(config.curriculum.difficulty_file)))
    run.check_fingerprints(fingerprints)
    distributed.barrier()  # all ranks have checked before rank 0 writes
    if distributed.is_main():
        has_cache = None if teacher is None else not teacher.online
        run.write_config(
            run_options(config), fingerprints, distributed.world_size(), has_cache=has_cache, cpu_matmul=cpu.in_use()
        )
        records = [asdict(stage) | {"pool": [stage.pool.start, stage.pool.stop]} for stage in stages]
        write_json(run.path / "stages.json", records)
    distributed.barrier()
    say(f"run folder {run.path}")


def report(run: RunFolder, position: Position) -> None:
    """Say how the run ended."""
    best = "" if position.best_rouge_l is None else f" (dev ROUGE-L {position.best_rouge_l:.2f})"
    path = run.first_ranking()
    if path and distributed.is_main():
        for line in write_diagnostics(run.path / "diagnostics.json", read_jsonl(path), run.read_metrics()):
            say(line)
    say(f"done after {position.step} optimiser steps; the best student{best} is in {run.best}")


if __name__ == "__main__":
    run_main(main)
    process.stop()
