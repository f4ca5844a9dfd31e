"""The notebook's code runs from top to bottom as it stands, and it keeps the outputs that it had when it was made."""

import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from tests.tiny import ROOT

PATH = ROOT / "examples" / "quickstart.ipynb"
CELLS: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_distils_a_student_that_answers_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PATH.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    matplotlib.use("Agg")
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in CODE), encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "cells.py"))
    before, after = (np.mean([score for score, _ in names[name].values()]) for name in ("before", "after"))
    assert after > before + 0.2
    assert names["steps"][-1]["temperature"] == 2 and names["steps"][-1]["pool"] == len(names["train"])
    shown = capsys.readouterr().out.split("wanted")
    assert len(shown) == 1 + 5
    assert not list(PATH.parent.glob("pocl-notebook-*"))


def test_the_notebook_keeps_its_outputs() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "".join(outputs[-1]["text"]).count("wanted") == 5
    assert str(ROOT) not in PATH.read_text(encoding="utf-8")


def test_the_notebook_tells_the_sizes_that_it_has() -> None:
    told = "".join(CELLS[0]["source"])
    lines = [line for cell in CODE for output in cell["outputs"] for line in output.get("text", [])]
    sizes = [line.split()[1] for line in lines if "parameters" in line]
    assert len(sizes) == 2 and all(size in told for size in sizes)
