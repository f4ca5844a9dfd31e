"""The easiest and the hardest training examples, with what the student answered, to browse.

All of it stands in the page; the script of the page only hides, sorts and shortens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl.difficulty.ranking import COLUMNS
from tools.reporting.controls import PRINTED, ScoringSettings, checkbox, controls, search, select, text
from tools.reporting.data import Ranking, Texts
from tools.reporting.difficulty import QUARTERS
from tools.reporting.html import Html, Node, breakable, count, note, slug, tag


@dataclass(frozen=True)
class Column:
    """A column of numbers: the key of difficulty.jsonl, what stands above it, and how a value is written."""

    key: str
    head: str
    factor: float = 1.0
    form: str = ",.2f"
    ranked: bool = False  # its rank stands below, where several columns rank


def columns_of(ranking: Ranking) -> list[Column]:
    """What ranked, and the lengths."""
    several = len(ranking.columns) > 1
    found = [Column(key, COLUMNS[key].label, ranked=several) for key in ranking.columns]
    found = [Column(c.key, c.head, 100.0, ",.1f", c.ranked) if c.key == "rouge_l" else c for c in found]
    if not ranking.has_lengths:
        return found
    ranked = several and "response_tokens" in ranking.columns
    lengths = [
        Column("prompt_tokens", "prompt", form=",d"),
        Column("response_tokens", "response", form=",d", ranked=ranked),
    ]
    return [c for c in found if c.key != "response_tokens"] + lengths


def chosen_places(num_examples: int, samples: int) -> list[int]:
    """The places of the easiest and the hardest examples, each once, easiest first."""
    return sorted({*range(min(samples, num_examples)), *range(max(0, num_examples - samples), num_examples)})


def samples(ranking: Ranking, texts: Texts, limits: ScoringSettings, later: Sequence[Ranking], name: str) -> Html:
    """The table of examples with its filters; ``name`` makes the ids of its fields its own."""
    places = chosen_places(len(ranking.records), limits.samples)
    columns = columns_of(ranking)
    named = any(ranking.records[place].get("category") for place in places)
    head = [_head("place", "place", "n"), *(_head(column.key, column.head, "n") for column in columns)]
    head += [_head("category", "category", None)] if named else []
    head.append(tag("th", "example", scope="col", class_="unsorted"))
    body = []
    for place in places:
        record = ranking.records[place]
        cells = [_cell("place", "place", place + 1, count(place + 1)), *(_number(record, c) for c in columns)]
        if named:
            category = record.get("category") or "–"
            cells.append(_cell("category", "category", category, breakable(category), class_="category"))
        cells.append(tag("td", *_words(record, texts, limits, later), class_="texts"))
        facts = {"data_quarter": ranking.quarters[place], "data_category": record.get("category") or "–"}
        body.append(tag("tr", *cells, data_zero=record.get("rouge_l") == 0.0, **facts))
    made = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_="samples")
    return tag(
        "div",
        note(_how_many(len(places), len(ranking.records), limits.samples)),
        note(texts.problem) if texts.problem else None,
        _filters([ranking.records[place] for place in places], [ranking.quarters[place] for place in places], name),
        made,
        note(
            f"Print shows the first {PRINTED['samples']} of what is chosen, shortened as on the screen.",
            class_="on-paper",
        ),
        class_="browse",
        data_browse="samples",
    )


def _how_many(shown: int, total: int, each: int) -> str:
    which = f"All {count(total)} examples"
    if shown < total:
        which = f"The {count(each)} easiest and the {count(each)} hardest of {count(total)} examples"
    return f"{which}. Lengths are in tokens, cross-entropy in nats a token."


def _head(key: str, words: str, class_: str | None) -> Html:
    """A heading that the page's script makes a button; no line ends inside of ROUGE-L."""
    return tag("th", words.replace("E-L", "E\u2011L"), scope="col", data_key=slug(key), class_=class_)


def _cell(key: str, label: str, value: Any, *shown: Node, class_: str = "n") -> Html:
    known = "" if value is None else value
    return tag("td", *shown, class_=class_, data_key=slug(key), data_v=known, data_label=label)


def _number(record: Mapping[str, Any], column: Column) -> Html:
    value = record.get(column.key)
    if value is not None and column.form != ",d":
        value = column.factor * value
    rank = tag("small", f"rank {count(record[f'{column.key}_rank'])}") if column.ranked else None
    return _cell(column.key, column.head, value, "–" if value is None else format(value, column.form), rank)


def _words(
    record: Mapping[str, Any], texts: Texts, limits: ScoringSettings, later: Sequence[Ranking]
) -> list[Html | None]:
    """The question, the reference, the student's answer, and where later rankings put the example."""
    asked, reference = texts.by_id.get(record["id"], (None, None))
    head = tag("span", f"id {record['id']}", class_="id")
    places = [(r.place.removeprefix("difficulty-"), r.places[record["id"]]) for r in later if record["id"] in r.places]
    moved = ", ".join(f"{name}: place {count(place + 1)}" for name, place in places)
    return [
        tag("p", head, " ", None if asked is None else text(asked, limits), class_="asked"),
        None if reference is None else _said("reference", reference, limits),
        None if record.get("answer") is None else _said("student", record["answer"], limits),
        tag("p", f"ranked again: {moved}", class_="moved") if moved else None,
    ]


def _said(who: str, words: str, limits: ScoringSettings) -> Html:
    return tag("div", tag("b", who), tag("p", text(words, limits)), class_=f"said {who}")


def _filters(records: Sequence[Mapping[str, Any]], quarters: Sequence[int], name: str) -> Html:
    found = sorted({record.get("category") or "–" for record in records})
    fields = [search(f"{name}-search", "words in prompt, reference or answer")]
    options = {str(n): QUARTERS[n] for n in sorted(set(quarters))}
    fields.append(select("quarter", f"{name}-quarter", "quarter", {"": "all"} | options))
    if len(found) > 1:
        names = {"": "all"} | {category: category for category in found}
        fields.append(select("category", f"{name}-category", "category", names))
    if any(record.get("rouge_l") is not None for record in records):
        fields.append(checkbox("ROUGE-L is 0", f"{name}-zero", "zero"))
    return controls(fields, len(records))
