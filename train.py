"""Train a student with POCL, or with one of its baselines: load, rank, schedule, fit.

    deepspeed train.py --model STUDENT --teacher TEACHER --data-dir processed_data/gpt2/dolly \\
        --output-dir results/gpt2/pocl --type tfkl

SFT, plain distillation and POCL are all this program: distillation is POCL with one stage, SFT has no teacher.
`python train.py --help` lists the flags; scripts/ holds the paper's settings.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from pocl.cli import build, cpu, process
from pocl.cli.checks import parse_train
from pocl.cli.options import TrainConfig
from pocl.cli.plan import show_plan
from pocl.cli.resolve import make_schedule, show_schedule, with_sizes
from pocl.common import distributed
from pocl.common.console import say
from pocl.common.files import read_jsonl, value_sha256
from pocl.data.dataset import Split
from pocl.data.micro_batches import check_shares
from pocl.difficulty.diagnostics import write_diagnostics
from pocl.difficulty.ranker import FIRST
from pocl.models.identity import check_tokenizer, vocabulary_size
from pocl.models.loading import load_tokenizer
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from pocl.training import hub
from pocl.training.deepspeed_config import check_precision
from pocl.training.model_card import has_scores, write_card
from pocl.training.position import Position
from pocl.training.run_folder import Origin, RunFolder
from pocl.training.trainer import Trainer, TrainingData, follow


def main() -> None:
    """Parse, open the run's folder, train."""
    process.quiet_libraries()
    config = parse_train()
    device = process.start()
    process.seed_everything(config.optimiser.seed)
    tokenizer = load_tokenizer(config.models.model)
    run = run_folder(config, device)
    config = with_sizes(config, vocabulary_size(tokenizer), device, begun=run.begun_with())
    # Before anything is loaded.
    run.check_options(run_options(config), distributed.world_size(), weights_only=config.run.resume_weights)
    check_tokenizer(Path(config.data.data_dir), tokenizer, config.models.model)
    if config.run.push_to_hub and distributed.is_main():
        hub.check_account(config.run.push_to_hub)
    if config.run.plan:
        show_plan(config, run, build.load_data(config)[0], device)
        return
    with run.locked():
        distil(config, run, device)


def distil(config: TrainConfig, run: RunFolder, device: torch.device) -> None:
    """The whole algorithm."""
    train, dev = build.load_data(config)
    schedule = make_schedule(config, len(train))
    show_schedule(schedule, config.loss.type)

    student = build.load_student(config, device)
    teacher = build.load_teacher(config, run, student, train)
    loss = build.make_loss(config, student)
    settings = build.make_settings(config, student, teacher)
    build.check_before_start(config, student, train)
    run.start(origin(config, student, teacher, train), schedule.stages)

    ranker = build.make_ranker(config, run, train, teacher)
    ranking = ranker.rank(FIRST, lambda: student) if ranker else None
    if ranking is not None:
        schedule = follow(schedule, ranking)
    build.prepare_student(config, student.model)
    data = TrainingData(train, build.make_dev_set(config, dev), ranker)
    trainer = Trainer(student, teacher, schedule, loss, data=data, run=run, settings=settings)
    report(run, trainer.fit(), trainer.selected)
    if distributed.is_main():
        publish(run, config.run.push_to_hub)


def run_folder(config: TrainConfig, device: torch.device) -> RunFolder:
    """The run's folder, after checking that this machine can do what the options ask for."""
    check_shares(config.optimiser.global_batch_size, distributed.world_size())
    check_precision(build.deepspeed_config_path(config), config.models.dtype, device)
    name = config.run.run_name or f"seed{config.optimiser.seed}"
    return RunFolder(Path(config.run.output_dir) / config.loss.type / name)


def run_options(config: TrainConfig) -> dict[str, dict[str, object]]:
    """The options that define a run: all but where it and its curves go, whether it is planned and how it resumes."""
    values = asdict(config)
    for name in ("output_dir", "plan", "resume_weights", "report_to", "push_to_hub"):
        values["run"].pop(name)
    return values


def origin(config: TrainConfig, student: Student, teacher: Teacher | None, train: Split) -> Origin:
    """What the run is made from: the options, and what stands behind their paths."""
    fingerprints = {"student": student.fingerprint(), "data": train.fingerprint}
    if teacher:
        fingerprints["teacher"] = teacher.fingerprint
    if config.curriculum.difficulty_file:
        fingerprints["ranking"] = value_sha256(read_jsonl(Path(config.curriculum.difficulty_file)))
    return Origin(
        run_options(config),
        fingerprints,
        has_cache=None if teacher is None else not teacher.online,
        cpu_matmul=cpu.in_use(),
    )


def report(run: RunFolder, position: Position, selected: str) -> None:
    """Say how the run ended."""
    best = "" if position.best_score is None else f" (dev {selected} {position.best_score:.2f})"
    path = run.first_ranking()
    if path and distributed.is_main():
        for line in write_diagnostics(run.path / "diagnostics.json", read_jsonl(path), run.read_metrics()):
            say(line)
    say(f"done after {position.step} optimiser steps; the best student{best} is in {run.best}")


def publish(run: RunFolder, hub_name: str | None) -> None:
    """Put the model card beside the best student, and both on the hub if that was asked for."""
    if run.best.is_dir() and not has_scores(run.best):  # a card with scores is newer than the run
        write_card(run)
    if hub_name:
        say(f"{run.best} is at {hub.push(run.best, hub_name)}")


if __name__ == "__main__":
    process.run_main(main)
    process.stop()
