"""Instruction records from files, checked line by line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocl.common.errors import UserError
from pocl.common.files import json_kind, read_jsonl


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
