"""Version, citation, workflows and issue templates say what the code says."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import pocl
from tests.tiny import ROOT

YAML = sorted([*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"])


def loaded(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_one_version_stands_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    latest = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    assert {pocl.__version__, project["version"], loaded("CITATION.cff")["version"], latest} == {pocl.__version__}


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_what_others_read_is_valid(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_ci_runs_the_oldest_and_the_newest_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    job = loaded(".github/workflows/tests.yml")["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert job["steps"][-1]["run"] == "bash scripts/test.sh"
    assert loaded(".github/workflows/docs.yml")["jobs"]["docs"]["steps"][-2]["run"] == "mkdocs build --strict"


@pytest.mark.parametrize("name", ["run", "numbers"])
def test_who_reports_a_run_is_asked_for_its_files(name: str) -> None:
    asked = " ".join(part["attributes"]["label"] for part in loaded(f".github/ISSUE_TEMPLATE/{name}.yml")["body"])
    assert "config.json" in asked and "ledger.json" in asked


def test_the_hooks_run_what_the_test_script_runs() -> None:
    entries = [hook["entry"] for hook in loaded(".pre-commit-config.yaml")["repos"][0]["hooks"]]
    script = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    for words in ("ruff check", "ruff format", "mypy"):
        assert any(words in entry for entry in entries) and words in script
