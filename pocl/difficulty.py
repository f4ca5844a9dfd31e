"""How hard each training example is for the student: the scoring pass, and the order that it gives.

The student answers every prompt greedily (ROUGE-L against the reference) and reads every reference (mean
cross-entropy per response token); ``pocl.ranking`` turns both into one order.
Source: POCL, arXiv 2506.05695, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.data import Split
from pocl.errors import UserError
from pocl.files import read_jsonl, write_jsonl
from pocl.generation import Generator, decode
from pocl.metrics import rouge_l
from pocl.objective import example_cross_entropy
from pocl.parts import Parts
from pocl.ranking import easy_to_hard, ordinal_ranks, reciprocal_rank_fusion
from pocl.sampling import Backend, Sampling
from pocl.vllm_backend import open_generator


@dataclass(frozen=True)
class Score:
    """What the scoring pass found for one example."""

    id: int
    rouge_l: float  # 0 to 1
    cross_entropy: float  # nats per response token
    answer: str


def score_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    backend: Backend,
    model_path: str,
    max_new_tokens: int,
    no_repeat_ngram: int,
    batch_size: int,
    chunk_tokens: int,
    parts_dir: Path,
    key: Mapping[str, Any],
) -> list[Score]:
    """Score every example of a split, over all ranks -> scores sorted by example id, on every rank.

    ``backend`` says what answers the prompts (``pocl.vllm_backend``); ``model``, which was loaded from ``model_path``,
    reads the references, ``batch_size`` at a time. Each finished block is kept in ``parts_dir``, so a pass that was
    cut off goes on where it was; ``key`` says what the scores depend on (model, data, limits).
    """
    sampling = Sampling(max_new_tokens, temperature=0.0, no_repeat_ngram=no_repeat_ngram)
    was_training = model.training
    model.eval()
    limits = {"max_length": split.max_length, "batch_size": batch_size}
    with (
        open_generator(backend, model, tokenizer, model_path=model_path, device=model.device, **limits) as generator,
        Parts(parts_dir, {**key, "generator": generator.name}) as parts,
    ):
        score = partial(
            _score_block,
            model,
            tokenizer,
            split,
            generator,
            sampling=sampling,
            batch_size=batch_size,
            chunk_tokens=chunk_tokens,
        )
        blocks = generator.blocks(split.prompt_lengths)
        parts.fill(blocks, split.ids, lambda block: map(asdict, score(block)), title="scoring")
        gathered = parts.gather()
    model.train(was_training)
    return [Score(**gathered[i]) for i in sorted(split.ids.tolist())]


@torch.no_grad()
def _score_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    generator: Generator,
    block: np.ndarray,
    *,
    sampling: Sampling,
    batch_size: int,
    chunk_tokens: int,
) -> list[Score]:
    rows = split.table[[int(i) for i in block]]
    answers = generator(rows["prompt_ids"], rows["id"], sampling)
    device = next(model.parameters()).device
    losses: list[tuple[float, int]] = []
    for start in range(0, len(block), batch_size):
        batch = split.batch(block[start : start + batch_size]).to(device)
        losses += example_cross_entropy(model, batch, chunk_tokens=chunk_tokens)
    return [
        Score(example_id, rouge_l(text, [reference]), total / count, text)
        for example_id, text, reference, (total, count) in zip(
            rows["id"], decode(tokenizer, answers), rows["response"], losses, strict=True
        )
    ]


def rank_examples(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The records of difficulty.jsonl, easiest first: what was measured, both ranks, the fused score, the answer."""
    ids = np.array([score.id for score in scores])
    rouge_ranks = ordinal_ranks(np.array([score.rouge_l for score in scores]), ids, highest_first=True)
    ce_ranks = ordinal_ranks(np.array([score.cross_entropy for score in scores]), ids, highest_first=False)
    fused = reciprocal_rank_fusion([rouge_ranks, ce_ranks])
    return [
        {
            "id": scores[i].id,
            "rouge_l": scores[i].rouge_l,
            "cross_entropy": scores[i].cross_entropy,
            "rouge_l_rank": int(rouge_ranks[i]),
            "cross_entropy_rank": int(ce_ranks[i]),
            "score": float(fused[i]),
            "answer": scores[i].answer,
        }
        for i in easy_to_hard(fused, ids).tolist()
    ]


def write_difficulty(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write difficulty.jsonl, easiest example first."""
    write_jsonl(path, records)


def read_order(path: Path, split: Split) -> np.ndarray:
    """Positions in ``split`` from the easiest to the hardest, as a difficulty.jsonl says.  -> [N], int64.

    Raises UserError where the file ranks other examples than the split holds.
    """
    records = read_jsonl(path)
    position_of = {int(example_id): position for position, example_id in enumerate(split.ids)}
    ids = [record.get("id") for record in records]
    if len(ids) != len(position_of) or set(ids) != set(position_of):
        raise UserError(
            f"{path} ranks {len(ids)} examples, the training split holds {len(position_of)} (or others); "
            f"score again without --difficulty-file"
        )
    return np.array([position_of[example_id] for example_id in ids], dtype=np.int64)
