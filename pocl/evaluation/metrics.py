"""ROUGE-L, ROUGE-1, ROUGE-2 and exact match, each against the best of several references.

ROUGE uses rouge-score's own tokeniser and stemmer; only the longest common subsequence is computed by rapidfuzz in
C++. The scores are rouge-score's to the last bit (tests/evaluation/test_metrics.py).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rouge_score import scoring, tokenize


class _CachedStemmer:
    """The Porter stemmer, which is a pure function of the word, computed once per word."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=1 << 18)(PorterStemmer().stem)


_STEMMER = _CachedStemmer()
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 14)
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(tokenize.tokenize(text, _STEMMER))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE-L with stemming, the best over the references.  -> [0, 1]."""
    predicted = _tokens(prediction)
    return max(_f_measure(_tokens(reference), predicted) for reference in references)


def _f_measure(target: tuple[str, ...], prediction: tuple[str, ...]) -> float:
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    return float(scoring.fmeasure(common / len(prediction), common / len(target)))


def rouge_n(prediction: str, references: Sequence[str], n: int) -> float:
    """F-measure of ROUGE-N with stemming, the best over the references.  -> [0, 1].  Source: Lin, 2004."""
    predicted = _ngrams(prediction, n)
    return max(_overlap(_ngrams(reference, n), predicted) for reference in references)


@lru_cache(maxsize=1 << 13)
def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    tokens = _tokens(text)
    return Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))


def _overlap(target: Counter[tuple[str, ...]], prediction: Counter[tuple[str, ...]]) -> float:
    common = (target & prediction).total()
    return float(scoring.fmeasure(common / max(prediction.total(), 1), common / max(target.total(), 1)))


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the answer equals a reference, up to case, punctuation and white space."""
    normalised = _normalise(prediction)
    return any(normalised == _normalise(reference) for reference in references)


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


@dataclass(frozen=True)
class Metric:
    """A score of one answer against its references, and its display name."""

    name: str
    score: Callable[[str, Sequence[str]], float]  # 0 to 1


# For every evaluated answer. The first two are the paper's; summaries are measured by ROUGE-1, -2 and -L.
METRICS: dict[str, Metric] = {
    "rouge_l": Metric("ROUGE-L", rouge_l),
    "exact_match": Metric("exact match", exact_match),
    "rouge_1": Metric("ROUGE-1", partial(rouge_n, n=1)),
    "rouge_2": Metric("ROUGE-2", partial(rouge_n, n=2)),
}
SHOWN = ("rouge_l", "exact_match")  # by default
