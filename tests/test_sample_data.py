"""Facts about the sample instruction set, and answers worked out again without the generator's help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "make_sample_data.py"
DATA = ROOT / "data" / "sample"
KEYS = ["instruction", "input", "output", "category"]
DEV_COUNT = 60

Record = dict[str, str]


def read_records(path: Path) -> list[Record]:
    """Returns the records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Returns the finished run of the script."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


RAW = read_records(DATA / "raw.jsonl")
SPLITS = {"dev": RAW[:DEV_COUNT], "train": RAW[DEV_COUNT:], "test": read_records(DATA / "valid.jsonl")}
RECORDS = [record for records in SPLITS.values() for record in records]


def of_category(*names: str) -> list[Record]:
    """Returns the records of the categories, which must be there."""
    found = [record for record in RECORDS if record["category"] in names]
    assert found
    return found


def numbers_in(text: str) -> list[int]:
    """Returns the whole numbers of the text in their order."""
    return [int(digits) for digits in re.findall(r"\d+", text)]


def listed(text: str) -> list[str]:
    """Returns the items of "a, b and c"."""
    return re.split(r", | and ", text)


def test_a_new_run_writes_the_same_bytes(tmp_path: Path) -> None:
    assert run_script("--output-dir", str(tmp_path)).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.jsonl", "valid.jsonl"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes()


def test_check_accepts_the_shipped_files() -> None:
    assert run_script("--check", "--output-dir", str(DATA)).returncode == 0


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_check_refuses_other_files_with_one_line(tmp_path: Path, damage: str) -> None:
    assert run_script("--output-dir", str(tmp_path)).returncode == 0
    path = tmp_path / "valid.jsonl"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    result = run_script("--check", "--output-dir", str(tmp_path))
    assert result.returncode == 1
    assert "valid.jsonl" in result.stderr and "raw.jsonl" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_every_record_has_the_four_keys_in_order() -> None:
    assert all(list(record) == KEYS for record in RECORDS)


def test_the_splits_have_the_promised_sizes() -> None:
    assert {name: len(records) for name, records in SPLITS.items()} == {"dev": 60, "train": 840, "test": 60}


def test_every_split_holds_every_category_in_proportion() -> None:
    counts = {name: Counter(record["category"] for record in records) for name, records in SPLITS.items()}
    assert len(counts["train"]) >= 12
    assert counts["dev"] == counts["test"]
    assert counts["train"] == {category: 14 * count for category, count in counts["dev"].items()}


def test_the_splits_share_no_prompt() -> None:
    prompts = Counter((record["instruction"], record["input"]) for record in RECORDS)
    assert max(prompts.values()) == 1


def test_no_input_is_used_twice() -> None:
    inputs = Counter(record["input"] for record in RECORDS if record["input"])
    assert max(inputs.values()) == 1


def test_knowledge_questions_are_at_most_a_fifth() -> None:
    knowledge = of_category("definition", "explanation")
    assert len(knowledge) <= len(RECORDS) / 5


def test_no_field_but_the_input_is_empty_and_none_has_stray_space() -> None:
    for record in RECORDS:
        assert record["instruction"] and record["output"] and record["category"]
        assert all(value == " ".join(value.split()) for value in record.values())


def test_no_slot_is_left_unfilled() -> None:
    assert not any(set("{}|\\") & set("".join(record.values())) for record in RECORDS)


def test_outputs_are_short_sentences_that_end_well() -> None:
    for record in RECORDS:
        output = record["output"]
        assert re.fullmatch(r"[A-Z0-9].*[a-zA-Z0-9][.?]", output), record
        assert output.endswith("?") <= (record["category"] == "rewriting"), record
        assert 1 <= len(output.split()) <= 30, record


def test_prompts_have_at_most_sixty_words() -> None:
    assert all(len((record["instruction"] + " " + record["input"]).split()) <= 60 for record in RECORDS)


def test_a_and_an_stand_before_the_right_sounds() -> None:
    for record in RECORDS:
        text = " ".join(record.values())
        assert not re.search(r"\ba [aeio]", text, re.IGNORECASE), record
        assert not re.search(r"\ban (?!hour)[^aeiou]", text, re.IGNORECASE), record


def test_every_step_of_every_calculation_is_right() -> None:
    work = {
        "plus": lambda a, b: a + b, "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b, "divided by": lambda a, b: a / b,
    }  # fmt: skip
    step = re.compile(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)")
    for record in of_category("arithmetic_one_step", "arithmetic_two_steps"):
        steps = step.findall(record["output"])
        assert len(steps) == (1 if record["category"] == "arithmetic_one_step" else 2), record
        for a, name, b, result in steps:
            assert work[name](int(a), int(b)) == int(result), record
        operands = [int(steps[0][0])] + [int(b) for _, _, b, _ in steps]
        asked = numbers_in(record["input"])
        assert sorted(operands) == sorted(asked), record
        assert all(later[0] == earlier[3] for earlier, later in pairwise(steps)), record
        assert numbers_in(record["output"].split("so ")[1]) == [int(steps[-1][3])], record


def test_the_operation_fits_the_story_of_one_step_problems() -> None:
    signs = {
        "more": "plus", "in the afternoon": "plus", "gave away": "minus", "get off": "minus",
        "in each box": "times", "costs": "times", "shared equally": "divided by", "equal rows": "divided by",
    }  # fmt: skip
    for record in of_category("arithmetic_one_step"):
        operations = {operation for sign, operation in signs.items() if sign in record["input"]}
        assert len(operations) == 1 and f" {operations.pop()} " in record["output"], record


def test_ordered_lists_are_sorted() -> None:
    for record in of_category("ordering"):
        given = record["input"].split(", ")
        answer = listed(record["output"].removeprefix("The right order is ").removesuffix("."))
        assert sorted(answer) == sorted(given), record
        if "alphabetical" in record["instruction"]:
            assert answer == sorted(given), record
        elif "animals" not in record["instruction"]:
            values = [tuple(numbers_in(item)) for item in answer]
            assert values == sorted(values, reverse="largest to smallest" in record["instruction"]), record


def test_extraction_answers_stand_in_the_passage() -> None:
    for record in of_category("extraction"):
        assert record["output"].removesuffix(".").lower() in record["input"].lower(), record


def test_reasons_for_a_verdict_stand_in_the_review() -> None:
    for record in of_category("sentiment"):
        reason = record["output"].partition(" because ")[2]
        assert reason.lower() in record["input"].lower(), record


def test_number_sequences_go_on_by_their_rule() -> None:
    for record in of_category("sequence"):
        terms = numbers_in(record["input"])
        if terms:
            answer = numbers_in(record["output"])[0]
            steady = terms[1] - terms[0] == terms[2] - terms[1]
            assert answer == (2 * terms[3] - terms[2] if steady else 2 * terms[3]), record


def test_measured_comparisons_name_the_right_one_and_difference() -> None:
    compared = [record for record in of_category("comparison") if record["input"]]
    assert compared
    for record in compared:
        (first, x), (second, y) = re.findall(r"([A-Z][a-z]+) \D+(\d+)", record["input"])
        ahead = first if (int(x) < int(y)) == ("seconds" in record["input"]) else second
        assert record["output"].startswith(f"{ahead} "), record
        assert numbers_in(record["output"]) == [abs(int(x) - int(y))], record


def test_yes_or_no_answers_follow_from_the_reason() -> None:
    for record in of_category("yes_or_no"):
        if not record["input"]:
            even = numbers_in(record["instruction"])[0] % 2 == 0
            assert record["output"].startswith("Yes" if even else "No"), record
            continue
        a, b = numbers_in(record["output"])
        assert a > b or " more than " not in record["output"], record
        assert a < b or " less than " not in record["output"], record
        wanted = a < b if "catch the bus" in record["instruction"] else a > b
        assert record["output"].startswith("Yes" if wanted else "No"), record


def test_converted_units_are_right() -> None:
    sizes = {"minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800, "seconds": 1,
             "centimetres": 1, "metres": 100, "kilometres": 100_000, "grams": 1, "kilograms": 1000,
             "months": 1, "years": 12}  # fmt: skip
    asked = [record for record in of_category("calendar_and_units") if record["output"].startswith("There are ")]
    assert asked
    for record in asked:
        found, asked_for, given, unit = re.findall(r"There are (\d+) (\w+) in (\d+) (\w+)", record["output"])[0]
        assert int(found) * sizes[asked_for] == int(given) * sizes[unit], record
