"""Write the sample instruction set, data/sample/raw.jsonl and data/sample/valid.jsonl.

The records are put together from the tables of tools/sample_tables.py by a seeded generator, so every run on every
machine writes the same bytes: one small function for each category, then the dealing into splits.

    python tools/make_sample_data.py [--output-dir data/sample] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.sample_tables import (
    CHECKS,
    CLUBS,
    COMMANDS,
    COUNT_WORDS,
    COUNTABLES,
    DAYS,
    DEFINITIONS,
    EXPLANATIONS,
    GOODS,
    GROUPS,
    INFORMAL,
    LADDERS,
    MANNERS,
    MEASURES,
    MERGES,
    MONTHS,
    ONE_STEP,
    OPEN_LISTS,
    OPENINGS,
    OPPOSITES,
    PEOPLE,
    PLURALS,
    REVIEWS,
    SCENES,
    SHOPS,
    SHOWS,
    SLOTS,
    SURNAMES,
    SYNONYMS,
    TOPICS,
    TWO_STEPS,
    UNITS,
    VERBS,
    WOMEN,
    words,
)

Item = TypeVar("Item")
Draft = tuple[str, str, str]  # instruction, input, output
Record = dict[str, str]

SEED = 20240

# Of every 16 records of a category, one goes to dev, one to test and 14 to training.
TRAIN_PER_DEV = 14
USUAL_DEV_COUNT = 3
DEV_COUNTS = {
    "extraction": 6, "rewriting": 5, "sentiment": 4, "ordering": 4,
    "arithmetic_one_step": 4, "arithmetic_two_steps": 4,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- chance and text


class Dice:
    """Seeded chance that uses only Random.random(), whose values are the same in every Python version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """Returns a whole number from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        """Returns one of the items."""
        return items[self.number(0, len(items) - 1)]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items in a random order."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.number(0, last)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """Returns count different items in a random order."""
        return self.shuffled(items)[:count]


def sentence(text: str) -> str:
    """Returns the text with a capital letter at the start and a full stop at the end."""
    return text[0].upper() + text[1:] + "."


def joined(items: Sequence[str], word: str = "and") -> str:
    """Returns the items as a list in running text: "a, b and c"."""
    return f"{', '.join(items[:-1])} {word} {items[-1]}"


def pronoun(name: str) -> str:
    """Returns "she" or "he", whichever goes with the name."""
    return "she" if name in WOMEN else "he"


# ----------------------------------------------------------------------------------------------- categories


def extraction(dice: Dice) -> Draft:
    """Returns a question whose answer is a phrase of the passage."""
    passage, questions = dice.pick(SCENES)
    slots = {}
    for key, values in SLOTS.items():
        slots[key], slots[key + "2"] = dice.some(values, 2)
    first_names, surnames = dice.some(PEOPLE, 2), dice.some(SURNAMES, 2)
    slots["name"], slots["name2"] = (f"{first} {last}" for first, last in zip(first_names, surnames, strict=True))
    slots["shop"] = dice.pick(list(SHOPS))
    slots["thing"] = dice.pick(SHOPS[slots["shop"]])
    question, answer = dice.pick(questions)
    frame = dice.pick(["{} Answer with words from the passage.", "Read the passage. {}", "Use the text to answer: {}"])
    return frame.format(question).format(**slots), passage.format(**slots), sentence(answer.format(**slots))


def sentiment(dice: Dice) -> Draft:
    """Returns a short review to be called positive or negative, often with the reason."""
    opening, aspects = dice.pick(REVIEWS)
    side = dice.number(1, 2)
    verdict = f"the review is {('positive', 'negative')[side - 1]}"
    remarks = " and ".join(f"{aspect[0]} {aspect[side]}" for aspect in dice.some(aspects, 2))
    instruction, answer = dice.pick([
        ("Is this review positive or negative?", verdict),
        ("Is this review positive or negative, and why?", f"{verdict} because {remarks}"),
        ("Say whether the review is positive or negative and give the reason.", f"{verdict} because {remarks}"),
        ("Did the writer like it? Decide between positive and negative and explain.", f"{verdict} because {remarks}"),
    ])  # fmt: skip
    return instruction, f"{opening} {sentence(remarks)}", sentence(answer)


def topic(dice: Dice) -> Draft:
    """Returns a sentence whose topic is one of three."""
    choices = dice.some(list(TOPICS), 3)
    right = dice.pick(choices)
    frame = dice.pick([
        "Is the sentence about {}?", "Choose the topic of the sentence: {}.", "Which topic fits it best: {}?",
    ])  # fmt: skip
    return frame.format(joined(choices, "or")), dice.pick(TOPICS[right]), f"The sentence is about {right}."


def rewrite_verb(dice: Dice) -> Draft:
    """Returns a sentence to be put into another tense or form."""
    base, present, past, participle, thing = dice.pick(VERBS)
    name, manner = dice.pick(PEOPLE), dice.pick(MANNERS)
    now, before = f"{name} {present} {thing} {manner}.", f"{name} {past} {thing} {manner}."
    return dice.pick([
        ("Put the sentence into the past tense.", now, before),
        ("Rewrite the sentence so that it tells about the past.", now, before),
        ("Put the sentence into the future tense with 'will'.", now, f"{name} will {base} {thing} {manner}."),
        ("Change the sentence into the passive voice.", f"{name} {past} {thing}.",
         sentence(f"{thing} was {participle} by {name}")),
        ("Rewrite the sentence in the active voice.", sentence(f"{thing} was {participle} by {name}"),
         f"{name} {past} {thing}."),
        ("Make the sentence negative.", now, f"{name} does not {base} {thing} {manner}."),
        ("Turn the statement into a question.", before, f"Did {name} {base} {thing} {manner}?"),
    ])  # fmt: skip


def rewriting(dice: Dice) -> Draft:
    """Returns a sentence to be rewritten in tense, voice, number or tone."""
    kind = dice.number(1, 9)
    if kind == 1:
        frames = ["Make this request more polite.", "Say this in a polite way, as a question."]
        command = dice.pick(COMMANDS)
        return dice.pick(frames), sentence(command), f"Could you please {command}?"
    if kind == 2:
        frames = ["Rewrite the sentence in formal English.", "Make the sentence sound more formal."]
        casual, formal = dice.pick(INFORMAL)
        return dice.pick(frames), casual, formal
    if kind <= 4:
        one, many, sings, sing, where = dice.pick(PLURALS)
        single, plural = f"The {one} {sings} {where}.", f"The {many} {sing} {where}."
        return dice.pick([
            (f"Rewrite the sentence with '{one}' in the plural.", single, plural),
            ("Put the subject of the sentence into the plural.", single, plural),
        ])  # fmt: skip
    return rewrite_verb(dice)


def calculation(dice: Dice, operations: list[str]) -> tuple[list[int], list[int]]:
    """Returns numbers, and the results as the operations are applied in turn, all whole and from 2 to 150."""
    while True:
        high = 12 if "times" in operations else 60
        numbers = [dice.number(2, high)] + [dice.number(2, 9 if "divided" in op else high) for op in operations]
        results = [numbers[0]]
        for operation, number in zip(operations, numbers[1:], strict=True):
            done = results[-1]
            steps = {"plus": done + number, "minus": done - number, "times": done * number}
            results.append(steps[operation] if operation in steps else done // number if done % number == 0 else 0)
        if all(2 <= result <= 150 for result in results[1:]):
            return numbers, results


def word_problem(dice: Dice, table: list[list[str]]) -> Draft:
    """Returns a word problem from the table, its answer with every step of the calculation."""
    story, question, operations, answer = dice.pick(table)
    numbers, results = calculation(dice, words(operations))
    slots = dict(zip("abc", numbers, strict=False), d=results[-1])
    slots |= {"name": dice.pick(PEOPLE), "things": dice.pick(COUNTABLES)}
    steps = [
        f"{before} {operation} {number} is {after}"
        for before, operation, number, after in zip(results, words(operations), numbers[1:], results[1:], strict=False)
    ]
    text = f"{', and '.join(steps)}, so {answer}.".format(**slots)
    story, question = story.format(**slots), question.format(**slots)
    return dice.pick([
        (question, story, text), ("Solve the problem step by step.", f"{story} {question}", text),
        ("Work out the answer.", f"{story} {question}", text),
    ])  # fmt: skip


def arithmetic_one_step(dice: Dice) -> Draft:
    """Returns a word problem with one operation."""
    return word_problem(dice, ONE_STEP)


def arithmetic_two_steps(dice: Dice) -> Draft:
    """Returns a word problem with two operations."""
    return word_problem(dice, TWO_STEPS)


def listing(dice: Dice) -> Draft:
    """Returns a request for the members of a list that fit a condition."""
    kind = dice.number(1, 4)
    if kind == 1:
        theme, answer = dice.pick(OPEN_LISTS)
        return dice.pick(["Name three {}.", "Give three examples of {}."]).format(theme), "", answer
    group, other = dice.some(list(GROUPS), 2)
    wanted, rest = dice.some(GROUPS[group], 3), dice.some(GROUPS[other], 3)
    label = group
    if kind == 2:
        everything = sorted(word for members in GROUPS.values() for word in members)
        letter = dice.pick("bcdghprst")
        wanted = dice.some([word for word in everything if word[0] == letter], dice.number(2, 3))
        rest = dice.some([word for word in everything if word[0] != letter], 3)
        label = f"words that begin with {letter}"
    mixed = dice.shuffled(wanted + rest)
    found = [word for word in mixed if word in wanted]
    frame = dice.pick(["List only the {}.", "Pick out the {} from this list.", "Which of these are {}?"])
    return frame.format(label), ", ".join(mixed), f"The {label} are {joined(found)}."


def definition(dice: Dice) -> Draft:
    """Returns an everyday word to be explained in one sentence."""
    thing, meaning = dice.pick(DEFINITIONS)
    frame = dice.pick([
        "What is {}? Answer in one sentence.", "Explain in one short sentence what {} is.",
        "In a few words, what is {}?", "Give a short definition of {}.",
    ])  # fmt: skip
    return frame.format(thing), "", sentence(f"{thing} is {meaning}")


def ordering(dice: Dice) -> Draft:
    """Returns a list of numbers, times, words or things to be put in order."""
    kind = dice.number(1, 5)
    count = dice.number(3, 5)
    if kind <= 2:
        numbers = dice.some(range(2, 100), count)
        way = ("in order from smallest to largest", "in order from largest to smallest")[kind - 1]
        given, ordered = [[str(n) for n in row] for row in (numbers, sorted(numbers, reverse=kind == 2))]
        what = "numbers"
    elif kind == 3:
        times = [(hour, 5 * dice.number(2, 11)) for hour in dice.some(range(1, 12), count)]
        given, ordered = [[f"{hour}:{minute}" for hour, minute in row] for row in (times, sorted(times))]
        what, way = "times", "in order from earliest to latest"
    elif kind == 4:
        given = dice.some(GROUPS[dice.pick(list(GROUPS))], count)
        ordered, what, way = sorted(given), "words", "in alphabetical order"
    else:
        ladder = [thing.split()[-1] for thing in LADDERS["bigger"]]
        given = dice.some(ladder, count)
        ordered, what, way = sorted(given, key=ladder.index), "animals", "in order from smallest to biggest"
    frame = dice.pick(["Put the {} {}.", "Arrange these {} {}.", "Write the {} {}."])
    return frame.format(what, way), ", ".join(given), f"The right order is {joined(ordered)}."


def explanation(dice: Dice) -> Draft:
    """Returns a why-question with a one-sentence answer."""
    question, answer = dice.pick(EXPLANATIONS)
    frame = dice.pick(["Why {}? Answer in one sentence.", "Explain briefly: why {}?", "Give a short reason. Why {}?"])
    return frame.format(question), "", answer


def comparison(dice: Dice) -> Draft:
    """Returns a question which of two things or people has more of something."""
    if dice.number(1, 2) == 1:
        more, ladder = dice.pick(list(LADDERS.items()))
        pair = dice.some(ladder, 2)
        less_of, more_of = sorted(pair, key=ladder.index)
        frame = dice.pick(["Say which one is {}: {} or {}.", "Compare the two. Which is {}, {} or {}?"])
        return frame.format(more, *pair), "", sentence(f"{more_of} is {more} than {less_of}")
    more, story, question, unit, low, high = dice.pick(MEASURES)
    (a, b), (x, y) = dice.some(PEOPLE, 2), dice.some(range(int(low), int(high), 2), 2)
    ahead, behind = (a, b) if x > y else (b, a)
    answer = f"{ahead} {question.split()[1]} {more} than {behind} by {abs(x - y)} {unit}."
    return question, story.format(a=a, b=b, x=x, y=y), answer


def odd_one_out(dice: Dice) -> Draft:
    """Returns four words, one of which does not belong with the others."""
    group, other = dice.some(list(GROUPS), 2)
    stranger = dice.pick(GROUPS[other])
    mixed = dice.shuffled([*dice.some(GROUPS[group], 3), stranger])
    frame = dice.pick([
        "Which word is the odd one out, and why?", "Find the word that does not fit and give the reason.",
        "One word does not belong with the others. Which one, and why?",
    ])  # fmt: skip
    return frame, ", ".join(mixed), f"The odd one out is {stranger}, because the others are {group}."


def sequence(dice: Dice) -> Draft:
    """Returns the start of a sequence to be continued, with the rule as the reason."""
    kind = dice.pick(["letter", "day", "more", "less", "twice"])
    step, start, what = dice.number(2, 9), dice.number(1, 17), "number"
    if kind in ("letter", "day"):
        names = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ") if kind == "letter" else DAYS * 4
        terms, what, rule = names[start : start + 9 : 2], kind, f"each step skips one {kind}"
    elif kind == "twice":
        terms, rule = [str(step * 2**place) for place in range(5)], "each number is twice the one before"
    else:
        terms = [str(start + step * place) for place in range(5)]
        terms = terms if kind == "more" else terms[::-1]
        rule = f"each number is {step} {kind} than the one before"
    frame = dice.pick(["What comes next in the sequence, and why?", "Continue the sequence and give the rule."])
    return frame, ", ".join(terms[:4]), f"The next {what} is {terms[4]}, because {rule}."


def opposite(dice: Dice) -> Draft:
    """Returns a sentence in which one word is to be replaced by its opposite or its synonym."""
    opposites = dice.number(1, 3) > 1
    old, new, nouns = dice.pick(OPPOSITES if opposites else SYNONYMS)
    if opposites and dice.number(1, 2) == 1:
        old, new = new, old
    start = f"{dice.pick(OPENINGS)} {dice.pick(words(nouns))} was"
    frames = ["Replace the word '{}' with its opposite.", "Rewrite the sentence with the opposite of '{}'."]
    if not opposites:
        frames = ["Replace the word '{}' with a word that means the same.", "Use a synonym of '{}' instead."]
    return dice.pick(frames).format(old), f"{start} {old}.", f"{start} {new}."


def calendar_and_units(dice: Dice) -> Draft:
    """Returns a question about units of measurement, days, months or clock times."""
    kind = dice.number(1, 4)
    if kind == 1:
        small, large, factor = dice.pick(UNITS)
        count = dice.number(2, 9)
        frame = dice.pick(["How many {} are there in {} {}?", "Work out how many {} there are in {} {}."])
        return frame.format(small, count, large), "", f"There are {count * int(factor)} {small} in {count} {large}."
    sign, side = dice.pick([(1, "after"), (-1, "before")])
    if kind == 2:
        count, day = dice.number(2, 5), dice.number(0, 6)
        when = f"{COUNT_WORDS[count]} days {side} {DAYS[day]}"
        frame = dice.pick(["Which day of the week is {}?", "What day comes {}?"])
        return frame.format(when), "", f"The day {when} is {DAYS[(day + sign * count) % 7]}."
    if kind == 3:
        month = dice.number(0, 11)
        frame = dice.pick(["Which month comes right {} {}?", "Name the month that comes right {} {}."])
        answer = f"The month right {side} {MONTHS[month]} is {MONTHS[(month + sign) % 12]}."
        return frame.format(side, MONTHS[month]), "", answer
    show, hour, minute, hours = dice.pick(SHOWS), dice.number(1, 9), 5 * dice.number(2, 11), dice.number(2, 3)
    text = f"The {show} starts at {hour}:{minute} and lasts {COUNT_WORDS[hours]} hours."
    return f"When does the {show} end?", text, f"The {show} ends at {hour + hours}:{minute}."


def yes_or_no(dice: Dice) -> Draft:
    """Returns a question to be answered with yes or no and the reason."""
    frame = dice.pick(["{} Answer yes or no with a reason.", "{} Say yes or no and explain why."])
    a, b = dice.some(range(6, 40), 2)
    if dice.number(1, 5) == 1:
        reason = f"dividing {a} by 2 leaves one over" if a % 2 else f"{a} is 2 times {a // 2}"
        answer = f"{'No' if a % 2 else 'Yes'}, because {reason}."
        return frame.format(f"Is {a} an even number?"), "", answer
    story, question, yes, no = dice.pick(CHECKS)
    name, other = dice.some(PEOPLE, 2)
    slots = {"a": a, "b": b, "name": name, "other": other, "club": dice.pick(CLUBS), "show": dice.pick(SHOWS[:3]),
             "things": dice.pick(COUNTABLES)}  # fmt: skip
    answer = f"Yes, because {yes}." if a > b else f"No, because {no}."
    return frame.format(question).format(**slots), story.format(**slots), answer.format(**slots)


def merging(dice: Dice) -> Draft:
    """Returns two sentences to be joined or summed up in one."""
    kind, name = dice.number(1, 5), dice.pick(PEOPLE)
    who = pronoun(name)
    if kind <= 3:
        link = ("so", "because", "but")[kind - 1]
        first, second = dice.pick(MERGES["but" if link == "but" else "so"])
        answer = f"{name} {first}, {link} {who} {second}."
        if link == "because":
            answer = f"{name} {second} because {who} {first}."
        return f"Join the two sentences into one with '{link}'.", f"{name} {first}. {who.title()} {second}.", answer
    frame = dice.pick(["Sum up the two sentences in one.", "Combine the two sentences into one short sentence."])
    if kind == 4:
        goods = dice.some(GOODS, dice.number(3, 4))
        text = f"{name} bought {joined(goods[:-1])}. {who.title()} also bought {goods[-1]}."
        return frame, text, f"{name} bought {joined(goods)}."
    event, place, day = (dice.pick(SLOTS[key]) for key in ("event", "venue", "day"))
    return frame, f"The {event} was held on {day}. It took place {place}.", f"The {event} was held {place} on {day}."


CATEGORIES: dict[str, Callable[[Dice], Draft]] = {
    "extraction": extraction,
    "sentiment": sentiment,
    "topic": topic,
    "rewriting": rewriting,
    "arithmetic_one_step": arithmetic_one_step,
    "arithmetic_two_steps": arithmetic_two_steps,
    "listing": listing,
    "definition": definition,
    "ordering": ordering,
    "explanation": explanation,
    "comparison": comparison,
    "odd_one_out": odd_one_out,
    "sequence": sequence,
    "opposite": opposite,
    "calendar_and_units": calendar_and_units,
    "yes_or_no": yes_or_no,
    "merging": merging,
}


# --------------------------------------------------------------------------------------- dealing and writing


def word_bag(text: str) -> str:
    """Returns the words of the text in alphabetical order, without capitals and punctuation."""
    return " ".join(sorted(word.strip(".,:?'").lower() for word in text.split()))


def draw_records(category: str, count: int, dice: Dice) -> list[Record]:
    """Returns count records of the category; neither a text to work on nor an answer of six words or more comes twice.

    Texts made of the same words in another order count as the same.
    """
    used: set[str] = set()
    records: list[Record] = []
    while len(records) < count:
        instruction, text, output = CATEGORIES[category](dice)
        marks = {word_bag(text or instruction)} | ({word_bag(output)} if len(output.split()) >= 6 else set())
        if used.isdisjoint(marks):
            used |= marks
            records.append({"instruction": instruction, "input": text, "output": output, "category": category})
    return records


def make_splits() -> dict[str, list[Record]]:
    """Returns the splits "dev", "test" and "train", each shuffled."""
    splits: dict[str, list[Record]] = {"dev": [], "test": [], "train": []}
    for place, category in enumerate(CATEGORIES, start=1):
        dev = DEV_COUNTS.get(category, USUAL_DEV_COUNT)
        records = draw_records(category, dev * (TRAIN_PER_DEV + 2), Dice(SEED + place))
        splits["dev"] += records[:dev]
        splits["test"] += records[dev : 2 * dev]
        splits["train"] += records[2 * dev :]
    dice = Dice(SEED)
    return {name: dice.shuffled(records) for name, records in splits.items()}


def file_contents() -> dict[str, bytes]:
    """Returns the bytes of each file by its name; raw.jsonl begins with the dev split."""
    splits = make_splits()
    files = {"raw.jsonl": splits["dev"] + splits["train"], "valid.jsonl": splits["test"]}
    return {
        name: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")
        for name, records in files.items()
    }


def write_file(path: Path, content: bytes) -> None:
    """Writes the file under a temporary name and then renames it, so that no half-written file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the files; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the sample instruction set.")
    parser.add_argument("--output-dir", type=Path, default=Path("data/sample"), help="folder of the two files")
    parser.add_argument("--check", action="store_true", help="only compare the files with what would be written")
    options = parser.parse_args(arguments)
    contents = file_contents()
    if options.check:
        paths = [options.output_dir / name for name in contents]
        wrong = [str(path) for path in paths if not path.is_file() or path.read_bytes() != contents[path.name]]
        if wrong:
            print(f"not what make_sample_data.py writes: {', '.join(wrong)}", file=sys.stderr)
        return 1 if wrong else 0
    for name, content in contents.items():
        write_file(options.output_dir / name, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
