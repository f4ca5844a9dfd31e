"""The trainers that a curriculum is attached to, on a tiny pair, and what each optimiser step of theirs was.

    python tests/integrations/loops.py FOLDERS OUTPUT ACCUMULATION KIND...

FOLDERS is what ``tests.runs.make_folders`` made. One process of a group writes what all of them saw, as JSON.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments
from trl import DistillationConfig, SFTConfig, SFTTrainer
from trl import DistillationTrainer as OnPolicyTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

import pocl
from pocl.common import distributed
from pocl.data.dataset import Split
from pocl.models.loading import load_model, load_tokenizer
from tests.runs import MAX_LENGTH, Folders

GLOBAL_BATCH, STAGES, EPOCHS, SEED = 16, 2, 1, 10
STEPS = 1 + 3  # of pools of 24 and 48
COMMON: dict[str, Any] = {
    "num_train_epochs": 1,
    "logging_steps": 1,
    "report_to": "none",
    "weight_decay": 0.01,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ZERO = {f"zero{stage}": stage for stage in range(3)}  # of DeepSpeed
OURS = ("pocl", "dispatched", "checkpointed", *ZERO)


def deepspeed_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings, filled in from the trainer's."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {name: "auto" for name in names} | {"zero_optimization": {"stage": stage}}


OFF_POLICY = {"max_length": MAX_LENGTH, "lmbda": 0.0}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "pocl": (TrainingArguments, {}),
    "dispatched": (TrainingArguments, {"accelerator_config": {"dispatch_batches": True}}),
    "checkpointed": (TrainingArguments, {"gradient_checkpointing": True}),
    "plain": (TrainingArguments, {}),
    "sft": (SFTConfig, {"max_length": MAX_LENGTH, "completion_only_loss": True}),
    "gkd": (GKDConfig, OFF_POLICY),
    "gold": (GOLDConfig, OFF_POLICY),
    "on-policy": (DistillationConfig, {"max_completion_length": 4}),
    **{name: (TrainingArguments, {"deepspeed": deepspeed_config(stage)}) for name, stage in ZERO.items()},
}


@dataclass
class Seen:
    """What a trainer did, step by step."""

    logs: list[dict[str, float]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)  # sorted


def schedule(split: Split, *, tempered: bool = True, **settings: Any) -> pocl.Schedule:
    """Two stages with a fresh optimiser, not yet ranked."""
    temperature = (1, 2) if tempered else (1,)
    stages = pocl.baby_step(len(split), num_stages=STAGES, epochs=EPOCHS, temperature=temperature)
    rate = pocl.CosineRate(1e-3, 1e-7)
    chosen = {"global_batch_size": GLOBAL_BATCH, "seed": SEED, "rate": rate} | settings
    return pocl.Schedule(stages, np.arange(len(split)), **chosen)


def by_length(split: Split) -> pocl.Ranking:
    """A ranking that takes no model."""
    return pocl.rank(split, None, signals=["length"])


def load(folders: Folders) -> Split:
    """The training split."""
    return pocl.load_split(folders.data, "train", max_length=MAX_LENGTH)


def as_dataset(split: Split) -> datasets.Dataset:
    """The split as a plain data set of tokens, for TRL."""
    rows = [(row["prompt_ids"], row["response_ids"]) for row in split.table]
    columns = {
        "id": split.ids.tolist(),
        "input_ids": [(prompt + response)[:MAX_LENGTH] for prompt, response in rows],
        "completion_mask": [([0] * len(prompt) + [1] * len(response))[:MAX_LENGTH] for prompt, response in rows],
        "prompt": ["not read"] * len(rows),
    }
    return datasets.Dataset.from_dict(columns)


def arguments(kind: str, out: Path, *, accumulation: int = 1, **settings: Any) -> Any:
    """The trainer's configuration."""
    config, own = CONFIGS[kind]
    each = GLOBAL_BATCH // accumulation // distributed.world_size()
    sizes = {"per_device_train_batch_size": each, "gradient_accumulation_steps": accumulation}
    return config(output_dir=str(out / kind), **(COMMON | own | sizes | settings))


def bare(kind: str, folders: Folders, data: Any, args: Any, **others: Any) -> Trainer:
    """A trainer of transformers or TRL without a curriculum."""
    tokenizer = load_tokenizer(str(folders.student))
    tokenizer.pad_token = tokenizer.eos_token
    student = load_model(str(folders.student), "fp32", "auto")
    parts = {"model": student, "args": args, "train_dataset": data, "processing_class": tokenizer} | others
    if kind == "sft":
        return SFTTrainer(**parts)
    if kind == "plain":
        return Trainer(**parts)
    teacher = load_model(str(folders.teacher), "fp32", "auto")
    kinds = {"gkd": GKDTrainer, "gold": GOLDTrainer, "on-policy": OnPolicyTrainer}
    return kinds[kind](teacher_model=teacher, **parts)


def distilling(folders: Folders, split: Split, curriculum: pocl.Curriculum, args: Any, **others: Any) -> Trainer:
    """The project's own trainer, its teacher online unless one is given."""
    student = pocl.Student.load(str(folders.student))
    teacher = others.pop("teacher", None) or pocl.Teacher.open(str(folders.teacher))
    loss = others.pop("loss", pocl.DistillationLoss("tfkl"))
    return pocl.DistillationTrainer(student, teacher, curriculum, loss, args=args, train=split, **others)


def make(kind: str, folders: Folders, out: Path, ranking: Any, **settings: Any) -> Trainer:
    """A trainer of this kind with its curriculum."""
    split = load(folders)
    if kind in ZERO:  # or else it compiles an all-reduce of its own
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    curriculum, args = pocl.Curriculum(ranking, schedule(split)), arguments(kind, out, **settings)
    if kind in OURS:
        return distilling(folders, split, curriculum, args)
    trainer = bare(kind, folders, as_dataset(split), args)
    curriculum.attach(trainer)
    return trainer


def watch(trainer: Trainer, split: Split) -> Seen:
    """Train, and note what every step was; collective."""
    known = {tuple(tokens): i for i, tokens in zip(split.ids.tolist(), as_dataset(split)["input_ids"], strict=True)}
    by_step: dict[int, list[int]] = {}
    compute_loss = trainer.compute_loss

    def noting(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        by_step.setdefault(trainer.state.global_step, []).extend(_ids(inputs, known))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noting
    trainer.train()
    parts: list[Any] = [by_step]
    if distributed.world_size() > 1:
        parts = [None] * distributed.world_size()
        dist.all_gather_object(parts, by_step)
    ids = [sorted(i for part in parts for i in part[step]) for step in sorted(by_step)]
    return Seen([record for record in trainer.state.log_history if "loss" in record], ids)


def _ids(inputs: dict[str, torch.Tensor], known: dict[tuple[int, ...], int]) -> list[int]:
    if "example_ids" in inputs:
        return inputs["example_ids"].tolist()
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [known[tuple(row[mask.bool()].tolist())] for row, mask in pairs]


def run(kinds: Sequence[str], folders: Folders, out: Path, ranking: Any, accumulation: int) -> dict[str, Seen]:
    """Each kind of trainer, from its start to its end."""
    split = load(folders)
    return {kind: watch(make(kind, folders, out, ranking, accumulation=accumulation), split) for kind in kinds}


def ranked_by_student(folders: Folders) -> list[dict[str, Any]]:
    """What a student's ranking of a plain data set holds; collective."""
    rows = [{"id": f"row-{number}", "prompt": f"{number}: ", "completion": "x" * number} for number in range(1, 14)]
    settings = pocl.ScoringSettings(max_new_tokens=6)
    student = pocl.Student.load(str(folders.student))
    return pocl.rank(datasets.Dataset.from_list(rows), student, signals=["student"], settings=settings).records


def main() -> None:
    """Run the named trainers, and write what they saw."""
    root, output, accumulation, *kinds = sys.argv[1:]
    distributed.join()
    folders = Folders(*(Path(root) / name for name in ("student", "teacher", "processed", "data")))
    seen = run(kinds, folders, Path(output).parent, by_length(load(folders)), int(accumulation))
    ranked = ranked_by_student(folders)
    if distributed.is_main():
        found = {kind: asdict(value) for kind, value in seen.items()}
        Path(output).write_text(json.dumps({"seen": found, "ranked": ranked}))


if __name__ == "__main__":
    main()
