"""ROUGE-L and exact match, each against the best of several references.

ROUGE-L uses rouge-score's own tokeniser and stemmer; only the longest common subsequence is computed by rapidfuzz in
C++. The numbers are rouge-score's to the last bit (tests/test_metrics.py).
"""

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rouge_score import scoring, tokenize


class _CachedStemmer:
    """The Porter stemmer, which is a pure function of the word, computed once a word."""

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
    return scoring.fmeasure(common / len(prediction), common / len(target))


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the answer equals a reference, but for case, punctuation and white space."""
    normalised = _normalise(prediction)
    return any(normalised == _normalise(reference) for reference in references)


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()
