"""The processed data set: tokens in memory-mapped Arrow, and the manifest of the folder that holds them."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

from pocl.common.errors import UserError
from pocl.common.files import check_object, read_json
from pocl.data.batch import Batch, collate
from pocl.data.templates import ALPACA, Template

FORMAT_VERSION = 1  # of the processed folder
_TOKENS = ("prompt_ids", "response_ids")  # the columns of token ids


class Split:
    """One split of a processed dataset, in memory-mapped Arrow.

    ``lengths`` holds the input length of each example [N]; an example is ``prompt + response`` cut to ``max_length``.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        max_length: int,
        *,
        known_as: str | None = None,
        template: Template = ALPACA,
    ) -> None:
        self.known_as = known_as  # the fingerprint of the folder that the table was read from
        self.template = template  # of the prompts
        self.table = table
        self._arrow = table.with_format("arrow")
        self.max_length = max_length
        names = ("id", "num_prompt_tokens", "num_response_tokens")
        self.ids, self.prompt_lengths, response_lengths = (self._numbers(name) for name in names)
        totals = self.prompt_lengths + response_lengths
        self.lengths = np.minimum(totals, max_length) - 1  # the last token is only ever a label
        self.num_labels = self.lengths + 1 - self.prompt_lengths  # response tokens that are learnt [N]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the texts as tokens: the processed folder's fingerprint, or SHA-256 of ids and tokens."""
        if self.known_as is not None:
            return self.known_as
        digest = hashlib.sha256(self.ids.tobytes())
        for start in range(0, len(self), 4096):
            for rows in self._rows(range(start, min(start + 4096, len(self))), *_TOKENS):
                for tokens in rows:
                    digest.update(f"{len(tokens)}:".encode() + np.asarray(tokens, dtype=np.int64).tobytes())
        return digest.hexdigest()

    @cached_property
    def highest_id(self) -> int:
        """The highest token id of prompts and responses; 0 if there is none."""
        rows = self._arrow[:]
        highest = [pyarrow.compute.max(pyarrow.compute.list_flatten(rows[name])) for name in _TOKENS]
        return max((found.as_py() or 0 for found in highest), default=0)

    @property
    def key(self) -> dict[str, Any]:
        """What anything that is measured on these examples depends on."""
        return {"data": self.fingerprint, "max_length": self.max_length, "examples": len(self)}

    def batch(
        self, positions: Sequence[int] | np.ndarray, responses: Sequence[Sequence[int] | None] | None = None
    ) -> Batch:
        """The examples at these positions as one padded batch; ``responses`` that are not None replace their own."""
        ids, prompts, own = self._rows(positions, "id", "prompt_ids", "response_ids")
        if responses is not None:
            own = [mine if other is None else other for mine, other in zip(own, responses, strict=True)]
        return collate(ids, prompts, own, max_length=self.max_length)

    def _numbers(self, name: str) -> np.ndarray:
        """A column of whole numbers [N], without making numbers of Python's of them."""
        column = self.table.select_columns([name]).with_format("numpy")[:][name]
        return np.asarray(column, dtype=np.int64)

    def _rows(self, positions: Sequence[int] | np.ndarray, *columns: str) -> list[list[Any]]:
        """Columns of some rows; lists of tokens as arrays, which Arrow gives without making numbers of Python's."""
        rows = self._arrow[[int(position) for position in positions]]
        return [
            [value.values.to_numpy() if hasattr(value, "values") else value.as_py() for value in rows[name]]
            for name in columns
        ]

    def column(self, name: str) -> list[Any]:
        """One column of the table."""
        return list(self.table[name])


def load_split(data_dir: str | Path, split: str, *, max_length: int, num_examples: int | None = None) -> Split:
    """A split that tools/process_data.py wrote.  Raises UserError where it is missing or leaves nothing to learn."""
    data_dir = Path(data_dir)
    manifest, folder = read_manifest(data_dir), data_dir / split
    if not folder.is_dir():
        raise UserError(f"{data_dir} has no split {split!r}; run tools/process_data.py again")
    table = datasets.load_from_disk(str(folder))
    if num_examples is not None:
        table = table.select(range(min(num_examples, len(table))))
    loaded = Split(table, max_length, known_as=manifest["fingerprint"], template=template_of(manifest))
    if len(loaded) and loaded.prompt_lengths.max() >= max_length:
        row = int(loaded.prompt_lengths.argmax())
        raise UserError(
            f"example {loaded.ids[row]} of {folder} has a prompt of {loaded.prompt_lengths[row]} tokens, which leaves "
            f"no room for a response in `max_length` {max_length}; raise it, or run tools/process_data.py with a "
            f"lower `max_prompt_length`"
        )
    return loaded


def read_manifest(data_dir: Path) -> dict[str, Any]:
    """manifest.json of a processed folder.  Raises UserError where there is none or it is of another version."""
    path = data_dir / "manifest.json"
    if not path.is_file():
        raise UserError(f"{data_dir} holds no processed data (no manifest.json); run tools/process_data.py first")
    manifest: dict[str, Any] = read_json(path)
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


def template_of(manifest: Mapping[str, Any]) -> Template:
    """The template of processed data; there was one alone before manifests named it."""
    return Template.of(manifest["template"]) if "template" in manifest else ALPACA
