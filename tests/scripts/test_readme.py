"""What the README and the pages beside it tell people to type exists, and takes the flags that it is given."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest

import pocl
from pocl.cli.checks import parse_train
from tests.runs import call
from tests.scripts.test_scripts import planned
from tests.tiny import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data/README.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
SETS = re.compile(r"[A-Z_]+=\S*")  # NAME=value in front of a command
SCRIPTS = [command for command in COMMANDS if command[0] == "bash" or SETS.fullmatch(command[0])]
SITE = (ROOT / "tools" / "site_hook.py").read_text(encoding="utf-8")  # what of the repository the site holds
# What installs or runs everything is tried by hand and by CI; here it is only parsed.
HEAVY = {"install.sh", "scripts/quickstart.sh", "scripts/test.sh", "scripts/tiny_table.sh"}


def test_the_readme_shows_its_two_commands_first() -> None:
    assert [command[:2] for command in COMMANDS[:2]] == [
        ["bash", "scripts/quickstart.sh"],
        ["bash", "scripts/test.sh"],
    ]


@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_a_script_of_the_readme_runs_dry(command: list[str], tmp_path: Path) -> None:
    environment = dict(word.split("=", 1) for word in takewhile(SETS.fullmatch, command))
    command = command[len(environment) :]
    script = ROOT / command[1]
    subprocess.run(["bash", "-n", str(script)], check=True)
    if command[1] in HEAVY:
        return
    done = planned(script, *command[2:], cwd=tmp_path, DRY_RUN="1", **environment)
    assert done.status == 0, done.output
    assert ".py" in done.output or "/scripts/" in done.output  # a table's steps are scripts


def test_every_other_command_of_a_page_is_known_to_be_there() -> None:
    others = [command for command in COMMANDS if command[0] != "python" and command not in SCRIPTS]
    assert {command[0] for command in others} <= {"pip", "sbatch"}
    for command in others:
        if command[0] == "sbatch":
            assert all((ROOT / word).is_file() for word in command[1:] if word.startswith("scripts/"))


def test_the_configuration_of_its_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    found = parse_train(["--config", str(tmp_path / "run.yaml"), "--lr", "5e-5"])
    assert (found.loss.type, found.loss.kd_ratio, found.optimiser.lr) == ("tfkl", [0.7, 0.8, 0.9, 1.0], 5e-5)


@pytest.mark.parametrize("block", re.findall(r"```json\n(.*?)```", TEXT, flags=re.DOTALL))
def test_records_of_a_page_can_be_read(block: str, tmp_path: Path) -> None:
    for line in block.splitlines():
        (tmp_path / "raw.jsonl").write_text(line, encoding="utf-8")
        assert len(pocl.load_records(tmp_path / "raw.jsonl")) == 1


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "python"], ids=" ".join)
def test_a_tool_of_the_readme_knows_its_flags(command: list[str]) -> None:
    for word in command[2:]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", help_of(command[1])), f"{command[1]} has no flag {word}"


@cache
def help_of(program: str) -> str:
    """What a program's --help prints."""
    result = call(import_module(program.removesuffix(".py").replace("/", ".")), ["--help"])
    assert result.status == 0, result.output
    return result.output


PYTHON = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"(?<!hub -->\n)```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("text", PYTHON)
def test_a_python_block_runs(text: str, tmp_path: Path) -> None:
    """But for those that a comment, <!-- needs a hub -->, marks."""
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    runpy.run_path(str(tmp_path / "example.py"))


def test_the_library_as_the_readme_shows_it_ranks_and_schedules(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ((text, order),) = re.findall(
        r"```python\n((?:(?!```).)*?easiest first: (.*?)\n.*?)```", PAGES[0].read_text(), flags=re.DOTALL
    )
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    runpy.run_path(str(tmp_path / "example.py"))
    first, *steps = capsys.readouterr().out.splitlines()
    assert first == order and json.loads(order)
    # (step, stage, temperature, KD ratio): two examples a step, of a pool of two and then of all four
    shown = [tuple(map(float, line.split()[:4])) for line in steps]
    assert shown == [(0, 0, 1, 0.7), (1, 1, 2, 1), (2, 1, 2, 1)]


# One process for all of them, where each starts as `python FILE --help` does: its own folder comes first.
HELP = """
import contextlib, os, runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path)
    with contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
"""


def test_every_program_starts_from_anywhere(tmp_path: Path) -> None:
    programs = [ROOT / "train.py", ROOT / "evaluate.py", *sorted((ROOT / "tools").glob("*.py"))]
    programs = [path for path in programs if "__main__" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-c", HELP, *map(str, programs)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") >= len(programs) - 1  # fetch.py's help is its own text


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:pocl|scripts|tools|tests|data)/[\w./-]+)", TEXT))))
def test_a_path_that_the_readme_names_exists(path: str) -> None:
    if not path.startswith(("data/dolly", "data/NAME")):  # the reader places that one
        assert (ROOT / path.rstrip(":")).exists()


@pytest.mark.parametrize(("path", "name"), re.findall(r"`((?:pocl/\w+|evaluate|train)\.py): ([\w.]+)`", TEXT))
def test_a_function_that_the_readme_names_is_in_its_file(path: str, name: str) -> None:
    assert re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b", (ROOT / path).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (page.parent / path).is_file(), target
        assert page.parent.name != "docs" or not path.startswith("../") or f'"{path[3:]}"' in SITE, target
        assert not anchor or path or anchor in anchors, target


def test_the_first_page_and_the_sites_menu_lead_to_every_page() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    first = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    menu = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert (first | {"index.md"}, menu) == (pages, pages)
