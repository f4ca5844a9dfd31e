"""Evaluation prompts that stand in the training data, and the scores without them."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pocl.data.dataset import load_split, read_manifest
from pocl.evaluation.answers import Record, mean_scores
from pocl.evaluation.sets import Example


def trained_prompts(data_dir: Path) -> set[str]:
    """The prompts of a processed folder's training split."""
    room = read_manifest(data_dir)["max_prompt_length"] + 1  # for the longest prompt and a token
    return set(load_split(data_dir, "train", max_length=room).column("prompt"))


def without_known(
    examples: Sequence[Example], answered: Iterable[Sequence[Record]], known: Collection[str]
) -> dict[str, Any]:
    """The ids of the examples with a known prompt, and the mean scores of all answers but theirs (None: none left)."""
    ids = {example.id for example in examples if example.prompt in known}
    fresh = [record for records in answered for record in records if record["id"] not in ids]
    return {"ids": sorted(ids), "without": mean_scores(fresh) if fresh else None}
