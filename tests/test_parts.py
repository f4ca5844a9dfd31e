"""Work done block by block goes on where it was cut off."""

from pathlib import Path

from pocl.parts import Parts


def test_records_of_an_interrupted_pass_are_there_again(tmp_path: Path) -> None:
    with Parts(tmp_path / "p", {"a": 1}) as parts:
        assert parts.records == {}
        parts.append([{"id": 3, "x": "naïve"}, {"id": 1, "x": "b"}])
    with Parts(tmp_path / "p", {"a": 1}) as parts:
        assert parts.records == {3: {"id": 3, "x": "naïve"}, 1: {"id": 1, "x": "b"}}
        assert list(parts.gather()) == [1, 3]


def test_parts_of_another_key_are_dropped(tmp_path: Path) -> None:
    with Parts(tmp_path / "p", {"a": 1}) as parts:
        parts.append([{"id": 1}])
    with Parts(tmp_path / "p", {"a": 2}) as parts:
        assert parts.records == {}


def test_a_line_that_a_crash_cut_is_forgotten_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    with Parts(tmp_path / "p", {}) as parts:
        parts.append([{"id": 1}, {"id": 2}])
    path = tmp_path / "p" / "0.jsonl"
    path.write_text(path.read_text()[:-4])
    with Parts(tmp_path / "p", {}) as parts:
        assert set(parts.records) == {1}
        parts.append([{"id": 7}])
    with Parts(tmp_path / "p", {}) as parts:
        assert set(parts.records) == {1, 7}
