"""Fields of a model folder's config.json and generation_config.json that libraries stumble over, named in one line."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pocl.common.errors import UserError, first_line
from pocl.common.files import read_json

_CONFIG, _GENERATION = "config.json", "generation_config.json"


def check_fields(folder: Path) -> None:
    """Raise UserError, which names file and field, for a dtype that torch has not, and for token ids that are none."""
    for name in (_CONFIG, _GENERATION):
        path = folder / name
        for values in _objects(read_json(path)) if path.is_file() else ():
            for field in ("dtype", "torch_dtype"):
                _check_dtype(values.get(field), f"{path} says {field}")
            for field in ("pad_token_id", "eos_token_id", "bos_token_id"):
                _check_ids(values.get(field), f"{path} says {field}")
            pad, rows = values.get("pad_token_id"), values.get("vocab_size")
            if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
                raise UserError(
                    f"{path} says pad_token_id {pad}, but vocab_size is {rows}; write an id below it, or null"
                )


def reason(folder: Path, error: Exception) -> str:
    """Why a library did not load a folder: the field whose value it does not know, or else its own words."""
    path = folder / _CONFIG
    if isinstance(error, KeyError) and path.is_file():
        for values in _objects(read_json(path)):
            for field, value in values.items():
                if error.args and value == error.args[0]:
                    return f"{path} says {field} {value!r}, which is not known here"
    if type(error).__module__.startswith("huggingface_hub"):  # its first line names the field, the second says why
        return " ".join(str(error).split())[:300] + f" ({path})"
    known = isinstance(error, (KeyError, AssertionError, ArithmeticError)) or not str(error)
    return f"{type(error).__name__}: {first_line(error)}" if known else first_line(error)


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """A JSON object and those in it, such as the text_config."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)


def _check_dtype(value: Any, what: str) -> None:
    if isinstance(value, str) and not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        raise UserError(f"{what} {value!r}, which is no dtype of torch; write one, such as float32, or drop the field")


def _check_ids(value: Any, what: str) -> None:
    for one in value if isinstance(value, list) else [value]:
        if one is not None and type(one) is not int:
            raise UserError(f"{what} {value!r}; write the number of the token, or null")
