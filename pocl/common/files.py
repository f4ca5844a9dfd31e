"""Files written whole or not at all, JSONL read with file and line in every complaint, fingerprints."""

import codecs
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocl.common.errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]  # of a checkout: where scripts/ and data/ are


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename.  Raises UserError where the disk refuses."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """The same with a text that comes in parts."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_parts(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> Any:
    """Read one JSON value.  Raises UserError where the file is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, RecursionError) as error:  # ValueError: malformed, no UTF-8, or a number of 5,000 digits
        raise UserError(f"{path} is no valid JSON ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_object(path: Path, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Read a JSON object that holds at least these names, each with a value of one of these types.

    Raises UserError where it does not, and where the file is missing or malformed.
    """
    value: dict[str, Any] = read_json(path)
    check_object(value, kinds, f"{path} is damaged: it")
    return value


def check_object(value: Any, kinds: Mapping[str, tuple[type, ...]], what: str) -> None:
    """Raise UserError, which begins with ``what``, unless ``value`` is such an object; True is no whole number."""
    if not isinstance(value, dict):
        raise UserError(f"{what} holds {json_kind(value)} instead of a JSON object")
    for name, types in kinds.items():
        if name not in value:
            raise UserError(f"{what} has no {name!r}")
        if type(value[name]) not in types:
            wanted = " or ".join(kind.__name__ for kind in types)
            raise UserError(f"{what} says {name!r} with a {type(value[name]).__name__}, not a {wanted}")


def json_kind(value: Any) -> str:
    """What a value of a JSON file is called there: null, a number, a list."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; line i of the file is record i.

    A byte order mark at its start and blank lines at its end are passed over.  Raises UserError with file and line
    number for a missing file, bytes that are no UTF-8, another blank line, a malformed one, or one that holds no
    object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors of Windows write it
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    lines = content.rstrip().splitlines()  # bytes: only \n, \r and \r\n end a line, not U+2028
    if not lines:
        raise UserError(f"{path} is empty; it wants one JSON object a line")
    if lines[0].lstrip().startswith(b"["):
        raise UserError(
            f"{path}:1: a list; each line wants one JSON object: jq -c '.[]' ARRAY.json > LINES.jsonl makes them"
        )
    return [json_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that is appended to; a last line that a crash cut is left out, a missing file empty.

    Raises UserError for a line before it that is not a JSON object.
    """
    if not path.is_file():
        return []
    # Bytes, split at \n only: a text may hold other line separators, such as U+2028.
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is damaged: {first_line(error)}") from error
        check_object(record, {}, f"{path}:{number}: the line")
        records.append(record)
    return records


def json_record(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object of one line.  Raises UserError, which begins with ``place``, where it holds none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: bytes that are no UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        what = "a blank line" if not line.strip() else f"no valid JSON ({error})"
        raise UserError(f"{place}: {what}; each line wants one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: {json_kind(record)}; each line wants one JSON object")
    return record


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def value_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def open_weights(*paths: Path) -> None:
    """Give files of weights the permissions that every new file has: safetensors lets their owner alone read them."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def replace_folder(new: Path, old: Path) -> None:
    """Put the finished folder ``new`` in the place of ``old``; a crash leaves one of them whole."""
    open_weights(*new.rglob("*.safetensors"))
    aside = _aside(old)
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo a ``replace_folder`` that a crash cut in two."""
    aside = _aside(path)
    if aside.exists() and not path.exists():
        os.replace(aside, path)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Where a folder waits while it is replaced: no name that a person gives a copy, since it is deleted."""
    return path.with_name(f".{path.name}.replaced")
