"""The dev evaluation of a student in training."""

import time

from pocl.evaluation.answers import evaluate, mean_scores
from pocl.evaluation.likelihood import mean_cross_entropy
from pocl.evaluation.sets import DevSet
from pocl.generation.decoding import BuiltIn
from pocl.models.student import Student


def dev_loss(student: Student, dev: DevSet, chunk_tokens: int) -> float:
    """Mean cross-entropy of the dev references [nats per response token], over all ranks."""
    return mean_cross_entropy(student, dev.split, chunk_tokens=chunk_tokens)


def evaluate_dev(student: Student, dev: DevSet, chunk_tokens: int, *, where: str) -> dict[str, float]:
    """The scores of the student on dev, over all ranks, as metrics.jsonl names them; ``where`` is said with them."""
    started = time.perf_counter()
    loss = dev_loss(student, dev, chunk_tokens)
    records = evaluate(
        BuiltIn(student, dev.batch_size),
        student.tokenizer,
        dev.examples,
        dev.prompts,
        sampling=dev.sampling,
        title=f"dev after {where}",
        rouge_tokenizer=dev.rouge_tokenizer,
    )
    scores = mean_scores(records)
    return {
        f"dev_{dev.select_by}": scores[dev.select_by],
        "dev_rouge_l": scores["rouge_l"],
        "dev_exact_match": scores["exact_match"],
        "dev_cross_entropy": loss,
        "dev_seconds": time.perf_counter() - started,
    }
