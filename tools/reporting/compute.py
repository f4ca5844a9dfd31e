"""What the rows of a table cost, by the ledgers of their runs: the terms of a fair comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pocl.common.files import read_json

COLUMNS = ("row", "updates", "batch", "examples", "tokens", "ranked by the student", "read by the teacher")
_NAMES = ("optimizer_steps", "global_batch_size", "samples", "tokens", "ranking_passes", "teacher_forward_passes")


def ledger_of(folder: Path) -> dict[str, int] | None:
    """The ledger of a run, by its folder or its eval/; None where there is none."""
    for place in (folder, folder.parent) if folder.name == "eval" else (folder,):
        if (place / "ledger.json").is_file():
            return read_json(place / "ledger.json")
    return None


def compute_rows(rows: Mapping[str, Path | Sequence[Path]]) -> list[list[str]]:
    """The cells under ``COLUMNS`` of the rows with a ledger, of their first run; a dash for what it does not say."""
    found = {name: ledger_of(given if isinstance(given, Path) else given[0]) for name, given in rows.items()}
    return [
        [name, *(f"{ledger[key]:,}" if key in ledger else "–" for key in _NAMES)]
        for name, ledger in found.items()
        if ledger and "optimizer_steps" in ledger
    ]
