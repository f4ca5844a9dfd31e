"""Answers to an evaluation set, scored and summarised over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocl.common.errors import UserError
from pocl.evaluation.metrics import METRICS
from pocl.evaluation.sets import Example
from pocl.evaluation.words import RougeTokenizer
from pocl.generation.decoding import Generator, answer_prompts
from pocl.generation.sampling import Sampling

Record = dict[str, Any]  # of one example: id, answer and every metric


def evaluate(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    *,
    sampling: Sampling,
    title: str,
    rouge_tokenizer: RougeTokenizer = "rouge",
) -> list[Record]:
    """Answer and score every example -> per-example records, on every rank."""
    ids = [example.id for example in examples]
    answers = answer_prompts(generator, tokenizer, prompts, ids, sampling=sampling, title=title)
    return score_answers(examples, [answers[i] for i in ids], rouge_tokenizer)


def score_answers(
    examples: Sequence[Example], answers: Sequence[str], rouge_tokenizer: RougeTokenizer = "rouge"
) -> list[Record]:
    """Every metric of each answer, 0 to 100.  Raises UserError if there are not as many answers as examples."""
    if len(examples) != len(answers):
        raise UserError(f"{len(answers)} answers for {len(examples)} prompts; give one answer per prompt, in order")
    return [
        {"id": example.id, "answer": answer}
        | {
            name: 100.0 * metric.score(answer, example.references, rouge_tokenizer=rouge_tokenizer)
            for name, metric in METRICS.items()
        }
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
