"""What references cost, one example at a time."""

from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM

from tests.runs import Folders


def reference_losses(folders: Folders, model: Path) -> dict[int, float]:
    """Mean cross-entropy of every reference, one example at a time."""
    student, losses = AutoModelForCausalLM.from_pretrained(model).double(), {}
    for row in datasets.load_from_disk(str(folders.data / "train")):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        first = len(row["prompt_ids"])
        with torch.no_grad():
            logp = student(ids).logits[0, first - 1 : -1].log_softmax(-1)
        losses[row["id"]] = -float(logp.gather(-1, ids[0, first:, None]).mean())
    return losses
