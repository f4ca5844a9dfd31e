"""Evaluation sets, answers over seeds, per-example scores and their summary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocl.common.console import say
from pocl.common.errors import UserError, closest
from pocl.common.files import json_kind, read_jsonl
from pocl.data.dataset import Split
from pocl.data.prompts import encode_text, make_prompt
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


def set_path(data_root: Path, name: str) -> Path:
    """The valid.jsonl of an evaluation set.  Raises UserError for an unknown set; it names the known ones."""
    path = data_root / SET_FOLDERS.get(name, name) / "valid.jsonl"
    if not path.is_file():
        known = [key for key in SET_FOLDERS if (data_root / SET_FOLDERS[key] / "valid.jsonl").is_file()]
        known += sorted(file.parent.name for file in data_root.glob("*/valid.jsonl"))
        raise UserError(
            f"no evaluation set {name!r}: {path} does not exist{closest(name, known)} "
            f"(known: {', '.join(known) or 'none'}; tools/fetch.py downloads the paper's)"
        )
    return path


def load_set(
    data_root: Path, name: str, num_examples: int | None = None, *, rouge_tokenizer: RougeTokenizer | None = None
) -> list[Example]:
    """The examples of data_root/name/valid.jsonl, in the order of the file.

    A record holds ``prompt`` or ``instruction`` and ``input``; ``output`` is one reference or a list of them.
    ``rouge_tokenizer`` is what is to score answers to them: UserError where it cannot read the references.
    """
    path = set_path(data_root, name)
    examples = [_example(record, i, f"{path}:{i + 1}") for i, record in enumerate(read_jsonl(path))][:num_examples]
    if rouge_tokenizer:
        check_readable([text for example in examples for text in example.references], rouge_tokenizer, str(path))
    return examples


def _example(record: Mapping[str, Any], number: int, place: str) -> Example:
    references = record.get("output")
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise UserError(f"{place}: 'output' must be a reference answer or a list of them")
    prompt = record.get("prompt")
    if prompt is None:
        instruction, input_text = record.get("instruction"), record.get("input", "")
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"{place}: neither 'prompt' nor 'instruction' is a non-empty string")
        if not isinstance(input_text, str):
            raise UserError(f"{place}: 'input' is {json_kind(input_text)}; it must be a string")
        prompt = make_prompt(instruction, input_text)
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{place}: 'prompt' must be a non-empty string")
    try:
        "".join([prompt, *references]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: a lone surrogate, which is not valid text") from error
    return Example(number, prompt, tuple(references))


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
    prompts = [encode_text(tokenizer, example.prompt) for example in examples]
    return [prompt[-max_prompt_length:] for prompt in prompts], sum(len(p) > max_prompt_length for p in prompts)
