"""Graded instruction tasks, made on the fly: what is asked of a list of words, whose length is the grade.

The words mean nothing, so a student knows of a task only what it was shown. Some training answers have a wrong word,
some begin with another opening; held-out ones are clean.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Words = list[str]
Record = dict[str, str]

GRADES = (1, 2, 3, 4, 5, 6)  # words in the list
WRONG, OPEN = 0.08, 0.20  # of the training answers: with a wrong word; with another opening
OPENINGS = ("Sure: ", "The answer is: ", "Here you are: ")
_STARTS = ["b", "d", "g", "k", "l", "m", "n", "p", "r", "t"]
_ENDS = ["am", "en", "ip", "ug"]
VOCABULARY = tuple(start + end for start in _STARTS for end in _ENDS)
_NUMERALS = ["one", "two", "three", "four", "five", "six"]

KINDS: dict[str, tuple[str, Callable[[Words], Words]]] = {
    "repeat": ("Repeat", lambda words: list(words)),
    "reverse": ("Reverse", lambda words: words[::-1]),
    "sort": ("Sort", sorted),
    "double": ("Double", lambda words: [word for word in words for _ in range(2)]),
    "rotate": ("First to the end", lambda words: words[1:] + words[:1]),
    "swap": ("Swap pairs", lambda words: [word for i in range(0, len(words), 2) for word in words[i : i + 2][::-1]]),
    "number": ("Number", lambda words: [text for pair in zip(_NUMERALS, words, strict=False) for text in pair]),
    "join": ("Join", lambda words: " and ".join(words).split()),
}
ORDERING = ("reverse", "rotate", "swap")  # one skill: the same words in another order


@dataclass(frozen=True)
class Draw:
    """How many records of which kinds; ``noisy``: with wrong words and other openings."""

    count: int
    kinds: Sequence[str] = tuple(KINDS)
    noisy: bool = True


def make_records(draw: Draw, dice: random.Random, taken: set[str]) -> list[Record]:
    """Records whose instructions are none of ``taken``, which they join. ``category`` says kind and grade."""
    return [_record(draw, dice, taken) for _ in range(draw.count)]


def grades(categories: Collection[str]) -> list[int]:
    """The grade of each category, which ``make_records`` wrote."""
    return [int(category.split()[-1]) for category in categories]


def _record(draw: Draw, dice: random.Random, taken: set[str]) -> Record:
    while True:  # there are millions of lists; of one word there are few, which is why another grade may follow
        kind, grade = dice.choice(draw.kinds), dice.choice(GRADES)
        name, solve = KINDS[kind]
        words = dice.sample(VOCABULARY, grade)
        instruction = f"{name}: {' '.join(words)}"
        if instruction not in taken:
            break
    taken.add(instruction)
    answer = solve(words)
    if draw.noisy and dice.random() < WRONG:
        answer[dice.randrange(len(answer))] = dice.choice(VOCABULARY)
    opening = dice.choice(OPENINGS) if draw.noisy and dice.random() < OPEN else ""
    return {"instruction": instruction, "output": opening + " ".join(answer), "category": f"{kind} {grade}"}
