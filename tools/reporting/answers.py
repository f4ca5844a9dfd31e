"""Answers to evaluation prompts of several rows side by side, to browse.

All of it stands in the page; the script of the page only hides, sorts and shortens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl.evaluation.sets import Example
from tools.reporting.controls import PRINTED, ScoringSettings, checkbox, controls, search, select, text
from tools.reporting.data import Entry, read_set
from tools.reporting.html import Html, count, note, number, tag
from tools.show_answers import question

MOST_REFERENCES = 3


@dataclass(frozen=True)
class Asked:
    """One prompt of a set with everybody's answers, in the order of the rows; None where a row has none."""

    set: str
    id: int
    example: Example | None
    answers: Sequence[Mapping[str, Any] | None]


def spread_prompts(entries: Sequence[Entry], name: str, most: int, data_root: Path) -> tuple[str, list[Asked], int]:
    """(the seed, prompts of a set spread over it, how many there are that all rows answered).

    The seed is the first that all rows with this set share, else each row's first.
    """
    seeds = [list(entry.summary[name]["rouge_l"]["seeds"]) if name in entry.summary else [] for entry in entries]
    known = [row for row in seeds if row]
    shared = [seed for seed in known[0] if all(seed in row for row in known)]
    chosen = [shared[0] if shared else row[0] if row else "" for row in seeds]
    found = [entry.answers(name, seed) if seed else {} for entry, seed in zip(entries, chosen, strict=True)]
    ids = sorted(set.intersection(*(set(records) for records in found if records)) if any(found) else ())
    stride = max(1, -(-len(ids) // most))
    examples = read_set(data_root, name)
    asked = [Asked(name, i, examples.get(i), [records.get(i) for records in found]) for i in ids[::stride][:most]]
    return f"seed {shared[0]}" if shared else "each row’s first seed", asked, len(ids)


def answers(entries: Sequence[Entry], limits: ScoringSettings, data_root: Path) -> Html:
    """Prompts of every evaluation set with the reference and the answers of all rows beside each other."""
    answering = [entry for entry in entries if entry.summary]
    sets = list(dict.fromkeys(name for entry in answering for name in entry.summary))
    if not sets or not limits.answers:
        return note("No evaluation has left answers here; evaluate.py writes them.")
    blocks, words, missing = [], [], []
    for name in sets:
        seed, asked, total = spread_prompts(answering, name, limits.answers, data_root)
        words.append(f"{name}: {count(len(asked))} of {count(total)} prompts, {seed}")
        blocks += [_question(one, answering, limits) for one in asked]
        missing += [name] if any(one.example is None for one in asked) else []
    problem = f"Prompts of {', '.join(missing)} are not under {data_root}; --data-root says where they are."
    return tag(
        "div",
        note("; ".join(words), ". The number at an answer is its ROUGE-L, 0 to 100."),
        note(problem) if missing else None,
        controls(_fields(answering, sets), len(blocks)),
        tag("div", *blocks, class_="questions"),
        note(
            f"Print shows the first {PRINTED['answers']} of what is chosen, shortened as on the screen.",
            class_="on-paper",
        ),
        class_="browse",
        data_browse="answers",
    )


def _fields(entries: Sequence[Entry], sets: Sequence[str]) -> list[Html]:
    fields = [search("answers-search", "words in prompt or answer")]
    if len(sets) > 1:
        fields.append(select("set", "answers-set", "set", {"": "all"} | {name: name for name in sets}))
    names = {str(i): entry.name for i, entry in enumerate(entries)}
    orders = {"": "as in the set"}
    for i, name in names.items():
        orders |= {f"+{i}": f"{name}: highest first", f"-{i}": f"{name}: lowest first"}
    fields.append(select("order by ROUGE-L of", "answers-order", "order", orders))
    if len(entries) > 1:
        fields.append(select("minus that of", "answers-against", "against", {"": "nobody"} | names))
        boxes = [checkbox(name, f"answers-row-{i}", "row", value=i, checked=True) for i, name in names.items()]
        fields.append(tag("fieldset", tag("legend", "rows"), *boxes))
    return fields


def _question(asked: Asked, entries: Sequence[Entry], limits: ScoringSettings) -> Html:
    example, head = asked.example, tag("span", f"{asked.set} {asked.id}", class_="id")
    words = text(question(example.prompt, "\n"), limits) if example else None
    cards = [_references(example, limits)] if example else []
    for i, (entry, record) in enumerate(zip(entries, asked.answers, strict=True)):
        if record is not None:
            cards.append(_answer(i, entry.name, record, limits))
    scores = ["–" if record is None else number(record["rouge_l"], 5) for record in asked.answers]
    return tag(
        "article",
        tag("div", tag("p", head, " ", words, class_="asked"), class_="prompt"),
        tag("div", *cards, class_="cards"),
        class_="question",
        data_set=asked.set,
        data_scores=" ".join(scores),
    )


def _references(example: Example, limits: ScoringSettings) -> Html:
    shown = [tag("p", text(words, limits)) for words in example.references[:MOST_REFERENCES]]
    more = len(example.references) - MOST_REFERENCES
    rest = tag("p", f"and {more} more", class_="cut") if more > 0 else None
    title = "reference" if len(example.references) == 1 else f"{len(example.references)} references"
    return tag("div", tag("p", tag("b", title), class_="who"), *shown, rest, class_="card reference")


def _answer(i: int, name: str, record: Mapping[str, Any], limits: ScoringSettings) -> Html:
    exact = tag("small", "exact match") if record.get("exact_match") else None
    head = tag("p", tag("b", name), exact, tag("span", f"{record['rouge_l']:.1f}", class_="score"), class_="who")
    return tag("div", head, tag("p", text(record.get("answer", ""), limits)), class_="card", data_row=i)
