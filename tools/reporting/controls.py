"""What the parts of a report that are browsed share: how much is shown, the fields of a filter, texts (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.reporting.html import Html, count, cut, tag

PRINTED = {"samples": 30, "answers": 20}  # as the style sheet has them


@dataclass(frozen=True)
class ScoringSettings:
    """How much is shown."""

    samples: int  # of each end of a ranking
    answers: int  # prompts of each set
    characters: int  # of one text


def controls(fields: Sequence[Html], total: int) -> Html:
    """The fields of a filter, and how many are shown; without the page's script they are not there."""
    shown = tag("output", f"{count(total)} shown", class_="shown", aria_live="polite")
    return tag("form", *fields, shown, class_="controls with-js", autocomplete="off")


def search(id_: str, words: str) -> Html:
    """A field for words that must be in what is shown."""
    box = tag("input", type="search", id=id_, data_filter="search", placeholder=words)
    return tag("label", tag("span", "search"), box, for_=id_)


def checkbox(words: str, id_: str, filter_: str, **more: object) -> Html:
    """A labelled box to tick."""
    box = tag("input", type="checkbox", id=id_, data_filter=filter_, **more)
    return tag("label", box, tag("span", words), for_=id_, class_="tick")


def select(words: str, id_: str, filter_: str, options: Mapping[str, str]) -> Html:
    """A labelled choice; the first option is chosen."""
    made = [tag("option", text, value=value) for value, text in options.items()]
    return tag("label", tag("span", words), tag("select", *made, id=id_, data_filter=filter_), for_=id_)


def text(words: str, limits: ScoringSettings) -> Html:
    """A text as it is, cut where it is very long; an empty one is named."""
    return cut(words, limits.characters) if words.strip() else tag("i", "(nothing)")
