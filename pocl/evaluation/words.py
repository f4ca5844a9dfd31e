"""The words of a text that ROUGE compares: rouge-score's own, which are of a to z and 0 to 9, or Unicode's."""

import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize

from pocl.common.errors import UserError

RougeTokenizer = Literal["rouge", "unicode"]
MOST_UNREADABLE = 0.1  # of the references; of the paper's five sets at most 0.012 are
_LONGEST_UNSTEMMED = 3  # letters, as in rouge-score

# Unicode's default word boundaries (UAX 29): between any two characters of Chinese, Japanese, Thai, Lao, Khmer and
# Myanmar; a character keeps its marks, an emoji its modifiers.
_BOUNDARY = regex.compile(r"(?V1w)\b")
_IN_A_WORD = regex.compile(r"[^\p{P}\p{Z}\p{C}\s]")
_READ_BY_ROUGE = regex.compile(r"[a-z0-9]")


class _CachedStemmer:
    """The Porter stemmer, which is a pure function of the word, computed once per word."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=1 << 18)(PorterStemmer().stem)


_STEMMER = _CachedStemmer()


def _rouge_words(text: str) -> list[str]:
    return list(tokenize.tokenize(text, _STEMMER))


def _unicode_words(text: str) -> list[str]:
    """Words by Unicode's rules, of English ones the stem; the signs of a text that has no word."""
    pieces = _BOUNDARY.split(unicodedata.normalize("NFC", text).casefold())
    found = [piece for piece in pieces if _IN_A_WORD.search(piece)] or [piece for piece in pieces if piece.strip()]
    return [_STEMMER.stem(word) if word.isascii() and len(word) > _LONGEST_UNSTEMMED else word for word in found]


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"rouge": _rouge_words, "unicode": _unicode_words}


@lru_cache(maxsize=1 << 14)
def words(text: str, rouge_tokenizer: RougeTokenizer = "rouge") -> tuple[str, ...]:
    """The words of a text by one of ``TOKENIZERS``."""
    return tuple(TOKENIZERS[rouge_tokenizer](text))


def check_readable(references: Iterable[str], rouge_tokenizer: RougeTokenizer, what: str) -> None:
    """Raise UserError where ROUGE's own words are not those of more than ``MOST_UNREADABLE`` of the references.

    ``what`` says whose references they are. Unicode's words are those of any text.
    """
    if rouge_tokenizer != "rouge":
        return
    unread = [_is_unreadable(reference) for reference in references]
    if sum(unread) > MOST_UNREADABLE * len(unread):
        raise UserError(
            f"{sum(unread)} of {len(unread)} references of {what} are written in letters that ROUGE's own tokenizer "
            f"does not see (it reads a to z and 0 to 9), so ROUGE-L would say nothing; give `rouge_tokenizer` unicode"
        )


def _is_unreadable(text: str) -> bool:
    """Whether ROUGE's own tokenizer sees nothing in most words of a text."""
    if not text.strip():
        return False
    found = _unicode_words(text)
    return 2 * sum(not _READ_BY_ROUGE.search(word) for word in found) > len(found)
