"""Work done block by block goes on where it was cut off."""

from pathlib import Path

import numpy as np
import pytest

from pocl.common.errors import RunStopped
from pocl.common.resumable_pass import ResumablePass


def test_records_of_an_interrupted_pass_are_there_again(tmp_path: Path) -> None:
    with ResumablePass(tmp_path / "p", {"a": 1}) as parts:
        assert parts.records == {}
        parts.append([{"id": 3, "x": "naïve"}, {"id": 1, "x": "b"}])
    with ResumablePass(tmp_path / "p", {"a": 1}) as parts:
        assert parts.records == {3: {"id": 3, "x": "naïve"}, 1: {"id": 1, "x": "b"}}


def test_every_example_has_a_record_in_the_end(tmp_path: Path) -> None:
    blocks, ids = [np.array([0, 1]), np.array([2])], np.array([7, 3, 5])

    def work(block: np.ndarray) -> list[dict[str, int]]:
        return [{"id": int(ids[i]), "square": int(ids[i]) ** 2} for i in block]

    with ResumablePass(tmp_path / "p", {}) as parts:
        parts.append([{"id": 5, "square": 0}])  # done before
        assert [record["square"] for record in parts.fill(blocks, ids, work, title="t").values()] == [9, 0, 49]
    with (
        ResumablePass(tmp_path / "q", {}) as parts,
        pytest.raises(RunStopped, match="t: 1 of 3 examples were left out"),
    ):
        parts.fill(blocks[:1], ids, work, title="t")


def test_parts_of_another_key_are_dropped(tmp_path: Path) -> None:
    with ResumablePass(tmp_path / "p", {"a": 1}) as parts:
        parts.append([{"id": 1}])
    with ResumablePass(tmp_path / "p", {"a": 2}) as parts:
        assert parts.records == {}


def test_a_line_that_a_crash_cut_is_forgotten_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    with ResumablePass(tmp_path / "p", {}) as parts:
        parts.append([{"id": 1}, {"id": 2}])
    path = tmp_path / "p" / "0.jsonl"
    path.write_text(path.read_text()[:-4])
    with ResumablePass(tmp_path / "p", {}) as parts:
        assert set(parts.records) == {1}
        parts.append([{"id": 7}])
    with ResumablePass(tmp_path / "p", {}) as parts:
        assert set(parts.records) == {1, 7}


def test_without_a_folder_the_work_is_done_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ResumablePass(None, {"a": 1}) as parts:
        found = parts.fill([np.array([1, 0])], np.array([4, 2]), lambda _: [{"id": 2}, {"id": 4}], title="t")
    assert found == {2: {"id": 2}, 4: {"id": 4}}
    assert list(tmp_path.iterdir()) == []
