"""What is browsed: training examples by difficulty, and answers to evaluation prompts of several rows side by side.

All of it stands in the page; the page's script only hides, sorts and shortens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pocl.difficulty.ranking import column_named
from tools.reporting.data import Entry, Ranking, Record, Texts, read_set
from tools.reporting.panels import QUARTERS
from tools.show_answers import question

MOST_REFERENCES = 3


@dataclass(frozen=True)
class Shown:
    """How much a page shows, and of what."""

    samples: int  # of each end of a ranking
    answers: int  # prompts of each set
    characters: int  # of one text
    data_root: Path  # the evaluation sets
    published: str | None = None  # the paper's figures of this family
    baselines: Mapping[str, str] | None = None  # those of ``make_tables``


@dataclass(frozen=True)
class Card:
    """What somebody said; ``row`` is the number of the table's row, None for a reference."""

    who: str
    texts: Sequence[str]
    row: int | None = None
    score: str = ""
    exact: bool = False


@dataclass(frozen=True)
class Item:
    """One example. ``data`` is what filters and sorting see, ``values`` what stands beside it, name -> value."""

    name: str
    question: str | None
    cards: Sequence[Card]
    data: Mapping[str, object]
    values: Mapping[str, str] = field(default_factory=dict)
    below: str = ""


@dataclass(frozen=True)
class Browser:
    """Items with their fields: name -> (its words, value -> option); the first option is chosen."""

    key: str
    notes: Sequence[str]
    search: str
    fields: Mapping[str, tuple[str, Mapping[str, str]]]
    items: Sequence[Item]
    rows: Sequence[str] = ()


def samples(ranking: Ranking, texts: Texts, later: Sequence[Ranking], shown: Shown, key: str) -> Browser:
    """The easiest and the hardest training examples, with what the student answered."""
    places, total = ranking.chosen_places(shown.samples), len(ranking.records)
    which = f"All {total:,} examples"
    if len(places) < total:
        which = f"The {shown.samples:,} easiest and the {shown.samples:,} hardest of {total:,} examples"
    notes = [f"{which}. Lengths are in tokens, cross-entropy in nats a token.", *filter(None, [texts.problem])]
    items = [_sample(ranking, place, texts, later) for place in places]
    orders = {"": "place, easiest first", "-place": "place, hardest first"}
    for column, label in _columns(ranking).items():
        orders |= {f"+{column}": f"{label}, lowest first", f"-{column}": f"{label}, highest first"}
    quarters = {str(n): QUARTERS[n] for n in sorted({ranking.quarters[place] for place in places})}
    categories = sorted({str(item.data["category"]) for item in items})
    fields = {"order": ("order by", orders), "quarter": ("quarter", {"": "all"} | quarters)}
    if len(categories) > 1:
        orders["+category"] = "category"
        fields["category"] = ("category", {"": "all"} | {name: name for name in categories})
    if "rouge_l" in ranking.columns:
        fields["rouge_l"] = ("ROUGE-L", {"": "all", "0.0": "0 only"})
    return Browser(key, notes, "words in prompt, reference or answer", fields, items)


def _columns(ranking: Ranking) -> dict[str, str]:
    """What ranked, and the lengths: column -> its name."""
    names = {column: column_named(column).label for column in ranking.columns}
    lengths = {"prompt_tokens": "prompt length", "response_tokens": "response length"}
    return names | (lengths if ranking.has_lengths else {})


def _sample(ranking: Ranking, place: int, texts: Texts, later: Sequence[Ranking]) -> Item:
    record, values = ranking.records[place], {"place": f"{place + 1:,}"}
    asked, reference = texts.by_id.get(record["id"], (None, None))
    for column, label in _columns(ranking).items():
        value = record[column]
        shown = f"{value:,}" if column.endswith("tokens") else _two_digits(value, column)
        several = len(ranking.columns) > 1 and column in ranking.columns
        values[label] = shown + (f"\nrank {record[f'{column}_rank']:,}" if several else "")
    data = {"place": place + 1, "quarter": ranking.quarters[place], "category": record.get("category") or "–"}
    data |= {column: "" if record[column] is None else record[column] for column in _columns(ranking)}
    if record.get("category"):
        values["category"] = record["category"]
    said = {"reference": reference, "student": record.get("answer")}
    cards = [Card(who, [text]) for who, text in said.items() if text is not None]
    places = [(r.place.removeprefix("difficulty-"), r.places[record["id"]]) for r in later if record["id"] in r.places]
    moved = ", ".join(f"{name}: place {to + 1:,}" for name, to in places)
    return Item(f"id {record['id']}", asked, cards, data, values, f"ranked again: {moved}" if moved else "")


def _two_digits(value: float | None, column: str) -> str:
    return "–" if value is None else f"{value * (100 if column == 'rouge_l' else 1):,.2f}"


def answers(entries: Sequence[Entry], shown: Shown) -> Browser | None:
    """Prompts of every evaluation set with the reference and everybody's answers; None where nobody has answered."""
    entries = [entry for entry in entries if entry.summary]
    sets = list(dict.fromkeys(name for entry in entries for name in entry.summary))
    if not sets or not shown.answers:
        return None
    words, items = [], []
    for name in sets:
        said, prompts = _prompts(entries, name, shown)
        words.append(said)
        items += prompts
    notes = [f"{'; '.join(words)}. The number at an answer is its ROUGE-L, 0 to 100."]
    missing = list(dict.fromkeys(str(item.data["set"]) for item in items if item.question is None))
    if missing:
        said = f"Prompts of {', '.join(missing)} are not under {shown.data_root}"
        notes.append(f"{said}; --data-root says where they are.")
    rows, orders = [entry.name for entry in entries], {"": "as in the set"}
    for i, name in enumerate(rows):
        orders |= {f"-row{i}": f"{name}: highest first", f"+row{i}": f"{name}: lowest first"}
    fields: dict[str, tuple[str, Mapping[str, str]]] = {"order": ("order by ROUGE-L of", orders)}
    if len(rows) > 1:
        against = {f"row{i}": name for i, name in enumerate(rows)}
        fields["against"] = ("minus that of", {"": "nobody"} | against)
    if len(sets) > 1:
        fields["set"] = ("set", {"": "all"} | {name: name for name in sets})
    return Browser("answers", notes, "words in prompt or answer", fields, items, rows if len(rows) > 1 else ())


def _prompts(entries: Sequence[Entry], name: str, shown: Shown) -> tuple[str, list[Item]]:
    """(what was chosen, in words; prompts of a set spread over it that all rows with this set answered).

    The seed is the first that all rows with this set share, else each row's first.
    """
    seeds = [list(entry.summary[name]["rouge_l"]["seeds"]) if name in entry.summary else [] for entry in entries]
    known = [row for row in seeds if row]
    shared = [seed for seed in known[0] if all(seed in row for row in known)]
    chosen = [(shared or row)[0] if row else "" for row in seeds]
    found = [entry.answers(name, seed) if seed else {} for entry, seed in zip(entries, chosen, strict=True)]
    ids = sorted(set.intersection(*(set(records) for records in found if records)) if any(found) else ())
    stride, examples = max(1, -(-len(ids) // shown.answers)), read_set(shown.data_root, name)
    items = []
    for i in ids[::stride][: shown.answers]:
        said = {row: records[i] for row, records in enumerate(found) if i in records}
        cards = [_answer(row, entries[row].name, record) for row, record in said.items()]
        data = {"set": name} | {f"row{row}": record["rouge_l"] for row, record in said.items()}
        asked = None
        if example := examples.get(i):
            asked, references = question(example.prompt, "\n"), example.references
            who = "reference" if len(references) == 1 else f"{len(references)} references"
            cards.insert(0, Card(who, references[:MOST_REFERENCES]))
        items.append(Item(f"{name} {i}", asked, cards, data))
    seed = f"seed {shared[0]}" if shared else "each row’s first seed"
    return f"{name}: {len(items):,} of {len(ids):,} prompts, {seed}", items


def _answer(row: int, name: str, record: Record) -> Card:
    exact = bool(record.get("exact_match"))
    return Card(name, [record.get("answer", "")], row, f"{record['rouge_l']:.1f}", exact)
