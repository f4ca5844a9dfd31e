"""The time and memory of a step of pocl.DistillationTrainer, its teacher cached or online, and of TRL's GKDTrainer.

    python -m tools.benchmarking.trainers --records data/dolly/raw.jsonl --tokenizer GPT2_FOLDER

All three train the same student on the same global batches of the same texts, in three processes that take turns.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import pocl
from pocl.data.dataset import Split
from pocl.models.loading import fuse_activations, load_tokenizer
from pocl.training.log import peak_memory_gb
from tools.benchmarking.pairs import PAIRS, build_model

VARIANTS = ("cached", "online", "gkd")
GLOBAL_BATCH, MICRO_BATCH, MAX_LENGTH, CPU = 16, 4, 512, torch.device("cpu")


class Turns(TrainerCallback):
    """Waits for its turn, a line on stdin, before every ``steps`` steps; tells their seconds behind the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started = steps, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            sys.stdin.readline()
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            print(f"turn {time.perf_counter() - self.started} {peak_memory_gb(CPU)}", flush=True)


def examples(options: argparse.Namespace, tokenizer: Any) -> Split:
    """As many as all steps need, drawn at random among those that fit the window whole."""
    split = pocl.encode(pocl.load_records(options.records), tokenizer, template="alpaca", max_length=MAX_LENGTH)
    totals = split.prompt_lengths + np.asarray(split.table["num_response_tokens"])
    fitting = np.flatnonzero(totals <= MAX_LENGTH)
    count = GLOBAL_BATCH * options.steps * options.turns
    return Split(split.table.select(np.random.default_rng(0).choice(fitting, count, replace=False)), MAX_LENGTH)


def make(options: argparse.Namespace, out: Path) -> Trainer:
    """The trainer of a variant."""
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    split = examples(options, tokenizer)
    student, teacher = (build_model(config, dtype="fp32", device=CPU) for config in PAIRS[options.pair]())
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH,
        "num_train_epochs": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 10**6,
    }
    stages = pocl.baby_step(len(split), num_stages=1, epochs=1, temperature=(1.5,), kd_ratio=(0.8,))
    schedule = pocl.Schedule(stages, np.arange(len(split)), global_batch_size=GLOBAL_BATCH)
    curriculum = pocl.Curriculum(pocl.rank(split, None, signals=["length"]), schedule)
    if options.variant == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        args = GKDConfig(max_length=MAX_LENGTH, lmbda=0.0, train_sampling_strategy="sequential", **settings)
        data = curriculum.select(as_dataset(split))
        return GKDTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer
        )
    for model in (student, teacher):
        fuse_activations(model)  # as loading them does
    reads = pocl.Teacher.of(teacher, CPU)
    if options.variant == "cached":
        reads = reads.cached(split, out / "cache")
    loss = pocl.DistillationLoss("tfkl")
    args = TrainingArguments(**settings)
    return pocl.DistillationTrainer(pocl.Student(student, tokenizer), reads, curriculum, loss, args=args, train=split)


def as_dataset(split: Split) -> datasets.Dataset:
    """The split's tokens as GKDTrainer's collator reads them."""
    rows = [(row["prompt_ids"], row["response_ids"]) for row in split.table]
    columns = {"id": split.ids.tolist(), "input_ids": [prompt + response for prompt, response in rows]}
    columns["completion_mask"] = [[0] * len(prompt) + [1] * len(response) for prompt, response in rows]
    return datasets.Dataset.from_dict(columns | {"prompt": [""] * len(rows)})


def train(options: argparse.Namespace) -> None:
    """One variant, in turns."""
    with tempfile.TemporaryDirectory() as out:
        trainer = make(options, Path(out))
        trainer.add_callback(Turns(options.steps))
        trainer.train()


def compare(options: argparse.Namespace) -> None:
    """All variants by turns; the first turn of each warms up and does not count."""
    command = [sys.executable, "-m", "tools.benchmarking.trainers", *sys.argv[1:], "--variant"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    running = {name: subprocess.Popen([*command, name], **pipes) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks = dict.fromkeys(VARIANTS, 0.0)
    for turn in range(options.turns):
        for name, process in running.items():
            process.stdin.write("go\n")
            line = next(line for line in process.stdout if line.startswith("turn "))
            took, peaks[name] = map(float, line.split()[1:])
            if turn:
                seconds[name].append(took)
    split = examples(options, load_tokenizer(options.tokenizer))
    counted = options.steps * (options.turns - 1) * GLOBAL_BATCH
    tokens = split.lengths.mean() * counted
    for name in VARIANTS:
        running[name].wait()
        total, factor = sum(seconds[name]), sum(seconds["gkd"]) / sum(seconds[name])
        print(
            f"{name:8} {counted / total:6.2f} samples/s {tokens / total:7.0f} tokens/s  {factor:.2f}x  "
            f"peak {peaks[name]:.2f} GB  (turns: {', '.join(f'{value:.1f}' for value in seconds[name])} s)"
        )


def main() -> None:
    """Compare, or be one of those that are compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True, help="instruction records, such as Dolly's raw.jsonl")
    parser.add_argument("--tokenizer", required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--pair", default="small", choices=sorted(PAIRS), help="the models' shapes")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each; the first does not count")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    (train if options.variant else compare)(options)


if __name__ == "__main__":
    main()
