"""The house: rooms stand on floors, imports run down only and load little, and some calls are made nowhere."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = {
    path.relative_to(ROOT / "pocl").with_suffix("").as_posix().replace("/", "."): path
    for path in sorted((ROOT / "pocl").rglob("*.py"))
    if path.stem != "__init__"
}
SOURCES = sorted(
    [
        *ROOT.glob("*.py"),
        *(path for folder in ("pocl", "tools", "tests", "scripts") for path in ROOT.glob(f"{folder}/**/*.py")),
    ]
)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def rooms() -> dict[str, str]:
    """Each room of the package with its line: the first of its docstring."""
    folders = [path for path in sorted((ROOT / "pocl").iterdir()) if (path / "__init__.py").is_file()]
    return {path.name: (ast.get_docstring(parsed(path / "__init__.py")) or "").split("\n")[0] for path in folders}


def room(name: str) -> str:
    """The room of a module."""
    return name.split(".")[0]


def floors() -> dict[str, int]:
    """The floor of each room: one above the highest that its files import from, 1 for those that import no other."""
    below = {name: set() for name in rooms()}
    for name in PACKAGE:
        below[room(name)] |= {room(other) for other in neighbours(name)} - {room(name)}
    found: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():  # raises CycleError, which names the cycle
        found[name] = 1 + max((found[other] for other in below[name]), default=0)
    return found


@cache
def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it; ``from a import b`` counts as a and a.b."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def neighbours(name: str) -> set[str]:
    """The modules of the package that one of them imports."""
    return {other for other in PACKAGE if f"pocl.{other}" in imported(PACKAGE[name])}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name that is called."""
    return [(ast.unparse(node.func), node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]


def test_the_house_has_at_most_twelve_rooms_and_each_says_what_it_is_for() -> None:
    top = {path.name for path in (ROOT / "pocl").iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert len(top) <= 12
    assert {path.split(".")[0] for path in PACKAGE} == set(rooms())  # no file lies between the rooms
    assert all(len(line) > 20 for line in rooms().values())


def test_no_room_imports_from_one_above_it() -> None:
    found = floors()
    order = ["common", "curriculum", "losses", "models", "generation", "evaluation", "difficulty", "training", "cli"]
    assert [found[name] for name in order] == sorted(found[name] for name in order)
    assert found["common"] == 1 and found["cli"] == max(found.values())


def test_imports_have_no_cycle() -> None:
    graph = {name: neighbours(name) for name in PACKAGE}
    assert sum(len(others) for others in graph.values()) > len(PACKAGE)  # else nothing was parsed
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert sorted(order) == sorted(PACKAGE)


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_imports_no_script_and_no_test(name: str) -> None:
    above = {path.stem for path in ROOT.glob("*.py")} | {"tools", "tests", "scripts"}
    assert not {module.split(".")[0] for module in imported(PACKAGE[name])} & above


def test_options_end_at_the_door() -> None:
    users = {path.relative_to(ROOT).parts[:2] for path in SOURCES if "pocl.cli.options.TrainConfig" in imported(path)}
    assert users <= {("pocl", "cli"), ("train.py",)}


@pytest.mark.parametrize("name", sorted({*PACKAGE} - {"losses.kernel"}))  # a GPU kernel takes its pointers one by one
def test_no_function_takes_more_than_seven_arguments(name: str) -> None:
    for node in ast.walk(parsed(PACKAGE[name])):
        if isinstance(node, ast.FunctionDef):
            given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([name for name in given if name not in ("self", "cls")]) <= 7, node.name


def test_only_the_engine_knows_deepspeed() -> None:
    users = {name for name, path in PACKAGE.items() if any(m.split(".")[0] == "deepspeed" for m in imported(path))}
    assert users == {"training.engine"}


# What a fresh interpreter has loaded after an import, of what takes long or that not everybody has.
HEAVY = ("torch", "transformers", "datasets", "pandas", "peft", "scipy", "deepspeed", "vllm", "trl", "accelerate")
MAY_LOAD = {
    "pocl": (),
    "pocl.curriculum": (),
    "pocl.difficulty.ranking": (),
    "pocl.evaluation.metrics": ("scipy",),  # by way of nltk
    "pocl.losses": ("torch",),
}


@pytest.mark.parametrize("module", MAY_LOAD)
def test_an_import_loads_no_more_than_it_needs(module: str) -> None:
    program = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(MAY_LOAD[module])


def test_importing_the_models_registers_nothing_in_transformers() -> None:
    modules = ", ".join(f"pocl.{name}" for name in PACKAGE if name.startswith("models."))
    program = f"import {modules}; import transformers; print(*transformers.AttentionInterface().valid_keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "sdpa" in done.stdout.split() and "by_example" not in done.stdout.split()


def test_the_package_imports_in_a_fifth_of_a_second() -> None:
    program = "import time; start = time.perf_counter(); import pocl; print(time.perf_counter() - start)"
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT) for _ in range(3)
    ]
    assert min(float(done.stdout) for done in runs) < 0.2


@pytest.mark.parametrize("name", PACKAGE)
def test_only_the_process_calls_print(name: str) -> None:
    printing = any(called == "print" for called, _ in calls(PACKAGE[name]))
    assert printing == (name == "cli.process")


def test_the_sources_are_found() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {
        "train.py",
        "evaluate.py",
        "pocl/losses/divergences.py",
        "tools/process_data.py",
        "tests/test_house.py",
    } <= found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_bare_except(path: Path) -> None:
    handlers = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if handler.type is None] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled(path: Path) -> None:
    roots = {module.split(".")[0] for module in imported(path)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for called, node in calls(path):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load":
            assert options.get("weights_only") == "True", f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert options.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_strangers_code_and_no_shell_runs(path: Path) -> None:
    for called, node in calls(path):
        assert called not in ("eval", "exec", "os.system", "os.popen", "__import__"), f"line {node.lineno}"
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "shell"):
                assert ast.unparse(keyword.value) == "False", f"line {node.lineno}"


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-vllm.txt"])
def test_every_requirement_is_pinned(name: str) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line and not line.startswith("-r ")]
    free = ['triton; platform_system == "Linux"']  # torch's CUDA build pins it
    assert wanted and all(line in free or re.fullmatch(r"[\w.\[\]-]+==[\w.]+", line) for line in wanted)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("scripts/**/*.s[bh]*")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_script_runs_text_that_it_was_given(path: Path) -> None:
    assert not re.search(r"(?m)(^|[;&|(])\s*eval\s|\b(ba)?sh -c\b|\|\s*(ba)?sh\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PACKAGE)
def test_every_module_and_public_name_has_a_docstring(name: str) -> None:
    module = parsed(PACKAGE[name])
    assert ast.get_docstring(module)
    named = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in module.body if isinstance(node, named) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
