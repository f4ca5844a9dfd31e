"""ROUGE-L, ROUGE-1, ROUGE-2 and exact match, each against the best of several references.

ROUGE compares the words that ``pocl.evaluation.words`` finds; only the longest common subsequence is computed by
rapidfuzz in C++. With rouge-score's own words the scores are its to the last bit (tests/evaluation/test_metrics.py).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from rapidfuzz.distance import LCSseq
from rouge_score import scoring

from pocl.evaluation.words import RougeTokenizer, words

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, references: Sequence[str], rouge_tokenizer: RougeTokenizer = "rouge") -> float:
    """F-measure of ROUGE-L with stemming, the best over the references.  -> [0, 1]."""
    predicted = words(prediction, rouge_tokenizer)
    return max(_f_measure(words(reference, rouge_tokenizer), predicted) for reference in references)


def _f_measure(target: tuple[str, ...], prediction: tuple[str, ...]) -> float:
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    return float(scoring.fmeasure(common / len(prediction), common / len(target)))


def rouge_n(prediction: str, references: Sequence[str], n: int, rouge_tokenizer: RougeTokenizer = "rouge") -> float:
    """F-measure of ROUGE-N with stemming, the best over the references.  -> [0, 1].  Source: Lin, 2004."""
    predicted = _ngrams(prediction, n, rouge_tokenizer)
    return max(_overlap(_ngrams(reference, n, rouge_tokenizer), predicted) for reference in references)


@lru_cache(maxsize=1 << 13)
def _ngrams(text: str, n: int, rouge_tokenizer: RougeTokenizer) -> Counter[tuple[str, ...]]:
    tokens = words(text, rouge_tokenizer)
    return Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))


def _overlap(target: Counter[tuple[str, ...]], prediction: Counter[tuple[str, ...]]) -> float:
    common = (target & prediction).total()
    return float(scoring.fmeasure(common / max(prediction.total(), 1), common / max(target.total(), 1)))


def exact_match(prediction: str, references: Sequence[str], rouge_tokenizer: RougeTokenizer = "rouge") -> bool:
    """Whether the answer equals a reference, up to case, punctuation and white space; it compares no words."""
    normalised = _normalise(prediction)
    return any(normalised == _normalise(reference) for reference in references)


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


@dataclass(frozen=True)
class Metric:
    """A score of one answer against its references, and its display name."""

    name: str
    score: Callable[..., float]  # of an answer, its references and ``rouge_tokenizer``: 0 to 1


# For every evaluated answer. The first two are the paper's; summaries are measured by ROUGE-1, -2 and -L.
METRICS: dict[str, Metric] = {
    "rouge_l": Metric("ROUGE-L", rouge_l),
    "exact_match": Metric("exact match", exact_match),
    "rouge_1": Metric("ROUGE-1", partial(rouge_n, n=1)),
    "rouge_2": Metric("ROUGE-2", partial(rouge_n, n=2)),
}
SHOWN = ("rouge_l", "exact_match")  # by default
