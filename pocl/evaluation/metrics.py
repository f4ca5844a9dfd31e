"""ROUGE-L, ROUGE-1, ROUGE-2, exact match, chrF and token F1, each against the best of several references.

ROUGE compares the words that ``pocl.evaluation.words`` finds; only the longest common subsequence is computed by
rapidfuzz in C++. With rouge-score's own words the scores are its to the last bit (tests/evaluation/test_metrics.py).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module

from rapidfuzz.distance import LCSseq
from rouge_score import scoring

from pocl.common.errors import UserError, closest, first_line
from pocl.evaluation.words import RougeTokenizer, words

_ARTICLES = {"a", "an", "the"}
_CHRF_ORDER, _CHRF_BETA = 6, 2
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


def token_f1(prediction: str, references: Sequence[str], rouge_tokenizer: RougeTokenizer = "rouge") -> float:
    """F-measure of the words that answer and reference share, without articles, the best over the references.

    Words are what white space separates, as in SQuAD; with Unicode's words those of ``words``.  -> [0, 1].
    Source: Rajpurkar et al., 2016.
    """
    predicted = _bag(prediction, rouge_tokenizer)
    bags = (_bag(reference, rouge_tokenizer) for reference in references)
    return max(_overlap(bag, predicted) if bag and predicted else float(bag == predicted) for bag in bags)


def _bag(text: str, rouge_tokenizer: RougeTokenizer) -> Counter[tuple[str, ...]]:
    if rouge_tokenizer == "unicode":
        return _ngrams(text, 1, rouge_tokenizer)
    return Counter((word,) for word in _normalise(text).split() if word not in _ARTICLES)


def chrf(prediction: str, references: Sequence[str], rouge_tokenizer: RougeTokenizer = "rouge") -> float:
    """chrF2: F-measure of character n-grams of 1 to 6, recall twice as heavy, the best over the references.

    White space counts for nothing; texts of any language, since it compares no words.  -> [0, 1].
    Source: Popovic, 2015; orders that a text is too short for are left out, as in sacreBLEU.
    """
    predicted = _characters(prediction)
    return max(_chrf_of(_characters(reference), predicted) for reference in references)


def _chrf_of(target: tuple[Counter[str], ...], prediction: tuple[Counter[str], ...]) -> float:
    orders = [(one, other) for one, other in zip(target, prediction, strict=True) if one and other]
    if not orders:
        return 0.0
    common = [(one & other).total() for one, other in orders]
    precision = sum(n / other.total() for n, (_, other) in zip(common, orders, strict=True)) / len(orders)
    recall = sum(n / one.total() for n, (one, _) in zip(common, orders, strict=True)) / len(orders)
    weight = _CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall) if precision + recall else 0.0


@lru_cache(maxsize=1 << 12)
def _characters(text: str) -> tuple[Counter[str], ...]:
    solid = "".join(text.split())
    return tuple(Counter(solid[i : i + n] for i in range(len(solid) - n + 1)) for n in range(1, _CHRF_ORDER + 1))


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


@dataclass(frozen=True)
class Metric:
    """A score of one answer against its references, and its display name."""

    name: str
    score: Callable[..., float]  # of an answer, its references and ``rouge_tokenizer``: 0 to 1


# For every evaluated answer. The first two are the paper's; summaries are measured by ROUGE-1, -2 and -L. One more is
# one more line here, or ``register``.
METRICS: dict[str, Metric] = {
    "rouge_l": Metric("ROUGE-L", rouge_l),
    "exact_match": Metric("exact match", exact_match),
    "rouge_1": Metric("ROUGE-1", partial(rouge_n, n=1)),
    "rouge_2": Metric("ROUGE-2", partial(rouge_n, n=2)),
    "chrf": Metric("chrF", chrf),
    "token_f1": Metric("token F1", token_f1),
}
SHOWN = ("rouge_l", "exact_match")  # by default


def register(name: str, score: Callable[[str, Sequence[str]], float], label: str | None = None) -> None:
    """Add a metric of one's own to ``METRICS``: ``score`` of an answer and its references, 0 to 1."""

    def scored(prediction: str, references: Sequence[str], rouge_tokenizer: RougeTokenizer = "rouge") -> float:
        return score(prediction, references)

    METRICS[name] = Metric(label or name, scored)


def metric_named(name: str) -> str:
    """The key in ``METRICS`` of this name, or of MODULE:FUNCTION, which is registered by the function's name.

    Raises UserError where there is neither.
    """
    module, mark, function = name.partition(":")
    if mark:
        try:
            register(function, getattr(import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise UserError(f"no metric {name}: {first_line(error)}; MODULE is one that Python finds here") from error
        return function
    if name not in METRICS:
        raise UserError(f"no metric {name!r}{closest(name, METRICS)} (known: {', '.join(METRICS)}, MODULE:FUNCTION)")
    return name
