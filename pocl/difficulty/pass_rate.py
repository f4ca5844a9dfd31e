"""The pass rate: how often the student's sampled answers are right.

It ranks (the more often, the easier), and it weighs: PACED (arXiv 2603.11178) trains most on what the student can
sometimes do, with the weight p(1 - p) of an example. What passes here is exact match, up to case, punctuation and
white space; where no sample does, p is their mean ROUGE-L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl.common.errors import UserError
from pocl.difficulty.measuring import Column, Request, Values

if TYPE_CHECKING:
    from pocl.data.dataset import Split
    from pocl.difficulty.measuring import ScoringSettings
    from pocl.generation.decoding import Generator
    from pocl.models.student import Student

COLUMNS = {"pass_rate": Column("pass rate", "0 to 1", "student", highest_is_easiest=True)}
SIGNALS = {"pass-rate": ("pass_rate",)}


def measure(request: Request, columns: Sequence[str]) -> Values:
    """The ``pass_rate`` of every example over ``settings.samples`` answers at temperature 1.

    Collective: the ranks share the work, and each gets all of it.
    """
    from pocl.evaluation.words import check_readable
    from pocl.generation.vllm_backend import BackendSettings, open_generator

    student, train, settings = request.student, request.train, request.settings
    if student is None:
        raise UserError("`signals` pass-rate is the student's; give `student`")
    check_readable(train.column("response"), settings.rouge_tokenizer, "the training examples")
    was_training = student.model.training
    student.model.train(False)
    backend = settings.backend if student.path else "builtin"
    how = BackendSettings(backend, train.max_length, settings.batch_size, student.device)
    with open_generator(student, how) as generator:
        key = settings.key() | {"dtype": str(student.model.dtype), "pass_rate_of": settings.samples}
        key |= {"answers": generator.name}
        # In a folder of its own: that of the student's other pass may lie beside it.
        place = None if request.folder is None else request.folder / "student"
        own = replace(request, folder=place)
        with own.resumable("student", student=student.fingerprint(), **key) as sampling:
            found = sampling.fill(
                generator.blocks(train.prompt_lengths),
                train.ids,
                lambda block: sample_block(student, train, block, settings, generator),
                title="sampling",
            )
    student.model.train(was_training)
    return found


def sample_block(
    student: Student, train: Split, block: np.ndarray, settings: ScoringSettings, generator: Generator
) -> list[dict[str, Any]]:
    """The records of one block of positions in the split."""
    from pocl.evaluation.metrics import exact_match, rouge_l
    from pocl.generation.decoding import decode
    from pocl.generation.sampling import Sampling

    rows = train.table[[int(i) for i in block]]
    passes, overlaps = np.zeros(len(block)), np.zeros(len(block))
    for seed in range(1, settings.samples + 1):
        how = Sampling(settings.max_new_tokens, no_repeat_ngram=settings.no_repeat_ngram, seed=seed)
        texts = decode(student.tokenizer, generator(rows["prompt_ids"], rows["id"], how))
        for i, (text, reference) in enumerate(zip(texts, rows["response"], strict=True)):
            passes[i] += exact_match(text, [reference])
            overlaps[i] += rouge_l(text, [reference], settings.rouge_tokenizer)
    rates = np.where(passes > 0, passes, overlaps) / settings.samples
    return [{"id": int(i), "pass_rate": rate} for i, rate in zip(rows["id"], rates.tolist(), strict=True)]


def paced_weights(pass_rates: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """p(1 - p) over its mean over the ``trained`` positions: the weights of examples, 1 on average.  [N] -> [N].

    Raises UserError if every one of those always passes or never does.
    """
    weights = pass_rates * (1.0 - pass_rates)
    if not weights[trained].any():
        raise UserError("`weighting` paced: every example passes always or never, so all weights are 0; drop it")
    normalised: np.ndarray = weights / weights[trained].mean()
    return normalised
