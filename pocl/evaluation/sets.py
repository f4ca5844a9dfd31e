"""Evaluation sets, answers over seeds, per-example scores and their summary."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common import distributed
from pocl.common.errors import UserError, closest
from pocl.common.files import read_jsonl
from pocl.data.dataset import Split, make_prompt
from pocl.data.micro_batches import blocks_to_read
from pocl.evaluation.metrics import METRICS
from pocl.generation.decoding import Generator, answer_prompts
from pocl.generation.sampling import Sampling
from pocl.losses.chunked import example_cross_entropy

# The paper names its sets by folder; S-NI and UnNI keep the references of 11 tokens and more.
SET_FOLDERS = {"sinst": "sinst/11_", "uinst": "uinst/11_"}


@dataclass(frozen=True)
class Example:
    """One prompt with all of its references."""

    id: int  # number of its line in valid.jsonl, from 0
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class DevSet:
    """The dev split as evaluation sees it."""

    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    sampling: Sampling
    batch_size: int  # prompts that are answered together
    split: Split


def set_path(data_root: Path, name: str) -> Path:
    """The valid.jsonl of an evaluation set.  Raises UserError for an unknown set; it names the known ones."""
    path = data_root / SET_FOLDERS.get(name, name) / "valid.jsonl"
    if not path.is_file():
        known = [key for key in SET_FOLDERS if (data_root / SET_FOLDERS[key] / "valid.jsonl").is_file()]
        known += sorted(file.parent.name for file in data_root.glob("*/valid.jsonl"))
        raise UserError(
            f"no evaluation set {name!r}: {path} does not exist{closest(name, known)} "
            f"(known: {', '.join(known) or 'none'}; tools/fetch.py downloads the paper's)"
        )
    return path


def load_set(data_root: Path, name: str, num_examples: int | None = None) -> list[Example]:
    """The examples of data_root/name/valid.jsonl, in the order of the file.

    A record holds ``prompt`` or ``instruction`` and ``input``; ``output`` is one reference or a list of them.
    """
    path = set_path(data_root, name)
    examples = [_example(record, i, f"{path}:{i + 1}") for i, record in enumerate(read_jsonl(path))]
    return examples[:num_examples]


def _example(record: Mapping[str, Any], number: int, place: str) -> Example:
    references = record.get("output")
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise UserError(f"{place}: 'output' must be a reference answer or a list of them")
    prompt = record.get("prompt")
    if prompt is None:
        instruction, input_text = record.get("instruction"), record.get("input", "")
        if not isinstance(instruction, str) or not isinstance(input_text, str) or not instruction.strip():
            raise UserError(f"{place}: neither 'prompt' nor 'instruction' is a non-empty string")
        prompt = make_prompt(instruction, input_text)
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{place}: 'prompt' must be a non-empty string")
    try:
        "".join([prompt, *references]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: a lone surrogate, which is not valid text") from error
    return Example(number, prompt, tuple(references))


def tokenise_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_prompt_length: int
) -> tuple[list[list[int]], int]:
    """(token ids of each prompt, how many were left-truncated to the limit); the end holds the answer's mark."""
    prompts = [tokenizer.encode(example.prompt, add_special_tokens=False) for example in examples]
    return [prompt[-max_prompt_length:] for prompt in prompts], sum(len(p) > max_prompt_length for p in prompts)


def evaluate(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    *,
    sampling: Sampling,
    title: str,
) -> list[dict[str, Any]]:
    """Answer and score every example -> per-example records, on every rank."""
    ids = [example.id for example in examples]
    answers = answer_prompts(generator, tokenizer, prompts, ids, sampling=sampling, title=title)
    return score_answers(examples, [answers[i] for i in ids])


def score_answers(examples: Sequence[Example], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Every metric of each answer, 0 to 100.  Raises UserError if there are not as many answers as examples."""
    if len(examples) != len(answers):
        raise UserError(f"{len(answers)} answers for {len(examples)} prompts; give one answer per prompt, in order")
    return [
        {"id": example.id, "answer": answer}
        | {name: 100.0 * metric.score(answer, example.references) for name, metric in METRICS.items()}
        for example, answer in zip(examples, answers, strict=True)
    ]


def mean_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every metric, 0 to 100."""
    return {name: statistics.fmean(record[name] for record in records) for name in METRICS}


def summarise(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Mean and spread over seeds: {metric: {"mean", "std", "seeds"}}; std is the sample's, 0 for one seed."""
    summary: dict[str, Any] = {}
    for metric in METRICS:
        values = [scores[metric] for scores in by_seed.values()]
        summary[metric] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "seeds": {str(seed): scores[metric] for seed, scores in by_seed.items()},
        }
    return summary


def mean_cross_entropy(model: PreTrainedModel, split: Split, *, chunk_tokens: int, vocab_size: int) -> float:
    """Mean cross-entropy per response token of a split, in nats, over all ranks; see ``example_cross_entropy``."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for block in distributed.my_share(blocks_to_read(split.lengths, device)):
        batch = split.batch(block).to(device)
        for loss, tokens in example_cross_entropy(model, batch, chunk_tokens=chunk_tokens, vocab_size=vocab_size):
            total, count = total + loss, count + tokens
    model.train(was_training)
    total, tokens = distributed.sum_over_ranks([total, count], device)
    return total / tokens
