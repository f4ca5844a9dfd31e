"""What a table needs and does not find: data, evaluation sets and models, each with the command that brings it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pocl.common.files import ROOT
from tools import fetch, fetch_summaries
from tools.reproducing.steps import Reproduction, Step
from tools.rows import TEACHER


def what_is_missing(work: Reproduction, steps: Sequence[Step]) -> list[str]:
    """A sentence for each thing without which the steps that are not done would fail, in the order of the steps."""
    to_do = [step for step in steps if not step.is_done()]
    names, trained = {step.name for step in to_do}, {step.script for step in to_do if step.name == "train"}
    teacher = work.training(TEACHER).script
    found = missing_data(work, raw="data" in names, sets="evaluate" in names)
    if not work.scale.quickstart_pair and ("data" in names or trained - {teacher}):
        found += missing_model(work, "student", work.what.student)
    if teacher in trained:
        found += missing_teacher(work)
    return found + foreign_answers(to_do)


def missing_data(work: Reproduction, *, raw: bool, sets: bool) -> list[str]:
    """The raw.jsonl that is processed and the valid.jsonl of each evaluation set, where they are needed."""
    root = work.base / "data"
    wanted = [(work.data, root / work.data / "raw.jsonl")] if raw else []
    wanted += [(name, set_file(root, name)) for name in work.sets] if sets else []
    lacking = [(name, path) for name, path in wanted if not path.is_file()]
    fetched = " ".join(dict.fromkeys(name for name, _ in lacking if name in fetch.SETS))
    of_paper = f"bring it: python tools/fetch.py data --sets {fetched}{place('--data-root', root, 'data')}"
    paths: dict[str, list[str]] = {}
    for name, path in lacking:
        way = of_paper if name in fetch.SETS else how_to_make(name, root)
        paths.setdefault(way, []).append(str(path))
    return [f"no {', '.join(of_way)} ({way})" for way, of_way in paths.items()]


def set_file(root: Path, name: str) -> Path:
    """The valid.jsonl of an evaluation set."""
    known = [file.path for file in fetch.SETS.get(name, ()) if file.path.endswith("valid.jsonl")]
    return root / (known[0] if known else f"{name}/valid.jsonl")


def how_to_make(name: str, root: Path) -> str:
    """What brings data that tools/fetch.py does not know."""
    if name in fetch_summaries.SETS:
        return f"bring it: python tools/fetch_summaries.py --set {name}{place('--data-root', root, 'data')}"
    if (ROOT / "data" / name).is_dir() and root != ROOT / "data":
        return f"bring it: cp -r {ROOT / 'data' / name} {root}/"
    return "data/README.md says what a line of it holds"


def missing_model(work: Reproduction, role: str, path: str | None) -> list[str]:
    """The folder of a model; what may be a name on the hub is not looked for."""
    if path is None or Path(path).is_dir() or may_be_on_the_hub(path):
        return []
    return [f"no {role} in {path}{how_to_fetch(work, [path])}"]


def missing_teacher(work: Reproduction) -> list[str]:
    """A teacher that was named and is not there, or else the model that the teacher is fine-tuned from."""
    named = os.environ.get("TEACHER")
    if named and named == work.what.teacher and Path(named).resolve() != work.teacher.resolve():
        return [f"TEACHER={named} is no folder (without it, the teacher is fine-tuned from {work.what.teacher_base})"]
    base = missing_model(work, "model to fine-tune into the teacher", work.what.teacher_base)
    usual = how_to_fetch(work, [work.what.teacher])
    return [f"{sentence}, nor a teacher in {work.what.teacher}{usual}" if usual else sentence for sentence in base]


def may_be_on_the_hub(path: str) -> bool:
    """Whether it has the form of a name on the hub, as pocl/models/loading.py sees it."""
    return not (Path(path).is_absolute() or path.startswith((".", "~")) or len(Path(path).parts) > 2)


def how_to_fetch(work: Reproduction, paths: Iterable[str]) -> str:
    """The command that brings the models that belong to these paths, in brackets; empty where there is none."""
    root, wanted = work.base / "checkpoints", {Path(path).resolve() for path in paths}
    names = [name for name, model in fetch.MODELS.items() if (root / model.path).resolve() in wanted]
    if not names:
        return ""
    command = f"python tools/fetch.py models --names {' '.join(names)}"
    return f" (bring it: {command}{place('--checkpoints-root', root, 'checkpoints')})"


def place(flag: str, folder: Path, usual: str) -> str:
    """The flag that names a folder, where it is not the usual one of the project."""
    return "" if folder == ROOT / usual else f" {flag} {folder}"


def foreign_answers(to_do: Iterable[Step]) -> list[str]:
    """Answers that another command made: seqkd/generate.sh refuses them."""
    return [
        f"{step.made.parent} holds the answers of another command, perhaps of another teacher; delete it, and they "
        f"are made again"
        for step in to_do
        if step.name == "teacher text" and step.made is not None and step.made.is_file()
    ]
