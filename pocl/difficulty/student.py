"""The student's scoring pass: it answers every prompt greedily and reads every reference.

ROUGE-L of the answers and mean cross-entropy per response token of the references are POCL's two measures of
difficulty.  Source: POCL, arXiv 2506.05695, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common.resumable_pass import ResumablePass
from pocl.data.blocks import blocks_to_read
from pocl.data.dataset import Split
from pocl.evaluation.likelihood import example_cross_entropy
from pocl.evaluation.metrics import rouge_l
from pocl.generation.decoding import Generator, decode
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import Backend, BackendSettings, open_generator
from pocl.models.student import Student


@dataclass(frozen=True)
class ScoringSettings:
    """How a pass over the training examples is made: what its result depends on, and how much is done at once."""

    max_new_tokens: int  # of an answer
    no_repeat_ngram: int  # size of n-grams that an answer may not repeat; 0: no ban
    batch_size: int  # prompts that are answered together
    chunk_tokens: int
    backend: Backend = "builtin"  # what generates
    model_path: str = ""  # where a backend other than the built-in loop finds the model

    def key(self) -> dict[str, int]:
        """What the result depends on."""
        return {"max_new_tokens": self.max_new_tokens, "no_repeat_ngram": self.no_repeat_ngram}


def score_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    limits: ScoringSettings,
    answers: bool = True,
    parts_dir: Path,
    key: Mapping[str, Any],
) -> dict[int, dict[str, Any]]:
    """Score every example of a split, over all ranks -> id -> record, on every rank.

    A record holds ``cross_entropy`` and, with ``answers``, ``rouge_l`` and the ``answer``. Each finished block is
    kept in ``parts_dir``, so an interrupted pass resumes there; ``key`` says what the scores depend on
    besides the limits (model, data).
    """
    was_training = model.training
    model.eval()
    backend = limits.backend if answers else "builtin"
    settings = BackendSettings(backend, split.max_length, limits.batch_size, model.device)
    with open_generator(Student(model, tokenizer, limits.model_path), settings) as generator:
        asked = generator if answers else None
        with ResumablePass(parts_dir, dict(key) | limits.key() | {"answers": asked and asked.name}) as parts:
            gathered = parts.fill(
                generator.blocks(split.prompt_lengths),
                split.ids,
                lambda block: score_block(model, tokenizer, split, block, limits, asked),
                title="scoring",
            )
    model.train(was_training)
    return gathered


@torch.no_grad()
def score_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    block: np.ndarray,
    limits: ScoringSettings,
    generator: Generator | None,
) -> list[dict[str, Any]]:
    """The records of one block of positions in the split; see ``score_examples``. No ``generator``: no answers."""
    rows = split.table[[int(i) for i in block]]
    losses = np.zeros(len(block))
    for part in blocks_to_read(split.lengths[block], model.device):
        batch = split.batch(block[part]).to(model.device)
        sums = example_cross_entropy(model, batch, chunk_tokens=limits.chunk_tokens, vocab_size=len(tokenizer))
        losses[part] = [total / count for total, count in sums]
    records: list[dict[str, Any]] = [
        {"id": example_id, "cross_entropy": loss} for example_id, loss in zip(rows["id"], losses.tolist(), strict=True)
    ]
    if generator:
        sampling = Sampling(limits.max_new_tokens, temperature=0.0, no_repeat_ngram=limits.no_repeat_ngram)
        tokens = generator(rows["prompt_ids"], rows["id"], sampling)
        for record, text, reference in zip(records, decode(tokenizer, tokens), rows["response"], strict=True):
            record |= {"rouge_l": rouge_l(text, [reference]), "answer": text}
    return records
