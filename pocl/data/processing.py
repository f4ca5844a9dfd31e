"""Records to a table of examples: in memory, or as a stream of chunks that every core works on, in their order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from pocl.common.errors import UserError
from pocl.data.dataset import Split
from pocl.data.encoding import Encoder, Turns
from pocl.data.templates import Template, choose_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # records that one process is given at a time
_TOO_FEW = 4  # chunks: starting processes takes longer than such work
_AHEAD = 3  # chunks for each process that are under way
# What may be done to the texts of an example, as manifest.json counts it and as it is said.
CHANGES = {
    "special_names": "hold the name of a special token, which stays text",
    "encoded_apart": "have a response whose first letters would have been one token with the end of the prompt: it is "
    "encoded apart, behind the prompt's own tokens",
    "not_reproduced": "have texts that their tokens do not say in full: the tokenizer leaves out or replaces letters",
    "cut_turns": "lost the oldest turns of their conversation to `max_prompt_length`",
}
_COLUMNS = {"id": pa.int64(), "prompt": pa.string(), "response": pa.string(), "category": pa.string()}
_COLUMNS |= {"prompt_ids": pa.list_(pa.int32()), "response_ids": pa.list_(pa.int32())}
_COLUMNS |= {"num_prompt_tokens": pa.int64(), "num_response_tokens": pa.int64()}
# Of conversations: the number of the record in its source from 0, its own id, and which of its answers it is from 1.
_TURNS = {"record": pa.int64(), "record_id": pa.string(), "turn": pa.int64()}
SCHEMA, TURNS_SCHEMA = pa.schema(_COLUMNS), pa.schema(_COLUMNS | _TURNS)


class Chunk(NamedTuple):
    """The examples of some neighbouring records."""

    examples: pa.RecordBatch  # that fit; their ids are counted from the chunk's first example
    records: np.ndarray  # of each example, the number of its record from the chunk's first one
    num_records: int
    num_examples: int  # with those whose prompt was too long
    changed: Counter[str]
    ends: frozenset[int]  # the tokens that end the responses


def encode(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template | str | None = None,
    turns: Turns = "all",
    max_length: int = 512,
    max_prompt_length: int = 256,
) -> Split:
    """Records (``load_records``) as a split in memory. An example's id is its number among all, from 0.

    ``template`` is one, a name (alpaca, chat, plain) or a Jinja file; None is the tokenizer's own, or alpaca where it
    has none. Examples with a longer prompt than ``max_prompt_length`` are left out.  Raises UserError for a record
    that cannot be encoded, and where none is left.
    """
    found = iter(records)
    first = next(found, None)
    if not isinstance(template, Template):
        template = choose_template(tokenizer, template, conversations=first is not None and "messages" in first)
    encoder = Encoder(tokenizer, template, turns=turns, max_prompt_length=max_prompt_length)
    everything = chain([] if first is None else [first], found)
    chunks = list(encode_stream(everything, encoder, num_workers=1))
    batches = [batch for batch, _ in numbered(chunks)]
    if not any(len(batch) for batch in batches):
        raise UserError(f"no record has a prompt of at most `max_prompt_length` {max_prompt_length} tokens")
    ends = frozenset[int]().union(*(chunk.ends for chunk in chunks))
    table = datasets.Dataset(pa.Table.from_batches(batches))
    return Split(table, max_length, template=with_ends(template, tokenizer, ends))


def with_ends(template: Template, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> Template:
    """The template with the tokens that were found to end its responses; the one that it always uses comes first."""
    usual = Encoder(tokenizer, template).end
    others = {str(tokenizer.convert_ids_to_tokens(end)) for end in ends} - {usual}
    return Template.of(vars(template) | {"ends": (usual, *sorted(others))})


def numbered(chunks: Iterable[Chunk]) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """The examples of chunks in their order with their ids, and the number of each one's record, both from 0."""
    num_examples = num_records = 0
    for chunk in chunks:
        ids = pa.array(chunk.examples["id"].to_numpy() + num_examples)
        batch, records = chunk.examples.set_column(0, "id", ids), chunk.records + num_records
        if "record" in batch.schema.names:
            batch = batch.set_column(batch.schema.get_field_index("record"), "record", pa.array(records))
        yield batch, records
        num_examples, num_records = num_examples + chunk.num_examples, num_records + chunk.num_records


def encode_stream(records: Iterable[Mapping[str, Any]], encoder: Encoder, *, num_workers: int) -> Iterator[Chunk]:
    """The examples of records, chunk by chunk in their order. Memory does not grow with the number of records.

    Raises UserError for a record that cannot be encoded.
    """
    rows = iter(records)
    parts = iter(lambda: list(islice(rows, CHUNK)), [])
    first = list(islice(parts, _TOO_FEW))
    if num_workers == 1 or len(first) < _TOO_FEW:
        yield from (encode_chunk(part, encoder) for part in chain(first, parts))
        return
    with ProcessPoolExecutor(num_workers, initializer=_start, initargs=(encoder,)) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for part in chain(first, parts):
                waiting.append(pool.submit(_encode, part))
                if len(waiting) > _AHEAD * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_encoder: list[Encoder] = []  # of this process, where it is one of several


def _start(encoder: Encoder) -> None:
    _encoder[:] = [encoder]


def _encode(records: Sequence[Mapping[str, Any]]) -> Chunk:
    return encode_chunk(records, _encoder[0])


def encode_chunk(records: Sequence[Mapping[str, Any]], encoder: Encoder) -> Chunk:
    """The examples of neighbouring records."""
    schema = TURNS_SCHEMA if "messages" in records[0] else SCHEMA
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    changed, ends, numbers, count = Counter[str](), set(), [], 0
    for number, record in enumerate(records):
        for example in encoder.examples(record):
            count += 1
            tokens = example.tokens
            changes = (example.special_names, tokens.apart, not tokens.exact, example.cut)
            changed.update(name for name, is_so in zip(CHANGES, changes, strict=True) if is_so)
            if encoder.max_prompt_length is not None and len(tokens.prompt) > encoder.max_prompt_length:
                continue
            ends.add(tokens.response[-1])
            numbers.append(number)
            lengths = len(tokens.prompt), len(tokens.response)
            values = [count - 1, example.prompt, example.response, record.get("category", "")]
            values += [tokens.prompt, tokens.response, *lengths, number, record.get("id", ""), example.turn]
            for column, value in zip(columns.values(), values, strict=False):  # the last are of conversations
                column.append(value)
    batch = pa.RecordBatch.from_pydict(columns, schema=schema)
    return Chunk(batch, np.array(numbers, dtype=np.int64), len(records), count, changed, frozenset(ends))
