"""Rows of records from what people have: JSON, CSV and Parquet files, folders of them, data sets here or on the hub.

A row comes with its place, which errors name: file and line where there are lines, else the number of the record.
"""

import codecs
import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, Any

from pocl.common.errors import UserError, first_line
from pocl.common.files import file_sha256, json_kind, json_record, read_jsonl, value_sha256

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]
HUB = "hub:"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_FOLDER_OF_DATASETS = ("state.json", "dataset_dict.json")  # what save_to_disk of datasets leaves


@dataclass(frozen=True)
class Source:
    """Where records come from: ``rows`` may be gone through several times."""

    name: str
    rows: Callable[[], Rows]
    files: tuple[Path, ...] = ()

    @property
    def has_cells(self) -> bool:
        """Whether every value is a text, since it comes from a cell."""
        return any(_suffix(path) in (".csv", ".tsv") for path in self.files)

    def sha256(self) -> str:
        """SHA-256 of the file, of the files of a folder, or of the rows of a data set."""
        if len(self.files) == 1:
            return file_sha256(self.files[0])
        if self.files:
            return value_sha256([[path.name, file_sha256(path)] for path in self.files])
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "replace"))
        return digest.hexdigest()


def open_source(source: Any, split: str = "train") -> Source:
    """What ``source`` names: a file, a folder, ``hub:owner/name[:config][@revision]``, a ``datasets.Dataset``, or
    rows in memory.  Raises UserError where nothing of the kind is there."""
    if isinstance(source, str) and source.startswith(HUB):
        return _of_dataset(_from_hub(source.removeprefix(HUB), split), source)
    if isinstance(source, str | Path):
        return _of_path(Path(source), split)
    if hasattr(source, "column_names"):
        return _of_dataset(source, "the data set")
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UserError(f"`source` is a {type(source).__name__}; give a path, a datasets.Dataset or a list of records")
    rows = list(source)
    return Source("the records", lambda: ((f"record {number}", row) for number, row in enumerate(rows, start=1)))


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that hold records, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _suffix(path) in SUFFIXES)


def _of_path(path: Path, split: str) -> Source:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        return Source(str(path), lambda: _read_file(path), (path,))
    if any((path / name).is_file() for name in _FOLDER_OF_DATASETS):
        return _of_dataset(_one_split(_load_folder(path), split, str(path)), str(path))
    files = data_files(path)
    kinds = sorted({_suffix(file) for file in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else f"none of {', '.join(SUFFIXES)}"
        raise UserError(f"{path} holds {found}; give one file, or a folder of files of one kind")
    return Source(str(path), lambda: (row for file in files for row in _read_file(file)), tuple(files))


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path) -> Rows:
    suffix = _suffix(path)
    try:
        opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as file:
            if suffix == ".parquet":
                yield from _read_parquet(path, file)
            elif suffix in (".csv", ".tsv"):
                yield from _read_csv(path, file, "\t" if suffix == ".tsv" else ",")
            else:
                yield from _read_json(path, file)
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _read_json(path: Path, file: IO[bytes]) -> Rows:
    """Lines of objects, or one array of them."""
    blank = None  # the place of a blank line that is none at the end if another follows
    number = 0
    for raw in file:
        if number == 0:
            raw = raw.removeprefix(codecs.BOM_UTF8)  # some editors of Windows write it
            if raw.lstrip().startswith(b"["):
                yield from _read_array(path, raw + file.read())
                return
        for line in raw.splitlines():
            number += 1
            place = f"{path}:{number}"
            if not line.strip():
                blank = blank or place
                continue
            if blank:
                raise UserError(f"{blank}: a blank line; each line wants one JSON object")
            yield place, json_record(line, place)
    if number == 0 or blank == f"{path}:1":
        raise UserError(f"{path} is empty; it wants JSON objects, one a line or in one array")


def _read_array(path: Path, content: bytes) -> Rows:
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} begins as a JSON array and is none ({error})") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise UserError(f"{path}:1: a list, of which record {number} is {json_kind(value)}, not a JSON object")
        yield f"{path}, record {number}", value


def _read_csv(path: Path, file: IO[bytes], delimiter: str) -> Rows:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, None)
        if not names:
            raise UserError(f"{path} is empty; its first line wants the names of the columns")
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise UserError(f"{path}:1: two columns are called {doubled!r}; rename one")
        for cells in reader:
            place = f"{path}:{reader.line_num}"
            if len(cells) != len(names):
                raise UserError(
                    f"{place}: the row that ends here has {len(cells)} cells, the first line names {len(names)} "
                    f"columns; put a cell that holds {delimiter!r} or a line break in double quotes"
                )
            yield place, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: bytes that are no UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: no valid CSV ({error})") from error


def _read_parquet(path: Path, file: IO[bytes]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        zipped = path.name.lower().endswith(".gz")
        table = pyarrow.parquet.ParquetFile(BytesIO(file.read()) if zipped else file)
        batches = table.iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, record {number}", _known(row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file that can be read: {first_line(error)}") from error


def _known(row: Row) -> Row:
    """A row of a table without what it does not hold: there every column stands in every row."""
    return {name: value for name, value in row.items() if value is not None}


def _of_dataset(dataset: Any, name: str) -> Source:
    def rows() -> Rows:
        for number, row in enumerate(dataset, start=1):
            yield f"{name}, record {number}", _known(row)

    return Source(name, rows)


def _load_folder(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} holds no data set that can be read: {first_line(error)}") from error


def _from_hub(address: str, split: str) -> Any:
    """``owner/name[:config][@revision]``, through datasets: its cache is asked where the hub cannot be."""
    import datasets

    place, _, revision = address.partition("@")
    repo, _, config = place.partition(":")
    try:
        return datasets.load_dataset(repo, config or None, revision=revision or None, split=split)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        offline = isinstance(error, ConnectionError) or "offline" in str(error).lower()
        way = "download it where there is a connection, and give --raw the file" if offline else "is the name right?"
        raise UserError(f"{HUB}{address} could not be loaded ({first_line(error)}); {way}") from error


def _one_split(loaded: Any, split: str, name: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(map(str, loaded))}: give --split")
    return loaded[split]


def check_record(record: Mapping[str, Any], place: str, names: Mapping[str, str] | None = None) -> None:
    """Raise UserError unless the record holds an instruction, an optional input and a non-empty response.

    ``names`` says what the source calls a field, where that is something else.
    """
    for key, required in (("instruction", True), ("input", False), ("output", True)):
        name = (names or {}).get(key, key)
        if key not in record:
            if required:
                raise UserError(f"{place}: no field {name!r}; a record wants instruction, input and output")
            continue
        check_text(record[key], f"{place}: {name!r}", empty=not required)


def check_text(value: Any, what: str, *, empty: bool = False) -> str:
    """The value, if it is a text.  Raises UserError, which begins with ``what``, where it is none or, unless
    ``empty``, holds nothing but white space."""
    if not isinstance(value, str):
        raise UserError(f"{what} is {json_kind(value)}; it must be a string")
    if not empty and not value.strip():
        raise UserError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds a lone surrogate, which is no text") from error
    return value


def read_instructions(path: Path) -> list[dict[str, Any]]:
    """The checked records of a raw.jsonl, in the order of the file."""
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        check_record(record, f"{path}:{number}")
    return records
