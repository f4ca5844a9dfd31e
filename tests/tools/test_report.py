"""The report: what stands in it against the files that it was made of; what it does where files are missing."""

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import evaluate
import train
from pocl.cli import checks as options
from pocl.cli.evaluate_options import EvaluateOptions, GenerationOptions
from pocl.cli.flags import parse
from pocl.common.files import read_json, read_jsonl, write_json, write_jsonl
from pocl.training.run_folder import RunFolder
from tests.runs import Folders, Result, call, train_arguments
from tools import report
from tools.reporting import page as pages
from tools.reporting import panels
from tools.reporting.commands import evaluate_commands, train_command
from tools.reporting.data import Ranking, open_entry
from tools.reporting.drawings import SHEET, STYLE, Drawing, Panel, curve, drawing, finish, number, thin

EVIL = "<script>window.bad = 1</script>\"'><img src=x onerror=window.bad=1>&amp;"
VOID = {"meta", "br", "wbr", "img", "input", "link"}


class Tree(HTMLParser):
    """The elements of a page: (path of tags, attributes, own text). Complains where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[tuple[str, ...], dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        assert not self._open, "a tag was not closed"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        path = (*(self.elements[i][0][-1] for i in self._open), name)
        self.elements.append((path, dict(attributes), []))
        if name not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, name: str) -> None:
        assert self.elements[self._open[-1]][0][-1] == name, f"{name} closes {self.elements[self._open[-1]][0]}"
        self._open.pop()

    def handle_data(self, text: str) -> None:
        for i in self._open:
            self.elements[i][2].append(text)

    def all(self, name: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        """(attributes, text) of every element of this tag with these attributes (``class_`` is one of the classes)."""
        found = []
        for path, attributes, words in self.elements:
            classes = str(attributes.get("class", "")).split()
            given = {key: value for key, value in wanted.items() if key != "class_"}
            fits = all(attributes.get(key.replace("_", "-")) == value for key, value in given.items())
            if path[-1] == name and fits and wanted.get("class_") in (None, *classes):
                found.append((attributes, "".join(words)))
        return found

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the table with this caption, head first."""
        start = next(i for i, (path, _, w) in enumerate(self.elements) if path[-1] == "caption" and w == [caption])
        depth, rows = len(self.elements[start][0]), []
        for path, _, words in self.elements[start + 1 :]:
            if len(path) < depth:
                break
            if path[-1] == "tr":
                rows.append([])
            elif path[-1] in ("th", "td"):
                rows[-1].append("".join(words))
        return rows


@pytest.fixture(scope="module")
def run(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ranked twice, asked its quarters and was evaluated. Read only."""
    output = tmp_path_factory.mktemp("runs") / "gpt2" / "pocl"
    more = ["--type", "tfkl", "--bucket-examples", 2, "--rerank", "stage", "--num-stages", 2]
    result = call(train, train_arguments(folders, output, *more))
    assert result.status == 0, result.output
    place = output / "tfkl" / "seed10"
    limits = ["--max-length", 192, "--max-prompt-length", 160, "--data-root", folders.data_root, "--top-k", 50]
    result = call(evaluate, ["--model", place / "best", "--sets", "short", "--seeds", 1, 2, *limits])
    assert result.status == 0, result.output
    return place


def without_drawings() -> contextlib.AbstractContextManager[Any]:
    """They take most of a page's time; for tests that do not look at them."""
    return mock.patch.dict(pages.template().globals, drawing=lambda panel, name: Drawing("", "{}"))


def written(output: Path, *arguments: object, drawn: bool = True) -> str:
    """The page that a command writes."""
    with contextlib.nullcontext() if drawn else without_drawings():
        result = call(report, [*arguments, "--output", output])
    assert result.status == 0, result.output
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(run: Path, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    output = tmp_path_factory.mktemp("page") / "report.html"
    return Tree(written(output, "--run", run, "--data-root", folders.data_root))


def part_of(run: Path, target: Path, *without: str) -> Path:
    """A copy of a run folder without some of its files and without what a report does not read."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints", "best", "tensorboard", *without))
    return target


def drawn_axes(*lines: list[tuple[float, float]]) -> Axes:
    """Axes with curves, as a panel has them."""
    with matplotlib.rc_context(STYLE):
        axes = Figure().add_subplot()
        for line in lines:
            curve(axes, [np.array(line, dtype=float)], "s1")
        finish(axes, "x")
        return axes


def test_text_in_a_drawing_is_escaped_wherever_it_stands() -> None:
    evil = EVIL + "$\\frac$"  # and no formula
    records = [{"id": i, "prompt_tokens": 1 + i, "response_tokens": 2 - i, "category": evil} for i in range(2)]
    categories = drawing(panels.ranking(Ranking("difficulty", records))[-1], "x")
    curves = drawing(Panel(evil, "", lambda axes: curve(axes, [np.ones((2, 2))], "s1", name=evil)), "x")
    for made in (categories, curves):
        assert not {path[-1] for path, _, _ in Tree(made.svg).elements} & {"script", "img"}
    assert f"{evil} (2)" in {words for _, words in Tree(categories.svg).all("text")}
    assert Tree(curves.svg).all("svg")[0][0]["aria-label"] == f"{evil}. {evil}: from 1 to 1"


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ((0, 27.3), [0, 10, 20, 30]),
        ((0, 1e-4), [0, 5e-5, 1e-4]),
        ((2.85, 3.96), [2.5, 3, 3.5, 4]),
        ((5, 5), [0, 2, 4, 6]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values: tuple[float, float], marks: list[float]) -> None:
    axes = drawn_axes(list(enumerate(values)))
    low, high = axes.get_ylim()
    assert [tick for tick in axes.get_yticks() if low - 1e-9 <= tick <= high + 1e-9] == pytest.approx(marks)
    assert low <= min(values) and max(values) <= high


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0001, "0.0001"),
        (5e-5, "5e-5"),
        (1e-7, "1e-7"),
        (27.314, "27.31"),
        (11435, "11,435"),
        (3.0, "3"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_are_written_short(value: float, words: str) -> None:
    assert number(value) == words


def test_a_thinned_line_keeps_its_ends_and_its_extremes() -> None:
    points = np.array([(i, (i * 7919) % 1009) for i in range(5000)], dtype=float)
    points[2500, 1] = 5000
    kept = thin(points, 200)
    assert len(kept) <= 202
    assert kept[0].tolist() == points[0].tolist() and kept[-1].tolist() == points[-1].tolist()
    assert kept[:, 1].max() == 5000 and kept[:, 1].min() == 0
    assert set(map(tuple, kept)) <= set(map(tuple, points)) and (np.diff(kept[:, 0]) > 0).all()
    assert thin(points[:200], 200).tolist() == points[:200].tolist()


def test_drawings_leave_out_what_is_not_finite() -> None:
    nan = float("nan")
    axes = drawn_axes([(1, 2.0), (2, nan), (3, float("inf")), (4, 3.0)])
    assert np.isfinite(axes.get_ylim()).all() and axes.get_lines()[0].get_xdata()[:2].tolist() == [1, 4]
    for values in (nan, None):
        records = [{"id": i, "snapshot_cross_entropy": values, "snapshot_cross_entropy_rank": i} for i in range(4)]
        (panel,) = panels.ranking(Ranking("difficulty", records))
        assert not re.search(r"\b(nan|inf)\b", drawing(panel, "x").svg)


def lines_of(page: Tree, title: str) -> dict[str, list[tuple[float, float]]]:
    """Name -> points of the lines of the drawing with this title."""
    figures = zip(page.all("figure"), page.all("figcaption"), strict=True)
    data = [json.loads(str(a["data-lines"])) for (a, _), (_, words) in figures if words.strip().startswith(title)]
    return {line["name"]: [tuple(point) for point in line["points"]] for line in data[0]["lines"]} if data else {}


def test_curves_hold_the_numbers_of_the_metrics(page: Tree, run: Path) -> None:
    metrics = RunFolder(run).read_metrics()
    steps, dev = ([r for r in metrics if key in r] for key in ("loss", "dev_rouge_l"))
    assert len(steps) == 9 and len(dev) == 2

    def close(line: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
        assert np.array(line) == pytest.approx(np.array(wanted, dtype=float), rel=1e-5)

    close(lines_of(page, "ROUGE-L on dev")["dev"], [(r["step"], r["dev_rouge_l"]) for r in dev])
    close(lines_of(page, "Cross-entropy")["dev"], [(r["step"], r["dev_cross_entropy"]) for r in dev])
    close(lines_of(page, "Learning rate")["learning rate"], [(r["step"], r["lr"]) for r in steps])
    close(lines_of(page, "Pool")["pool"], [(step, 24 if step < 4 else 48) for step in range(1, 10)])
    temperature = lines_of(page, "KD ratio and temperature")["temperature T"]
    close(temperature, [(step, 1 if step < 4 else 2) for step in range(1, 10)])
    for title, key in (("Loss", "loss"), ("Divergence", "divergence"), ("Gradient norm", "gradient_norm")):
        (line,) = lines_of(page, title).values()
        assert len(line) == 9 and line[0][1] == pytest.approx(steps[0][key], rel=1e-2)  # a mean of one value


def test_tables_hold_the_numbers_of_the_files(page: Tree, run: Path) -> None:
    stages, ledger, summary = (read_json(run / f"{name}.json") for name in ("stages", "ledger", "eval/summary"))
    rows = page.table("stages")[1:]
    assert [row[1] for row in rows] == [f"{s['pool'][0] + 1} to {s['pool'][1]}" for s in stages]
    assert [(row[3], row[4]) for row in rows] == [(f"{s['temperature']:.2f}", f"{s['kd_ratio']:.2f}") for s in stages]
    assert [(row[5], row[6]) for row in rows] == [("3", "3"), ("6", "6")]
    dev = [record for record in RunFolder(run).read_metrics() if "dev_rouge_l" in record]
    assert [row[3] for row in page.table("dev evaluations")[1:]] == [f"{r['dev_rouge_l']:.2f}" for r in dev]
    terms = dict(zip([w for _, w in page.all("dt")], [w for _, w in page.all("dd")], strict=True))
    assert terms["tokens seen"] == f"{ledger['tokens']:,}" and terms["teacher passes"] == "48"
    assert terms["optimiser steps"] == "9" and terms["finished"] == "yes"
    assert terms["best dev ROUGE-L"].startswith(f"{max(r['dev_rouge_l'] for r in dev):.2f}")
    assert terms["test ROUGE-L, short"] == f"{summary['short']['rouge_l']['mean']:.2f}"
    assert page.table("results")[1][0] == "ROUGE-L"
    assert page.table("results")[1][1].startswith(f"{summary['short']['rouge_l']['mean']:.2f}")
    assert terms["fingerprint of the student"] == read_json(run / "config.json")["fingerprints"]["student"]
    later = read_jsonl(run / "difficulty-stage2.jsonl")
    mean = sum(record["cross_entropy"] for record in later) / len(later)
    assert page.table("rankings")[2][0] == "difficulty-stage2" and page.table("rankings")[2][3] == f"{mean:.2f}"


def test_samples_are_the_ranking_with_prompts_and_references(page: Tree, run: Path, folders: Folders) -> None:
    import datasets

    ranking = read_jsonl(run / "difficulty.jsonl")
    texts = {row["id"]: row for row in datasets.load_from_disk(str(folders.data / "train"))}
    items = page.all("article")[:48]
    assert [a["data-place"] for a, _ in items] == [str(place) for place in range(1, 49)]
    assert [a["data-cross_entropy"] for a, _ in items] == [str(record["cross_entropy"]) for record in ranking]
    assert [a["data-rouge_l"] for a, _ in items] == [str(record["rouge_l"]) for record in ranking]
    for record, (_, shown) in zip(ranking, items, strict=True):
        assert f"id {record['id']} " in shown and f"{record['cross_entropy']:.2f}" in shown
        assert texts[record["id"]]["response"] in shown and record["answer"].strip() in shown
        instruction = texts[record["id"]]["prompt"].split("### Instruction:\n")[1].split("\n\n###")[0]
        assert instruction in shown
    assert [a["data-quarter"] for a, _ in items] == ["1"] * 12 + ["2"] * 12 + ["3"] * 12 + ["4"] * 12


def test_fewer_samples_are_the_two_ends(run: Path, folders: Folders, tmp_path: Path) -> None:
    arguments = ["--run", run, "--num-samples", 3, "--num-characters", 10, "--data-root", folders.data_root]
    page = Tree(written(tmp_path / "r.html", *arguments, drawn=False))
    places = [a["data-place"] for a, _ in page.all("article") if "data-place" in a]
    assert places == ["1", "2", "3", "46", "47", "48"]
    assert any("characters more" in words for _, words in page.all("span", class_="cut"))
    assert "The 3 easiest and the 3 hardest of 48 examples" in "".join(w for _, w in page.all("p", class_="note"))


def test_answers_stand_with_prompt_reference_and_score(page: Tree, run: Path, folders: Folders) -> None:
    examples = read_jsonl(folders.data_root / "short" / "valid.jsonl")
    answered = read_jsonl(run / "eval" / "short" / "1.jsonl")
    questions = page.all("article", data_set="short")
    assert len(questions) == len(examples) == 5
    for (attributes, words), example, record in zip(questions, examples, answered, strict=True):
        assert example["instruction"] in words and example["output"] in words and record["answer"].strip() in words
        assert float(str(attributes["data-row0"])) == pytest.approx(record["rouge_l"], rel=1e-4)


def test_the_commands_give_the_same_options_again(run: Path, folders: Folders) -> None:
    entry = open_entry("x", [run])
    words = shlex.split(str(train_command(entry)).replace("\\\n", " "))
    config = options.parse_train(words[words.index("train.py") + 1 :])
    wanted = read_json(run / "config.json")["options"]
    found = json.loads(json.dumps(dataclasses.asdict(config)))
    assert Path(found["run"].pop("output_dir")) == run.parent.parent
    assert found["run"].pop("plan") is found["run"].pop("resume_weights") is False
    assert (found["run"].pop("report_to"), found["run"].pop("push_to_hub")) == (["tensorboard"], None)
    assert found == wanted
    (line,) = evaluate_commands(entry)
    words = shlex.split(line.replace("\\\n", " "))
    what, generation = parse([EvaluateOptions, GenerationOptions], "x", words[words.index("evaluate.py") + 1 :])
    assert (what.model, what.sets, what.seeds) == (str(run / "best"), ["short"], [1, 2])
    assert (what.max_length, what.max_prompt_length, generation.top_k) == (192, 160, 50)


def test_one_page_and_nothing_from_elsewhere(page: Tree) -> None:
    for path, attributes, _ in page.elements:
        assert path[-1] not in ("link", "img", "iframe", "object")
        assert not {"src", "srcset", "data", "onclick", "onload"} & set(attributes)
        assert not str(attributes.get("href", "#")).startswith(("http", "//"))
    style = "".join(words for _, words in page.all("style"))
    assert "url(" not in style and "@import" not in style
    assert len(page.all("script")) == 1


def test_headings_come_in_order_and_fields_have_labels(page: Tree) -> None:
    levels = [int(path[-1][1]) for path, _, _ in page.elements if re.fullmatch("h[1-6]", path[-1])]
    assert levels[0] == 1 and levels.count(1) == 1
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = {a["for"] for a, _ in page.all("label")}
    fields = [a["id"] for name in ("input", "select") for a, _ in page.all(name)]
    assert fields and set(fields) <= labelled
    assert {str(a["href"])[1:] for a, _ in page.all("a")} <= set(ids)


def spoil(run: Path, data: Path) -> None:
    """Put markup wherever a run or its data holds text."""
    import datasets

    ranking = read_jsonl(run / "difficulty.jsonl")
    spoilt = [record | {"answer": EVIL, "category": EVIL} for record in ranking]
    write_jsonl(run / "difficulty.jsonl", spoilt)
    rows = {
        "id": [r["id"] for r in ranking],
        "prompt": [f"### Instruction:\n{EVIL}\n\n### Response:\n"] * len(ranking),
    }
    datasets.Dataset.from_dict(rows | {"response": [EVIL] * len(ranking)}).save_to_disk(
        str(data / "processed" / "train")
    )
    config = read_json(run / "config.json")
    config["options"]["data"]["data_dir"] = str(data / "processed")
    config["options"]["models"]["model"] = config["git_commit"] = EVIL
    write_json(run / "config.json", config)
    for path in (run / "eval" / "short").glob("*.jsonl"):
        records = [record | {"answer": EVIL + "\ud800"} for record in read_jsonl(path)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))  # escaped: half a surrogate pair
    (data / "short").mkdir()
    examples = [{"instruction": EVIL, "input": "", "output": EVIL}] * 5
    write_jsonl(data / "short" / "valid.jsonl", examples)


@pytest.fixture(scope="module")
def spoilt(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page made of files that hold markup."""
    root = tmp_path_factory.mktemp("spoilt")
    copy = part_of(run, root / "run")
    spoil(copy, root)
    written(root / "r.html", "--run", copy, "--data-root", root, "--title", EVIL, drawn=False)
    return root / "r.html"


def test_markup_in_a_run_stays_text(spoilt: Path, page: Tree) -> None:
    found = Tree(spoilt.read_text(encoding="utf-8"))
    assert len(found.all("script")) == 1 and not found.all("img")
    assert sum(EVIL in words for _, words in found.all("p", class_="asked")) == 53  # 48 examples, 5 prompts
    assert sum(EVIL in words for _, words in found.all("div", class_="card")) == 48 * 2 + 5 * 2
    assert [words for _, words in found.all("h1")] == [EVIL]


MISSING = {
    "no evaluation": (("eval",), "Not evaluated yet"),
    "no ranking": (("difficulty*",), "This run ranked no examples"),
    "no metrics": (("metrics.jsonl",), "there is nothing to draw"),
    "no ledger": (("ledger.json",), "ledger.json is not there"),
    "no stages": (("stages.json",), "stages.json is not there"),
    "no config": (("config.json",), "the command of the training is not known"),
    "begun": (("metrics.jsonl", "ledger.json", "difficulty*", "eval"), "Not evaluated yet"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_said_and_the_rest_is_there(case: str, run: Path, folders: Folders, tmp_path: Path) -> None:
    without, words = MISSING[case]
    copy = part_of(run, tmp_path / "run", *without)
    text = written(tmp_path / "r.html", "--run", copy, "--data-root", folders.data_root, drawn="metrics" in without)
    assert words in text and "Traceback" not in text
    Tree(text)


def training_panel(run: Path, title: str) -> Drawing:
    """One of the panels of a run over steps."""
    return next(drawing(panel, "x") for panel in panels.training(open_entry("x", [run])) if panel.title == title)


def test_an_unfinished_run_says_how_far_it_is(run: Path, folders: Folders, tmp_path: Path) -> None:
    copy = part_of(run, tmp_path / "run", "eval")
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(metrics[0] + '{"step": 2, "stage": 0, "lo')  # cut while it was written
    write_json(copy / "ledger.json", read_json(run / "ledger.json") | {"finished": False})
    text = written(tmp_path / "r.html", "--run", copy, "--data-root", folders.data_root, drawn=False)
    assert "not finished, 9 planned" in text
    loss = training_panel(copy, "Loss")
    (line,) = json.loads(loss.data)["lines"]
    assert len(line["points"]) == 1
    assert Tree(loss.svg).all("use", style="fill: var(--s1)")  # a single step is a dot


def test_a_nan_in_the_metrics_is_no_number_of_the_page(run: Path, folders: Folders, tmp_path: Path) -> None:
    copy = part_of(run, tmp_path / "run")
    records = [
        r | {"gradient_norm": float("nan"), "skipped": True} for r in RunFolder(run).read_metrics() if "loss" in r
    ]
    write_jsonl(copy / "metrics.jsonl", records)
    text = written(tmp_path / "r.html", "--run", copy, "--data-root", folders.data_root, drawn=False)
    assert "9 step(s) were skipped" in text
    assert json.loads(training_panel(copy, "Gradient norm").data)["lines"] == []


def test_without_the_data_and_the_sets_ids_are_left(run: Path, tmp_path: Path) -> None:
    copy = part_of(run, tmp_path / "run")
    config = read_json(copy / "config.json")
    config["options"]["data"]["data_dir"] = "gone"
    write_json(copy / "config.json", config)
    text = written(tmp_path / "r.html", "--run", copy, "--data-root", tmp_path, drawn=False)
    assert "The processed data (gone) is not here" in text and "Prompts of short are not under" in text
    first = read_jsonl(run / "difficulty.jsonl")[0]
    assert f"id {first['id']}" in Tree(text).all("article")[0][1]


def test_a_run_with_an_order_from_elsewhere_is_shown(run: Path, folders: Folders, tmp_path: Path) -> None:
    copy = part_of(run, tmp_path / "run", "eval")
    kept = ("id", "rouge_l", "cross_entropy", "rouge_l_rank", "cross_entropy_rank", "score", "answer")
    ranking = [{key: record[key] for key in kept} for record in read_jsonl(run / "difficulty.jsonl")]
    write_jsonl(copy / "difficulty.jsonl", ranking)
    metrics = [r for r in RunFolder(run).read_metrics() if "bucket1_rouge_l" not in r]
    write_jsonl(copy / "metrics.jsonl", metrics)
    text = written(tmp_path / "r.html", "--run", copy, "--data-root", folders.data_root, drawn=False)
    assert "it does not say how long the examples are" in text and "No quarter was asked" in text


@pytest.mark.parametrize(
    ("signals", "keep"),
    [
        (["teacher", "length"], {"teacher_cross_entropy": 1.5, "response_tokens": 7}),
        (["snapshot"], {"snapshot_cross_entropy": None}),
    ],
)
def test_other_signals_have_their_columns(signals: list[str], keep: dict[str, Any], tmp_path: Path) -> None:
    from pocl.difficulty.ranking import columns_of, rank_examples

    plain = [{"id": i, "prompt_tokens": 5, "response_tokens": 3 + i, "category": ""} for i in range(6)]
    records = rank_examples(
        [record | keep | {"response_tokens": record["response_tokens"]} for record in plain], columns_of(signals)
    )
    write_jsonl(tmp_path / "difficulty.jsonl", records)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "stage": 0, "epoch": 0, "loss": 1.0}])
    page = Tree(written(tmp_path / "r.html", "--run", tmp_path))
    assert len(page.all("article")) == 6
    titles = [words for _, words in page.all("figcaption")]
    assert any(name in title.lower() for title in titles for name in ("teacher", "training loss"))


@pytest.fixture(scope="module")
def rows(run: Path, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A baseline without a ranking, the run, and an evaluation that lies by itself."""
    root = tmp_path_factory.mktemp("rows")
    base = part_of(run, root / "base", "difficulty*", "eval")
    records = [r for r in RunFolder(run).read_metrics() if "bucket1_rouge_l" not in r]
    write_jsonl(base / "metrics.jsonl", [r | {"divergence": 0.0} if "loss" in r else r for r in records])
    write_json(base / "ledger.json", read_json(run / "ledger.json") | {"optimizer_steps": 99})
    shutil.copytree(run / "eval", root / "of-base")
    path = root / "of-base" / "short" / "1.jsonl"
    scores = [10.0, 50.0, 0.0, 30.0, 20.0]
    write_jsonl(
        path, [r | {"rouge_l": s, "answer": f"base {s}"} for r, s in zip(read_jsonl(path), scores, strict=True)]
    )
    return [f"KLD={base}", f"KLD={root / 'of-base'}", f"KLD + POCL={run}", f"teacher={run / 'eval'}"]


@pytest.fixture(scope="module")
def table_page(rows: list[str], folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("table") / "report.html"
    written(output, "--rows", *rows, "--data-root", folders.data_root, "--published", "gpt2", drawn=False)
    return output


def test_a_table_has_every_row_with_its_run_and_its_answers(table_page: Path, run: Path) -> None:
    from tools.reporting.tables import make_tables, text_rows

    page = Tree(table_page.read_text(encoding="utf-8"))
    made = page.table("ROUGE-L")
    names = [row[0].removesuffix(" †") for row in made[1:]]
    assert names == ["KLD", "KLD + POCL", "teacher"]
    _, wanted = text_rows(make_tables({"KLD + POCL": run}, ["rouge_l"])[0])
    assert made[2][1].startswith(wanted[0][1].replace("\n", ""))
    ids = [str(a["id"]) for a, _ in page.all("div") if str(a.get("id")).startswith("row")]
    assert ids == ["row-kld", "row-kld-pocl", "row-teacher"] and len(page.all("details", class_="run")) == 3
    (panel,) = panels.learning([open_entry("KLD", [run]), open_entry("KLD + POCL", [run])])
    assert panel.title == "KLD" and panel.title in {words.strip() for _, words in page.all("figcaption")}
    assert [line["name"] for line in json.loads(drawing(panel, "x").data)["lines"]] == ["KLD", "KLD + POCL"]
    assert [row[0] for row in page.table("ledgers")[1:]] == ["KLD", "KLD + POCL"]
    assert page.table("ledgers")[1][5] == "99"
    first = page.all("article", data_set="short")[0][1]
    assert "base 10.0" in first and "KLD + POCL" in first and "teacher" in first
    assert "The ranking of KLD + POCL." in "".join(words for _, words in page.all("p", class_="note"))


def test_the_rows_of_a_family_are_found(run: Path, folders: Folders, tmp_path: Path) -> None:
    part_of(run, tmp_path / "gpt2" / "pocl" / "tfkl" / "seed10")
    arguments = ["--results", tmp_path / "gpt2", "--published", "gpt2", "--data-root", folders.data_root]
    with without_drawings():
        result = call(report, arguments)
    assert result.status == 0, result.output
    page = Tree((tmp_path / "gpt2" / "report.html").read_text(encoding="utf-8"))
    assert page.all("h1") == [({}, "gpt2: main table")] and page.table("results")[1][0] == "ROUGE-L"
    assert page.all("div", id="row-kld-pocl")


def refused(result: Result, words: str) -> None:
    assert result.status == 2 and words in result.last_line, result.output
    assert len(result.output.strip().splitlines()) == 1


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    refused(call(report, []), "give one of --run")
    refused(call(report, ["--run", run, "--rows", "a=b"]), "give one of --run")
    refused(call(report, ["--run", tmp_path]), "holds neither a run")
    refused(call(report, ["--rows", "a"]), "NAME=FOLDER")
    refused(call(report, ["--run", run, "--num-samples", -1]), "--num-samples is -1")
    refused(call(report, ["--run", run, "--num-characters", 0]), "--num-characters is 0")
    refused(call(report, ["--run", run, "--published", "gpt5"]), "known: gpt2")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_text("{")
    refused(call(report, ["--run", tmp_path]), "the record has no 'step'")


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def schemes() -> Iterator[dict[str, str]]:
    """The colours of light, dark and paper."""
    for block in re.findall(r":root \{(.*?)\}", SHEET, flags=re.DOTALL):
        yield dict(re.findall(r"--(\w+): (#\w{6});", block))


def test_words_have_enough_contrast_and_lines_can_be_seen() -> None:
    found = list(schemes())
    assert len(found) == 3
    for colors in found:
        for surface in ("paper", "card"):
            for name, least in {
                "ink": 7.0,
                "quiet": 4.5,
                "accent": 4.5,
                "s0": 3.0,
                "s1": 3.0,
                "s2": 3.0,
                "s3": 3.0,
            }.items():
                light, dark = sorted((luminance(colors[name]), luminance(colors[surface])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (name, surface)
