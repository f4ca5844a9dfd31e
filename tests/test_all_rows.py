"""Rows of the main table, from data to numbers, on a tiny pair; POCL_ALL_ROWS=1 takes all seventeen (minutes more)."""

import json
import os
import subprocess
from pathlib import Path

from tests.test_reproduce import PAPER
from tests.tiny import ROOT
from tools.rows import main_rows

# One row of every script, with POCL and without.
SOME = ["teacher", "SFT", "SeqKD", "KLD", "KLD + POCL", "GKD", "GKD + POCL"]


def test_rows_from_data_to_numbers(tmp_path: Path) -> None:
    wanted = PAPER if os.environ.get("POCL_ALL_ROWS") == "1" else SOME
    environment = {name: value for name, value in os.environ.items() if name not in ("DATA", "TEACHER", "STUDENT")}
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "tiny_table.sh"), str(tmp_path), "--rows", *wanted],
        capture_output=True,
        text=True,
        env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    table = (tmp_path / "results" / "gpt2" / "table-main.md").read_text().split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == wanted
    assert all(float(row[1].split("<br>")[0]) >= 0 for row in rows)
    for row in (row for row in main_rows(matched=False) if row.name in wanted):
        run_folder = tmp_path / "results" / "gpt2" / row.run / "seed10"
        assert json.loads((run_folder / "ledger.json").read_text())["finished"]
        assert len((run_folder / "eval" / "sample" / "1.jsonl").read_text().splitlines()) == 4
