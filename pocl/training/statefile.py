"""Nested state (dicts and lists of tensors, numbers, strings) as a safetensors file: loading it runs no code."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocl.common.errors import UserError, first_line
from pocl.common.files import open_weights

_STATE = "state"  # the metadata entry that holds everything except the tensors
_LARGE_STATE = "#state"  # the tensor that holds it if large, such as a replay buffer: a header is limited to 100 MB
_MOST_METADATA = 1 << 24  # bytes


def save_state(path: Path, state: Any) -> None:
    """Write ``state`` to ``path``, and flush it to disk.

    It may hold dicts (keys: strings or integers), lists, tuples (read back as lists), tensors and JSON values.
    Raises OSError or SafetensorError if the disk refuses, TypeError for anything else in it.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {_STATE: json.dumps(_take_apart(state, tensors, ""))}
    if len(metadata[_STATE]) > _MOST_METADATA:
        tensors[_LARGE_STATE] = torch.frombuffer(bytearray(metadata.pop(_STATE), "ascii"), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    open_weights(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def load_state(path: Path) -> Any:
    """What ``save_state`` wrote, tensors on the CPU.  Raises UserError if missing, truncated or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            if _LARGE_STATE in file.keys():  # noqa: SIM118  it is not a dict
                skeleton = json.loads(file.get_tensor(_LARGE_STATE).numpy().tobytes())
            else:
                skeleton = json.loads((file.metadata() or {})[_STATE])
            return _put_together(skeleton, file)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is truncated or not a saved run state ({first_line(error)})") from error


def _take_apart(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """The value as JSON, with each tensor moved to ``tensors`` and replaced by its name there."""
    if isinstance(value, Tensor):
        name = place if place not in tensors else f"{place}#{len(tensors)}"
        # A copy, since memory may be shared with a larger tensor or another entry, which safetensors does not accept.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"a key of the state is a {type(key).__name__}")
        return {"dict": [[key, _take_apart(entry, tensors, _join(place, key))] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_apart(entry, tensors, _join(place, i)) for i, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the state holds a {type(value).__name__}")


def _join(place: str, key: str | int) -> str:
    return f"{place}.{key}" if place else str(key)


def _put_together(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_put_together(entry, file) for entry in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return file.get_tensor(value["tensor"])
        return {key: _put_together(entry, file) for key, entry in value["dict"]}
    return value
