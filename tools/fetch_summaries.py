"""Bring a summarisation set into the project's JSONL, so that every script runs on it: DATA=samsum bash scripts/...

    python tools/fetch_summaries.py --set samsum                       # from the hub
    python tools/fetch_summaries.py --set xsum --source FOLDER         # from files with train, validation and test

Writes data/<set>/raw.jsonl (the validation records first, which become the dev split, then the training records),
data/<set>/num_dev (how many of them are the dev split, for scripts/<family>/tools/process_data.sh) and
data/<set>/valid.jsonl (the test records, to evaluate on).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError, first_line
from pocl.common.files import write_jsonl, write_text


@dataclass(frozen=True)
class Source:
    """Where a set is on the hub, which of its columns are text and summary, and what the student is asked."""

    repo: str
    text: str
    summary: str
    instruction: str
    config: str | None = None
    revision: str | None = None


# The hub's own conversion of a set whose main branch is a script: datasets runs none.
PARQUET = "refs/convert/parquet"

SETS = {
    "samsum": Source("knkarthick/samsum", "dialogue", "summary", "Summarize the following dialogue."),
    "xsum": Source(
        "EdinburghNLP/xsum",
        "document",
        "summary",
        "Summarize the following article in one sentence.",
        revision=PARQUET,
    ),
    "cnn-dailymail": Source(
        "abisee/cnn_dailymail", "article", "highlights", "Summarize the following article.", config="3.0.0"
    ),
}


@dataclass(frozen=True)
class SummaryOptions:
    """Which set, and how much of it."""

    _argument_group_name: ClassVar[str] = "summaries"
    set: str = flag(f"which of {', '.join(SETS)}", known=SETS)
    source: str | None = flag("folder with the splits as JSONL, CSV or Parquet [default: the hub]", None)
    data_root: str = flag("folder to put it into", "data")
    num_train: int | None = flag("first N training records [records; default: all]", None, above=0)
    num_dev: int = flag("first N validation records, which become the dev split [records]", 500, above=0)
    num_test: int | None = flag("first N test records [records; default: all]", None, above=0)
    max_words: int = flag(
        "longer texts are cut behind this many words: a news article's first ones say most", 160, above=0
    )


def main() -> None:
    """Load, convert, write."""
    quiet_libraries()
    (what,) = parse([SummaryOptions], "Bring a summarisation set into the project's JSONL.")
    source, folder = SETS[what.set], Path(what.data_root) / what.set
    splits = load_splits(source, what.source)
    parts = {
        name: list(convert(splits[name], source, count, what.max_words, f"{what.set}, {name}"))
        for name, count in (("validation", what.num_dev), ("train", what.num_train), ("test", what.num_test))
    }
    for name, records in parts.items():
        if not records:
            raise UserError(f"the {name} split of {what.set} holds no text with a summary")
    write_jsonl(folder / "raw.jsonl", [*parts["validation"], *parts["train"]])
    write_text(folder / "num_dev", f"{len(parts['validation'])}\n")
    write_jsonl(folder / "valid.jsonl", parts["test"])
    counts = {name: len(records) for name, records in parts.items()}
    say(
        f"{folder}: {counts['train']} records to train on, {counts['validation']} for dev, {counts['test']} to test on"
    )
    say(f"next: DATA={what.set} bash scripts/<family>/tools/process_data.sh")


def load_splits(source: Source, folder: str | None) -> Mapping[str, Any]:
    """The three splits.  Raises UserError where they cannot be had, or lack a column."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--source {folder} is no folder; it wants files named after train, validation and test")
    try:
        hub = {"name": source.config, "revision": source.revision}
        splits = datasets.load_dataset(folder) if folder else datasets.load_dataset(source.repo, **hub)
    except Exception as error:  # the readers of three formats and the hub's client share no class of errors
        place = folder or f"{source.repo} (the hub; --source FOLDER takes files that are here)"
        raise UserError(f"cannot load {place}: {first_line(error)}") from error
    for name in ("train", "validation", "test"):
        if name not in splits:
            raise UserError(f"{folder or source.repo} has no split {name!r}, only {', '.join(splits)}")
        missing = {source.text, source.summary} - set(splits[name].column_names)
        if missing:
            raise UserError(f"{folder or source.repo}, {name}: no column {', '.join(sorted(missing))}")
    return splits


def convert(
    split: datasets.Dataset, source: Source, count: int | None, max_words: int, place: str
) -> Iterator[dict[str, str]]:
    """The first ``count`` records as instruction, input and output; those without text or summary are left out."""
    made = 0
    for number, row in enumerate(split):
        if made == count:
            return
        text, summary = row[source.text], row[source.summary]
        if text is None or summary is None or not str(text).strip() or not str(summary).strip():
            continue
        if not isinstance(text, str) or not isinstance(summary, str):
            raise UserError(f"{place}: record {number} holds no string under {source.text!r} or {source.summary!r}")
        made += 1
        yield {"instruction": source.instruction, "input": cut(text, max_words), "output": summary.strip()}


def cut(text: str, max_words: int) -> str:
    """The text up to its ``max_words``-th word, with its own line breaks."""
    place, stripped = 0, text.strip()
    for words, word in enumerate(stripped.split(), start=1):
        place = stripped.index(word, place) + len(word)
        if words == max_words:
            return stripped[:place]
    return stripped


if __name__ == "__main__":
    run_main(main)
