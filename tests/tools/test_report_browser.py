"""The report in a real browser: it opens without a complaint, fits, filters, sorts, and reads values."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl.common.files import read_jsonl, write_json, write_jsonl
from pocl.difficulty.ranking import rank_examples
from tests.browser import CHROMIUM, Browser, browser
from tests.runs import call
from tools import report
from tools.reporting.drawings import PLOT

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
EVIL = "<script>window.bad = 1</script><img src=x onerror=window.bad=1>"
LONG = "a very long answer " * 60 + "x" * 400
CATEGORIES = ("open_qa", "closed_qa", "summarisation")


def save_run(folder: Path, *, scores: list[float], stages: int = 4) -> Path:
    """The files of a run over 60 examples and its evaluation on five prompts, without any training."""
    measured = [
        {"id": i, "prompt_tokens": 20 + i, "response_tokens": 5 + i % 7, "category": CATEGORIES[i % 3]}
        | {"rouge_l": 0.0 if i % 4 == 0 else i / 60, "cross_entropy": 5 - i / 20}
        | {"answer": [f"answer {i}", LONG, EVIL][i % 3]}
        for i in range(60)
    ]
    write_jsonl(folder / "difficulty.jsonl", rank_examples(measured, ["rouge_l", "cross_entropy"]))
    records = []
    for step in range(1, 10 * stages + 1):
        stage = (step - 1) // 10
        place = {"step": step, "stage": stage, "epoch": 0}
        values = {"loss": 10.0 / step, "cross_entropy": 5.0 / step, "divergence": 3.0 / step, "lr": 1e-4 / step}
        curriculum = {"pool": 15 * (stage + 1), "temperature": 1 + stage / 3, "kd_ratio": 0.7 + stage / 10}
        records.append(place | curriculum | values | {"gradient_norm": 1.0, "tokens_per_second": 100.0 * step})
        if step % 10 == 0:
            quarters = {
                f"bucket{q}_{name}": 10.0 * q + step for q in range(1, 5) for name in ("rouge_l", "cross_entropy")
            }
            records += [place | {"dev_rouge_l": 2.0 * step, "dev_cross_entropy": 1.0}, place | quarters]
    write_jsonl(folder / "metrics.jsonl", records)
    plan = [{"pool": [0, 15 * (i + 1)], "epochs": 2, "temperature": 1 + i / 3, "kd_ratio": 0.7} for i in range(stages)]
    write_json(folder / "stages.json", [{"index": i} | stage for i, stage in enumerate(plan)])
    write_json(folder / "ledger.json", {"samples": 1, "tokens": 2, "optimizer_steps": 40, "global_batch_size": 3})
    answers = [
        {"id": i, "answer": [LONG, EVIL, "short"][i % 3], "rouge_l": score, "exact_match": 0.0}
        for i, score in enumerate(scores)
    ]
    write_jsonl(folder / "eval" / "mine" / "10.jsonl", answers)
    write_json(folder / "eval" / "summary.json", {"mine": {"rouge_l": {"seeds": {"10": 1.0}}}})
    return folder


def make_page(output: Path, *arguments: object) -> Path:
    """A page; the set's prompts lie beside it."""
    questions = [{"instruction": f"question {i} {EVIL}", "output": "an answer"} for i in range(5)]
    write_jsonl(output.parent / "data" / "mine" / "valid.jsonl", questions)
    result = call(report, [*arguments, "--data-root", output.parent / "data", "--output", output])
    assert result.status == 0, result.output
    return output


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return make_page(root / "report.html", "--run", save_run(root / "tfkl", scores=[1.0, 2.0, 3.0, 4.0, 5.0]))


@pytest.fixture(scope="module")
def table_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    scores = {"KLD": [10.0, 50.0, 0.0, 30.0, 20.0], "KLD + POCL": [60.0, 40.0, 5.0, 30.0, 0.0]}
    rows = [f"{name}={save_run(root / name, scores=row)}" for name, row in scores.items()]
    return make_page(root / "report.html", "--rows", *rows)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as started:
        yield started


OPEN_ALL = "document.querySelectorAll('details').forEach((part) => { part.open = true; })"
WIDE = """[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, nav, pre, .hidden') &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("which", ["run", "table"])
def test_it_opens_without_a_complaint_and_fits(which: str, window: Browser, run_page: Path, table_page: Path) -> None:
    page = {"run": run_page, "table": table_page}[which]
    window.complaints.clear()
    window.requests.clear()
    window.open(page, width=360)
    window.ask(OPEN_ALL)
    for width in (360, 768, 1000, 1280):
        window.resize(width)
        assert window.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert window.ask(WIDE) == []
    assert window.ask("document.querySelectorAll('svg').length") > 15
    assert window.complaints == []
    assert {request for request in window.requests if not request.startswith("data:")} == {page.as_uri()}


def test_markup_in_a_run_does_nothing(window: Browser, run_page: Path) -> None:
    window.open(run_page)
    assert window.ask("document.querySelectorAll('img').length") == 0
    assert window.ask("window.bad") is None
    # Were something to slip through all the same, the page's own policy would stop it.
    window.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
    )
    assert window.ask("window.bad") is None
    assert any("Content Security Policy" in complaint for complaint in window.complaints)


PLACES = "[...document.querySelectorAll('#samples .item:not([hidden])')].map((item) => +item.dataset.place)"


def choose(window: Browser, id_: str, value: str | bool) -> None:
    """Give a field a value, as a person would; True and False tick a box and clear it."""
    field = f"document.getElementById('{id_}')"
    name = "checked" if isinstance(value, bool) else "value"
    window.ask(f"{field}.{name} = {json.dumps(value)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_filters_show_the_right_examples(window: Browser, run_page: Path) -> None:
    ranking = read_jsonl(run_page.parent / "tfkl" / "difficulty.jsonl")
    places = {record["id"]: place for place, record in enumerate(ranking, start=1)}

    def those(wanted: object) -> list[int]:
        return sorted(places[r["id"]] for r in ranking if wanted(r))  # type: ignore[operator]

    window.open(run_page)
    assert window.ask(PLACES) == list(range(1, 61))
    choose(window, "samples-rouge_l", "0.0")
    assert window.ask(PLACES) == those(lambda r: r["rouge_l"] == 0)
    choose(window, "samples-category", "closed_qa")
    assert window.ask(PLACES) == those(lambda r: r["rouge_l"] == 0 and r["category"] == "closed_qa")
    choose(window, "samples-rouge_l", "")
    choose(window, "samples-category", "")
    choose(window, "samples-quarter", "4")
    assert window.ask(PLACES) == list(range(46, 61))
    assert window.ask("document.querySelector('#samples .shown').value") == "15 of 60 shown"
    choose(window, "samples-quarter", "")
    choose(window, "samples-search", "ANSWER  3")
    assert window.ask(PLACES) == those(lambda r: re.search("answer.*3|3.*answer", f"id {r['id']} {r['answer']}"))
    choose(window, "samples-search", "no such words")
    assert window.ask(PLACES) == []


def test_examples_are_sorted_up_and_down(window: Browser, run_page: Path) -> None:
    ranking = read_jsonl(run_page.parent / "tfkl" / "difficulty.jsonl")
    losses, names = ([record[key] for record in ranking] for key in ("cross_entropy", "category"))
    window.open(run_page)
    up = sorted(range(1, 61), key=lambda place: losses[place - 1])
    choose(window, "samples-order", "+cross_entropy")
    assert window.ask(PLACES) == up
    choose(window, "samples-order", "-cross_entropy")
    assert window.ask(PLACES) == up[::-1]
    choose(window, "samples-order", "+category")
    assert window.ask(PLACES) == sorted(range(1, 61), key=lambda place: (names[place - 1], place))
    choose(window, "samples-order", "")
    assert window.ask(PLACES) == list(range(1, 61))


def test_long_answers_are_short_until_they_are_asked_for(window: Browser, run_page: Path) -> None:
    window.open(run_page)
    row = "document.querySelector('#samples .short')"
    height = window.ask(f"{row}.getBoundingClientRect().height")
    button = f"{row}.querySelector('.more')"
    assert window.ask(f"{button}.getAttribute('aria-expanded')") == "false"
    window.ask(f"window.part = {row}; part.querySelector('.more').click()")
    assert window.ask("part.getBoundingClientRect().height") > 2 * height
    assert window.ask("part.querySelector('.more').getAttribute('aria-expanded')") == "true"


ASKED = "[...document.querySelectorAll('#answers .item:not([hidden]) .id')].map((e) => e.textContent)"


def test_answers_are_ordered_by_who_is_ahead_and_rows_can_be_hidden(window: Browser, table_page: Path) -> None:
    window.open(table_page)
    assert window.ask(ASKED) == [f"mine {i}" for i in range(5)]
    choose(window, "answers-order", "-row1")
    assert window.ask(ASKED) == [f"mine {i}" for i in (0, 1, 3, 2, 4)]
    choose(window, "answers-against", "row0")  # POCL less the baseline: 50, -10, 5, 0, -20
    assert window.ask(ASKED) == [f"mine {i}" for i in (0, 2, 3, 1, 4)]
    choose(window, "answers-order", "")
    assert window.ask(ASKED) == [f"mine {i}" for i in range(5)]
    choose(window, "answers-row-0", False)
    seen = "[...document.querySelectorAll('#answers .card:not([hidden]) .who b')].map((e) => e.textContent)"
    assert set(window.ask(seen)) == {"reference", "KLD + POCL"}
    choose(window, "answers-search", "question 3")
    assert window.ask(ASKED) == ["mine 3"]


def test_the_pointer_reads_every_panel_at_its_step(window: Browser, run_page: Path) -> None:
    window.open(run_page, height=3000)
    window.ask("window.panel = document.querySelector('svg[aria-label^=Loss]')")
    box = window.ask(
        "(() => { const b = panel.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })()"
    )
    left, top, width, height = box
    # The plot's share of the width, for steps 0.5 to 40.5.
    window.move(left + width * (PLOT[0] + (20 - 0.5) / 40 * PLOT[2]), top + height / 2)
    read = dict(
        window.ask(
            "[...document.querySelectorAll('.charts[data-linked] .chart')].map((c) => "
            "[c.querySelector('b').textContent, c.querySelector('.read')?.value])"
        )
    )
    assert read["ROUGE-L on dev"] == "20: 40"
    assert read["Pool"] == "20: 30"
    assert read["KD ratio and temperature"] == "20: 0.8 · 1.33"
    assert read["Learning rate"] == "20: 5.0e-6"
    assert read["Loss"].startswith("20: 0.")


def test_dark_and_light_differ(window: Browser, run_page: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    window.open(run_page)
    assert window.ask(paper) == "rgb(251, 250, 247)"
    window.open(run_page, dark=True)
    assert window.ask(paper) == "rgb(20, 23, 26)"


def test_a_link_to_a_run_opens_it(window: Browser, table_page: Path) -> None:
    window.open(table_page)
    is_open = "document.getElementById('row-kld-pocl').closest('details').open"
    assert not window.ask(is_open)
    window.ask("location.hash = 'row-kld-pocl'")
    assert window.ask(f"new Promise((done) => setTimeout(() => done({is_open}), 50))")


def test_without_its_script_everything_is_there(window: Browser, run_page: Path) -> None:
    window.open(run_page, script=False)
    try:
        assert window.ask("document.querySelectorAll('#samples .item').length") == 60
        shown = (
            "[...document.querySelectorAll('.with-js')].filter((e) => getComputedStyle(e).display !== 'none').length"
        )
        assert window.ask(shown) == 0
        assert window.ask("document.querySelectorAll('.short, .more').length") == 0
    finally:
        window.call("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_nothing_is_cut_off(window: Browser, table_page: Path, tmp_path: Path) -> None:
    window.open(table_page, width=703)  # A4 less its margins, at 96 pixels an inch
    window.call("Emulation.setEmulatedMedia", media="print")
    try:
        window.ask(OPEN_ALL)
        assert window.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert window.ask(WIDE.replace(".scroll, nav, pre, .hidden", ".hidden")) == []
        assert window.ask("getComputedStyle(document.querySelector('.controls')).display") == "none"
        printed = "[...document.querySelectorAll('#samples-1 .item')].filter((item) => item.offsetHeight).length"
        assert window.ask(printed) == 30
        window.pdf(tmp_path / "report.pdf")
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    finally:
        window.call("Emulation.setEmulatedMedia", media="")
