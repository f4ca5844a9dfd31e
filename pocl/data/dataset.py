"""Examples from JSONL to batches: the prompt template, the processed Arrow dataset, padded and packed batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocl.common.errors import UserError
from pocl.common.files import check_object, json_kind, read_json, read_jsonl, value_sha256
from pocl.models.attention import Segments

IGNORE = -100  # the label of a position that is no response token
FORMAT_VERSION = 1  # of the processed folder

# Source: Alpaca, as the paper's published tokens show it.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def make_prompt(instruction: str, input_text: str = "") -> str:
    """The prompt that stands before every response."""
    # replace, not format: an instruction may hold braces.
    template = PROMPT_WITH_INPUT if input_text else PROMPT_WITHOUT_INPUT
    head, _, tail = template.partition("{instruction}")
    return head + instruction + tail.replace("{input}", input_text)


def check_record(record: Mapping[str, Any], place: str) -> None:
    """Raise UserError unless the record holds an instruction, an optional input and a non-empty response."""
    for key, required in (("instruction", True), ("input", False), ("output", True)):
        if key not in record:
            if required:
                raise UserError(f"{place}: no field {key!r}; a record wants instruction, input and output")
            continue
        if not isinstance(record[key], str):
            raise UserError(f"{place}: {key!r} is {json_kind(record[key])}; it must be a string")
        if required and not record[key].strip():
            raise UserError(f"{place}: {key!r} is empty")
        try:
            record[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: {key!r} holds a lone surrogate, which is no text") from error


def read_instructions(path: Path) -> list[dict[str, Any]]:
    """The checked records of a raw.jsonl, in the order of the file."""
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        check_record(record, f"{path}:{number}")
    return records


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, response tokens with the end-of-text token).

    Prompt and response are encoded together, as the published tokens are, and cut behind the prompt's own length.
    """
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    full_ids = tokenizer.encode(prompt + response, add_special_tokens=False) + [tokenizer.eos_token_id]
    return full_ids[: len(prompt_ids)], full_ids[len(prompt_ids) :]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, the end-of-text token and how a probe is split: equal tokenizers, equal values."""
    probe = "Below is an instruction.\n\n  naïve 北京 \t 3.14 don't"
    return value_sha256(
        [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, tokenizer.encode(probe, add_special_tokens=False)]
    )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B examples: T positions a row, padded on the right to the longest, or packed into one row.

    What the program itself must know stays on the CPU, so that a device is never waited for.
    """

    example_ids: Tensor  # [B], on the CPU
    num_labels: Tensor  # [B], on the CPU: how many response tokens each example has
    input_ids: Tensor  # [B, T]; packed [1, T]
    attention_mask: Tensor  # likewise
    labels: Tensor  # likewise, the next token; -100 where it is no response token
    places: Tensor  # [N]: where the response tokens are, counted through the rows
    position_ids: Tensor | None = None  # packed: [1, T], 0 where an example begins
    segments: Segments | None = None  # packed: where the examples are

    @staticmethod
    def of(
        example_ids: Tensor,
        num_labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        segments: Segments | None = None,
    ) -> "Batch":
        """A batch from tensors on the CPU."""
        places = (labels != IGNORE).flatten().nonzero().flatten()
        return Batch(example_ids, num_labels, input_ids, attention_mask, labels, places, position_ids, segments)

    @property
    def num_response_tokens(self) -> int:
        """N: how many positions have a label."""
        return len(self.places)

    def packed(self) -> "Batch":
        """The same examples one behind the other in one row, without padding."""
        kept = self.attention_mask.bool()
        positions = self.attention_mask.cumsum(-1) - 1
        parts = (part[kept][None] for part in (self.input_ids, self.attention_mask, self.labels, positions))
        return Batch.of(self.example_ids, self.num_labels, *parts, Segments.of(self.attention_mask.sum(-1)))

    def to(self, device: torch.device) -> "Batch":
        """The same batch with what models read on another device."""
        parts = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "labels", "places")}
        if self.position_ids is not None:
            parts["position_ids"] = self.position_ids
        sent = replace(self, **{name: send(part, device) for name, part in parts.items()})
        if self.segments is None:
            return sent
        return replace(sent, segments=self.segments.at(send(self.segments.offsets, device)))

    def sum_by_example(self, values: Tensor) -> Tensor:
        """The sum of a value of each response token over each example, in float64.  [N] -> [B]."""
        example = torch.arange(len(self.num_labels)).repeat_interleave(self.num_labels)
        sums = torch.zeros(len(self.num_labels), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, send(example, values.device), values.detach().double())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for what that still has to do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Split:
    """One split of a processed dataset, in memory-mapped Arrow.

    ``lengths`` holds the input length of each example [N]; an example is ``prompt + response`` cut to ``max_length``.
    """

    def __init__(self, table: datasets.Dataset, max_length: int) -> None:
        self.table = table
        self._arrow = table.with_format("arrow")
        self.max_length = max_length
        self.ids = np.asarray(table["id"], dtype=np.int64)
        self.prompt_lengths = np.asarray(table["num_prompt_tokens"], dtype=np.int64)
        totals = self.prompt_lengths + np.asarray(table["num_response_tokens"], dtype=np.int64)
        self.lengths = np.minimum(totals, max_length) - 1  # the last token is only ever a label
        self.num_labels = self.lengths + 1 - self.prompt_lengths  # response tokens that are learnt [N]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, positions: Sequence[int], responses: Sequence[Sequence[int] | None] | None = None) -> Batch:
        """The examples at these positions as one padded batch; ``responses`` that are not None replace their own."""
        ids, prompts, own = self._rows(positions, "id", "prompt_ids", "response_ids")
        if responses is not None:
            own = [mine if other is None else other for mine, other in zip(own, responses, strict=True)]
        return collate(ids, prompts, own, max_length=self.max_length)

    def _rows(self, positions: Sequence[int], *columns: str) -> list[list[Any]]:
        """Columns of some rows; lists of tokens as arrays, which Arrow gives without making numbers of Python's."""
        rows = self._arrow[[int(position) for position in positions]]
        return [
            [value.values.to_numpy() if hasattr(value, "values") else value.as_py() for value in rows[name]]
            for name in columns
        ]

    def column(self, name: str) -> list[Any]:
        """One column of the table."""
        return list(self.table[name])


def collate(
    example_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    max_length: int,
) -> Batch:
    """Token lists -> a right-padded Batch with next-token labels; masks come from lengths, never from token ids."""
    firsts = [len(prompt) - 1 for prompt in prompts]  # this position predicts the first response token
    totals = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [min(total, max_length) - 1 for total in totals]
    shape = (len(lengths), max(lengths))
    input_ids = np.zeros(shape, dtype=np.int64)  # id 0 is in every vocabulary; no position with it is read
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        sequence = np.concatenate([np.asarray(part[row], dtype=np.int64) for part in (prompts, responses)])[
            : length + 1
        ]
        input_ids[row, :length] = sequence[:-1]
        attention_mask[row, :length] = 1
        labels[row, first:length] = sequence[first + 1 :]
    num_labels = (torch.tensor(lengths) - torch.tensor(firsts)).clamp_(min=0)
    parts = (torch.from_numpy(part) for part in (input_ids, attention_mask, labels))
    return Batch.of(torch.tensor(example_ids), num_labels, *parts)


def load_split(data_dir: Path, split: str, *, max_length: int, num_examples: int | None = None) -> Split:
    """A split that tools/process_data.py wrote.  Raises UserError where it is missing or leaves nothing to learn."""
    read_manifest(data_dir)
    folder = data_dir / split
    if not folder.is_dir():
        raise UserError(f"{data_dir} has no split {split!r}; run tools/process_data.py again")
    table = datasets.load_from_disk(str(folder))
    if num_examples is not None:
        table = table.select(range(min(num_examples, len(table))))
    loaded = Split(table, max_length)
    if len(loaded) and loaded.prompt_lengths.max() >= max_length:
        row = int(loaded.prompt_lengths.argmax())
        raise UserError(
            f"example {loaded.ids[row]} of {folder} has a prompt of {loaded.prompt_lengths[row]} tokens, which leaves "
            f"no room for a response in --max-length {max_length}; raise it, or run tools/process_data.py with a "
            f"lower --max-prompt-length"
        )
    return loaded


def read_manifest(data_dir: Path) -> dict[str, Any]:
    """manifest.json of a processed folder.  Raises UserError where there is none or it is of another version."""
    path = data_dir / "manifest.json"
    if not path.is_file():
        raise UserError(f"{data_dir} holds no processed data (no manifest.json); run tools/process_data.py first")
    manifest = read_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is of format {version!r}, this code reads format {FORMAT_VERSION}; "
            f"run tools/process_data.py again"
        )
    kinds = {"fingerprint": (str,), "tokenizer": (str,), "tokenizer_fingerprint": (str,), "max_prompt_length": (int,)}
    check_object(manifest, kinds, f"{path} is damaged: it")
    if manifest["max_prompt_length"] < 1:
        raise UserError(f"{path} is damaged: its max_prompt_length is {manifest['max_prompt_length']}")
    return manifest


def check_tokenizer(data_dir: Path, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise UserError where the data was processed for another tokenizer than the model's."""
    manifest = read_manifest(data_dir)
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{data_dir} was tokenised with {manifest['tokenizer']!r}, which differs from {model!r}; "
            f"run tools/process_data.py --tokenizer {model}"
        )
