"""Evaluation sets, answers over seeds, per-example scores and their summary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocl.common.console import say
from pocl.common.errors import UserError, closest
from pocl.data.dataset import Split
from pocl.data.encoding import Encoder
from pocl.data.prompts import encode_text
from pocl.data.records import read_records
from pocl.data.sources import SUFFIXES, open_source
from pocl.data.templates import ALPACA
from pocl.evaluation.words import RougeTokenizer, check_readable
from pocl.generation.sampling import Sampling, is_banned

# The paper names its sets by folder; S-NI and UnNI keep the references of 11 tokens and more.
SET_FOLDERS = {"sinst": "sinst/11_", "uinst": "uinst/11_"}


@dataclass(frozen=True)
class Example:
    """One prompt with all of its references."""

    id: int  # number of its line in valid.jsonl, from 0
    prompt: str
    references: tuple[str, ...]
    prompt_ids: tuple[int, ...] | None = None  # where a template has made them; else they are the text's
    reference_ids: tuple[int, ...] | None = None  # of the first, with the end token, where a template can write it


@dataclass(frozen=True)
class TestSet:
    """An evaluation set with its prompts as a model reads them."""

    name: str
    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    num_cut: int  # prompts that lost their beginning


@dataclass(frozen=True)
class DevSet:
    """The dev split as evaluation sees it."""

    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    sampling: Sampling
    batch_size: int  # prompts that are answered together
    split: Split
    rouge_tokenizer: RougeTokenizer = "rouge"
    select_by: str = "rouge_l"  # the metric by which the best student is chosen


def set_path(data_root: Path, name: str) -> Path:
    """The file of an evaluation set, valid.jsonl or in another form.

    Raises UserError for an unknown set, naming the known ones, and where there are several files.
    """
    folder = data_root / SET_FOLDERS.get(name, name)
    found = _valid_files(folder)
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in found)}; keep one of them")
    if not found:
        known = known_sets(data_root)
        raise UserError(
            f"no evaluation set {name!r}: {folder / 'valid.jsonl'} does not exist{closest(name, known)} "
            f"(known: {', '.join(known) or 'none'}; tools/fetch.py downloads the paper's)"
        )
    return found[0]


def known_sets(data_root: Path) -> list[str]:
    """The evaluation sets that are there: those of the paper that lie deeper, then the folders by name."""
    deeper = [name for name, place in SET_FOLDERS.items() if _valid_files(data_root / place)]
    folders = sorted(data_root.iterdir()) if data_root.is_dir() else []
    return deeper + [folder.name for folder in folders if folder.is_dir() and _valid_files(folder)]


def _valid_files(folder: Path) -> list[Path]:
    names = [f"valid{suffix}{zipped}" for suffix in SUFFIXES for zipped in ("", ".gz")]
    return [folder / name for name in names if (folder / name).is_file()]


def load_set(
    data_root: Path,
    name: str,
    num_examples: int | None = None,
    *,
    rouge_tokenizer: RougeTokenizer | None = None,
    encoder: Encoder | None = None,
) -> list[Example]:
    """The examples of an evaluation set, in the order of its file.

    A record is one of those that are trained on, where the answer may be a list of references; or it holds a
    ``prompt`` that is taken as it stands. ``encoder`` makes the prompts; without one they are Alpaca's texts, or what
    a conversation says. ``rouge_tokenizer`` is what is to score answers: UserError where it cannot read the
    references.
    """
    path = set_path(data_root, name)
    records = islice(read_records(open_source(path), evaluation=True), num_examples)
    examples = [_example(record, number, encoder) for number, record in enumerate(records)]
    if rouge_tokenizer:
        check_readable([text for example in examples for text in example.references], rouge_tokenizer, str(path))
    return examples


def _example(record: Mapping[str, Any], number: int, encoder: Encoder | None) -> Example:
    if encoder is not None:
        text, ids = encoder.prompt(record)
        return Example(number, text, encoder.references(record), tuple(ids), _reference_ids(record, encoder))
    if "messages" not in record:
        return Example(number, ALPACA.text_prompt(record), tuple(record["output"]))
    *before, last = record["messages"]
    return Example(number, "\n\n".join(f"{one['role']}: {one['content']}" for one in before), (last["content"],))


def _reference_ids(record: Mapping[str, Any], encoder: Encoder) -> tuple[int, ...] | None:
    try:
        return tuple(encoder.reference_ids(record))
    except UserError:  # a model can be asked by a template that cannot write this answer
        return None


def say_what_is_banned(
    name: str, prompts: Iterable[list[int]], references: Iterable[Sequence[int]], size: int
) -> None:
    """Say how many references the ban of repeated n-grams of this size makes impossible: scores have that ceiling."""
    banned = [is_banned(prompt, response, size) for prompt, response in zip(prompts, references, strict=True)]
    if any(banned):
        say(
            f"{name}: {sum(banned)} of {len(banned)} references cannot be written under `no_repeat_ngram` {size}; "
            f"`no_repeat_ngram` 0 bans nothing"
        )


def tokenise_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_prompt_length: int
) -> tuple[list[list[int]], int]:
    """(token ids of each prompt, how many were left-truncated to the limit); the end holds the answer's mark."""
    prompts = [
        encode_text(tokenizer, example.prompt) if example.prompt_ids is None else list(example.prompt_ids)
        for example in examples
    ]
    return [prompt[-max_prompt_length:] for prompt in prompts], sum(len(p) > max_prompt_length for p in prompts)
