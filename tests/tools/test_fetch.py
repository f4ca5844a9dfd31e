"""tools/fetch.py against a hub of local folders, and against no hub at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from pocl.common.files import read_jsonl
from pocl.evaluation.sets import load_set
from pocl.models.loading import load_model, load_tokenizer
from tests.runs import Result, call
from tests.tiny import ROOT
from tools import fetch


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


EXAMPLE = {"instruction": "Say hello.", "input": "", "output": "Hello.\u2028"}


@dataclass
class Hub:
    """Repositories as folders: root/<repository>/<file>. Calls are noted."""

    root: Path
    calls: list[tuple[str, str]] = field(default_factory=list)
    cut_off: bool = False  # downloads break after the first file

    def add_file(self, repo: str, name: str, text: str = "{}") -> Path:
        path = self.root / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def names(self, repo: str) -> list[str]:
        folder = self.root / repo
        if not folder.is_dir():
            raise OSError(f"404 Client Error: {repo}\nand more")
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def repo_info(self, repo: str, *, repo_type: str, revision: str | None = None) -> Any:
        self.calls.append((repo_type, f"{repo}@{revision or 'main'}"))
        return SimpleNamespace(sha="c0ffee" * 6, siblings=[SimpleNamespace(rfilename=n) for n in self.names(repo)])

    def hf_hub_download(self, repo: str, name: str, *, repo_type: str, revision: str) -> str:
        assert repo_type == "dataset" and revision == "c0ffee" * 6
        self.calls.append(("file", f"{repo}/{name}"))
        return str(self.root / repo / name)

    def snapshot_download(self, repo: str, *, revision: str, local_dir: Path, allow_patterns: Sequence[str]) -> str:
        assert revision == "c0ffee" * 6
        self.calls.append(("model", repo))
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        for name in self.names(repo):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / repo / name, local_dir / name)
                if self.cut_off:
                    raise OSError("connection reset")
        return str(local_dir)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def paper(hub: Hub) -> Hub:
    """The paper's five sets, one record each."""
    for repo, name in (
        ("MiniLLM/dolly", "raw.jsonl"),
        ("MiniLLM/dolly", "valid.jsonl"),
        ("MiniLLM/self-inst", "valid.jsonl"),
        ("MiniLLM/Vicuna", "valid.jsonl"),
        ("MiniLLM/sinst", "11_/valid.jsonl"),
        ("MiniLLM/uinst", "11_/valid.jsonl"),
    ):
        hub.add_file(repo, name, jsonl(EXAMPLE))
        hub.add_file(repo, "README.md", "about")
    return hub


def data(root: Path, *arguments: object) -> Result:
    return call(fetch, ["data", "--data-root", root, *arguments])


def models(root: Path, *arguments: object) -> Result:
    return call(fetch, ["models", "--checkpoints-root", root, *arguments])


# Data sets.


def test_data_comes_in_the_projects_layout(paper: Hub, tmp_path: Path) -> None:
    result = data(tmp_path / "data")
    assert result.status == 0, result.output
    files = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*.*"))
    assert files == [
        "dolly/raw.jsonl",
        "dolly/valid.jsonl",
        "self-inst/valid.jsonl",
        "sinst/11_/valid.jsonl",
        "uinst/11_/valid.jsonl",
        "vicuna/valid.jsonl",
    ]
    for name in ("dolly", "self-inst", "vicuna", "sinst", "uinst"):
        assert load_set(tmp_path / "data", name)[0].references == (EXAMPLE["output"],)


def test_data_is_copied_byte_for_byte(paper: Hub, tmp_path: Path) -> None:
    source = paper.add_file("MiniLLM/dolly", "raw.jsonl", '{"instruction": "é", "input":"",  "output": "ß\u2028"}')
    source.write_bytes(source.read_bytes() + b"\r\n")
    assert data(tmp_path / "data", "--sets", "dolly").status == 0
    assert (tmp_path / "data" / "dolly" / "raw.jsonl").read_bytes() == source.read_bytes()


def test_uinst_keeps_the_first_ten_thousand_in_their_order(paper: Hub, tmp_path: Path) -> None:
    paper.add_file("MiniLLM/uinst", "11_/valid.jsonl", jsonl(*({**EXAMPLE, "n": i} for i in range(10_005))))
    result = data(tmp_path / "data", "--sets", "uinst")
    records = read_jsonl(tmp_path / "data" / "uinst" / "11_" / "valid.jsonl")
    assert [record["n"] for record in records] == list(range(10_000))
    assert "note:" not in result.output


def test_a_set_of_another_size_is_noted(paper: Hub, tmp_path: Path) -> None:
    assert "1 records of MiniLLM/Vicuna/valid.jsonl (commit c0ffeec0ffee); note: the paper's has 80" in (
        data(tmp_path / "data", "--sets", "vicuna").output
    )


def test_long_references_are_chosen_among_lengths(paper: Hub, tmp_path: Path) -> None:
    paper.add_file("MiniLLM/sinst", "0_5/valid.jsonl", jsonl({**EXAMPLE, "output": "short"}))
    paper.add_file("MiniLLM/sinst", "valid.jsonl", jsonl({**EXAMPLE, "output": "all"}))
    assert data(tmp_path / "data", "--sets", "sinst").status == 0
    assert load_set(tmp_path / "data", "sinst")[0].references == (EXAMPLE["output"],)


def test_data_that_is_there_is_left_alone(paper: Hub, tmp_path: Path) -> None:
    mine = tmp_path / "data" / "dolly" / "raw.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    result = data(tmp_path / "data", "--sets", "dolly")
    assert f"{mine} is already there" in result.output
    assert mine.read_text() == "mine"
    assert ("file", "MiniLLM/dolly/raw.jsonl") not in paper.calls
    assert ("file", "MiniLLM/dolly/valid.jsonl") in paper.calls
    paper.calls.clear()
    assert data(tmp_path / "data", "--sets", "dolly").status == 0
    assert paper.calls == []


def test_a_damaged_file_of_the_hub_is_not_put_in_place(paper: Hub, tmp_path: Path) -> None:
    paper.add_file("MiniLLM/Vicuna", "valid.jsonl", jsonl(EXAMPLE) + "not json\n")
    result = data(tmp_path / "data", "--sets", "vicuna")
    assert result.status == 2
    assert "valid.jsonl:2: no valid JSON" in result.last_line
    assert not list((tmp_path / "data").rglob("*.*"))


def test_a_repository_without_the_file_says_what_it_has(paper: Hub, tmp_path: Path) -> None:
    (paper.root / "MiniLLM/Vicuna/valid.jsonl").rename(paper.root / "MiniLLM/Vicuna/test.jsonl")
    result = data(tmp_path / "data", "--sets", "vicuna")
    assert result.status == 2
    assert "no valid.jsonl among the JSONL files test.jsonl (MiniLLM/Vicuna)" in result.last_line


def test_one_missing_repository_does_not_hold_up_the_others(paper: Hub, tmp_path: Path) -> None:
    shutil.rmtree(paper.root / "MiniLLM" / "self-inst")
    result = data(tmp_path / "data")
    assert result.status == 2
    places = result.last_line.partition("by hand: ")[2]
    assert places.startswith(f"{tmp_path / 'data' / 'self-inst' / 'valid.jsonl'} (data/README.md")
    assert "404 Client Error: MiniLLM/self-inst (MiniLLM/self-inst)" in result.last_line
    assert (tmp_path / "data" / "uinst" / "11_" / "valid.jsonl").is_file()


# Models.


@pytest.fixture
def gpt2(hub: Hub, gpt2_dir: Path) -> Hub:
    """The repository of gpt2: a real tiny model among what such repositories hold."""
    repo = "openai-community/gpt2"
    shutil.copytree(gpt2_dir, hub.root / repo)
    for name in (
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "pytorch_model.bin.index.json",
        "modeling_gpt2.py",
        "64.tflite",
        "onnx/config.json",
        "onnx/model.safetensors",
        "model.fp16.safetensors",
        "merges.txt",
        "README.md",
        ".gitattributes",
    ):
        hub.add_file(repo, name)
    return hub


def test_a_model_comes_as_a_folder_that_loads(gpt2: Hub, gpt2_dir: Path, tmp_path: Path) -> None:
    result = models(tmp_path / "checkpoints", "--names", "gpt2")
    assert result.status == 0, result.output
    folder = tmp_path / "checkpoints" / "gpt2" / "base"
    assert {path.name for path in folder.iterdir()} == {path.name for path in gpt2_dir.iterdir()} | {"merges.txt"}
    assert [path.name for path in folder.parent.iterdir()] == ["base"]
    assert load_model(str(folder)).config.model_type == "gpt2"
    assert load_tokenizer(str(folder)).eos_token_id is not None


def test_sharded_weights_come_with_their_index() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names += ["model.safetensors.index.json", "tokenizer.model", "chat_template.jinja"]
    assert fetch.model_files([*names, "a.bin.index.json", "a.py", "x/config.json"]) == names


def test_a_model_that_is_there_is_left_alone(gpt2: Hub, tmp_path: Path) -> None:
    assert models(tmp_path, "--names", "gpt2").status == 0
    gpt2.calls.clear()
    result = models(tmp_path, "--names", "gpt2")
    assert (result.status, gpt2.calls) == (0, [])
    assert result.last_line == f"{tmp_path / 'gpt2' / 'base'} is already there"


def test_pickled_weights_are_refused(gpt2: Hub, tmp_path: Path) -> None:
    (gpt2.root / "openai-community/gpt2/model.safetensors").unlink()
    result = models(tmp_path, "--names", "gpt2")
    assert result.status == 2
    assert "openai-community/gpt2 has no safetensors, only pickled weights (pytorch_model.bin)" in result.last_line
    assert ("model", "openai-community/gpt2") not in gpt2.calls
    assert not (tmp_path / "gpt2").exists()


def test_another_revision_can_be_asked_for(gpt2: Hub, tmp_path: Path) -> None:
    assert models(tmp_path, "--names", "gpt2", "--revision", "refs/pr/7").status == 0
    assert gpt2.calls[0] == ("model", "openai-community/gpt2@refs/pr/7")
    result = models(tmp_path, "--names", "gpt2", "gpt2-xl", "--revision", "main")
    assert (result.status, result.last_line) == (2, "error: --revision belongs to one repository, --names has 2")


def test_a_download_that_breaks_leaves_no_model(gpt2: Hub, tmp_path: Path) -> None:
    gpt2.cut_off = True
    result = models(tmp_path, "--names", "gpt2")
    assert result.status == 2
    assert "connection reset (openai-community/gpt2)" in result.last_line
    assert not (tmp_path / "gpt2" / "base").exists()
    gpt2.cut_off = False
    assert models(tmp_path, "--names", "gpt2").status == 0
    assert [path.name for path in (tmp_path / "gpt2").iterdir()] == ["base"]


def test_a_folder_that_is_no_model_is_not_overwritten(gpt2: Hub, tmp_path: Path) -> None:
    notes = tmp_path / "gpt2" / "base" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    result = models(tmp_path, "--names", "gpt2")
    assert result.status == 2
    assert "holds something that is no whole model" in result.last_line
    assert notes.read_text() == "mine"


def test_a_full_disk_is_told_from_a_missing_network(
    gpt2: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    result = models(tmp_path, "--names", "gpt2")
    assert result.status == 2
    assert result.last_line == "error: cannot write what the hub gives: [Errno 28] No space left on device"


def test_default_models_are_those_of_the_main_table(gpt2: Hub, tmp_path: Path) -> None:
    gpt2.add_file("MiniLLM/teacher-gpt2-1.5B", "config.json")
    gpt2.add_file("MiniLLM/teacher-gpt2-1.5B", "model.safetensors")
    assert models(tmp_path).status == 0
    assert {path.name for path in (tmp_path / "gpt2").iterdir()} == {"base", "teacher-1.5B"}


# The command line, and no hub.


PLACES = [
    "data/dolly/raw.jsonl",
    "data/dolly/valid.jsonl",
    "data/self-inst/valid.jsonl",
    "data/vicuna/valid.jsonl",
    "data/sinst/11_/valid.jsonl",
    "data/uinst/11_/valid.jsonl",
]


def test_offline_it_says_what_to_place_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = call(fetch, ["data"])
    assert result.status == 2
    assert "offline mode is on, HF_HUB_OFFLINE (MiniLLM/dolly, MiniLLM/self-inst, " in result.last_line
    assert f"by hand: {', '.join(PLACES)} (data/README.md says what a line holds)" in result.last_line
    result = call(fetch, ["models"])
    assert result.status == 2
    assert "checkpoints/gpt2/base, checkpoints/gpt2/teacher-1.5B (each a folder of config.json" in result.last_line
    assert list(tmp_path.iterdir()) == []


def test_a_hub_out_of_reach_is_told_the_same_way(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fetch.py"), "data"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Connection refused" in line
    assert f"by hand: {', '.join(PLACES)} (" in line
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to fetch: data, models or list (--help explains)"),
        (["dat"], "say what to fetch: data, models or list; got 'dat'; did you mean 'data'? (--help explains)"),
        (["data", "--sets", "doly"], "unknown --sets 'doly'; did you mean 'dolly'?"),
        (["models", "--names", "gpt2-xxl"], "unknown --names 'gpt2-xxl'; did you mean 'gpt2-xl'?"),
        (["data", "--set", "dolly"], "unknown argument '--set'; did you mean '--sets'?"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = call(fetch, arguments)
    assert result.status == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"error: {message}")


def test_the_list_says_what_is_there(gpt2: Hub, tmp_path: Path) -> None:
    assert models(tmp_path / "checkpoints", "--names", "gpt2").status == 0
    result = call(fetch, ["list", "--checkpoints-root", tmp_path / "checkpoints", "--data-root", tmp_path / "data"])
    assert result.status == 0
    lines = result.output.splitlines()
    assert len(lines) == 6 + len(fetch.MODELS)
    assert [line.split()[2] for line in lines if line.startswith("there")] == ["gpt2"]


def test_help_shows_the_commands() -> None:
    result = call(fetch, ["--help"])
    assert result.status == 0
    assert "python tools/fetch.py data" in result.output
