"""Tables from small evaluations counted by hand; intervals and tests against naive ones; the published answers."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm, permutation_test

import evaluate
from pocl.common import console
from pocl.common.files import write_json, write_jsonl
from tests.runs import call
from tools import make_tables
from tools.reporting import tables
from tools.reporting.intervals import bootstrap_intervals, holm, mean_of_sets, paired_p_values
from tools.reporting.scores import read_cross_entropies
from tools.reporting.tables import Cell, Table, TableRow, latex, published_figures
from tools.rows import main_rows, table_rows


def save_evaluation(
    folder: Path, name: str, scores: dict[str, list[float]], ledger: dict[str, int] | None = None
) -> Path:
    """An eval folder as evaluate.py leaves it: seed -> a score a prompt; exact match is 0 throughout."""
    place = folder / "eval"
    for seed, values in scores.items():
        records = [{"id": i, "rouge_l": value, "exact_match": 0.0} for i, value in enumerate(values)]
        write_jsonl(place / name / f"{seed}.jsonl", records)
    path = place / "summary.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, before | {name: {"rouge_l": {"seeds": dict.fromkeys(scores, 0.0)}}})
    if ledger:
        write_json(folder / "ledger.json", ledger)
    return folder


def test_cells_hold_means_over_seeds_and_prompts_and_their_average(tmp_path: Path) -> None:
    a = save_evaluation(tmp_path / "a", "dolly", {"10": [10.0, 20.0], "20": [30.0, 40.0]})
    save_evaluation(a, "vicuna", {"10": [5.0, 7.0, 9.0]})
    b = save_evaluation(tmp_path / "b", "dolly", {"10": [1.0, 3.0]})
    (table,) = tables.make_tables({"A": a, "B": b}, ["rouge_l"])
    assert list(table.columns) == ["dolly", "vicuna", "average"]
    first, second = table.rows
    assert {name: cell.mean for name, cell in first.cells.items()} == {"dolly": 25.0, "vicuna": 7.0, "average": 16.0}
    assert {name: cell.mean for name, cell in second.cells.items()} == {"dolly": 2.0}
    assert (first.cells["dolly"].seeds, first.cells["dolly"].prompts) == (2, 2)


def test_cross_entropies_stand_below_where_every_run_of_a_row_says_them(tmp_path: Path) -> None:
    for name, loss in (("a", 2.0), ("b", 3.0), ("c", None)):
        save_evaluation(tmp_path / name, "dolly", {"10": [1.0, 2.0]})
        path = tmp_path / name / "eval" / "summary.json"
        found = json.loads(path.read_text())
        write_json(path, {"dolly": found["dolly"] | ({} if loss is None else {"cross_entropy": loss})})
    folders = {name: tmp_path / name for name in "abc"}
    result = call(make_tables, ["--rows", f"both={folders['a']}", f"both={folders['b']}"])
    assert "nats a token" in " ".join(result.output.split()) and "2.500" in result.output
    assert "nats" not in call(make_tables, ["--rows", f"none={folders['c']}"]).output
    found = read_cross_entropies({"one": [folders["a"]], "some": [folders["a"], folders["c"]]})
    assert found == {"one": {"dolly": 2.0}}


def test_files_of_every_format(tmp_path: Path) -> None:
    folders = {"KLD": 20.0, "KLD + POCL": 24.0}
    ledger = {"optimizer_steps": 100, "global_batch_size": 8}
    for name, score in folders.items():
        ledger = ledger | {"optimizer_steps": ledger["optimizer_steps"] * 2}
        save_evaluation(tmp_path / name, "dolly", {"1": [score, score, score + 3]}, ledger)
    rows = [f"{name}={tmp_path / name}" for name in folders]
    names = [tmp_path / f"table.{ending}" for ending in ("md", "csv", "tex")]
    result = call(make_tables, ["--rows", *rows, "--published", "gpt2", "--output", *names])
    assert result.status == 0, result.output
    lines = names[0].read_text().splitlines()
    assert lines[0] == "| ROUGE-L | dolly | p |"
    assert lines[2].startswith("| KLD | 21.00<br>20.00–23.00<br>paper 23.49<br>(-2.49) |")
    assert lines[3].startswith("| KLD + POCL † | 25.00<br>24.00–27.00<br>paper 24.87<br>(+0.13) | 0.2")
    assert (
        "KLD and KLD + POCL did not see the same updates: steps 200, batch 8 against steps 400, batch 8."
        in "\n".join(lines)
    )
    with open(names[1], encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 4  # two rows, two metrics
    assert records[0]["mean"] == "21.0" and records[0]["published"] == "23.49" and records[0]["p"] == ""
    assert float(records[1]["p"]) > 0.2
    tex = names[2].read_text()
    assert tex.count(r"\begin{tabular}{lrr}") == 2 and r"$^\dagger$" in tex and "†" not in tex.split("%")[0]


def test_unequal_updates_are_marked_by_a_runs_eval_folder_too(tmp_path: Path) -> None:
    for name, steps in (("KLD", 10), ("KLD + POCL", 20)):
        ledger = {"optimizer_steps": steps, "global_batch_size": 8}
        save_evaluation(tmp_path / name, "dolly", {"1": [1.0, 2.0]}, ledger)
    rows = {name: tmp_path / name / "eval" for name in ("KLD", "KLD + POCL")}
    (table,) = tables.make_tables(rows, ["rouge_l"])
    assert table.rows[1].unlike == "steps 10, batch 8 against steps 20, batch 8"


def test_equal_updates_are_not_marked(tmp_path: Path) -> None:
    for name, steps in (("KLD", 3560), ("KLD + POCL", 3552)):
        save_evaluation(
            tmp_path / name, "dolly", {"1": [1.0, 2.0]}, {"optimizer_steps": steps, "global_batch_size": 64}
        )
    (table,) = tables.make_tables({name: tmp_path / name for name in ("KLD", "KLD + POCL")}, ["rouge_l"])
    assert [row.unlike for row in table.rows] == [None, None]


def save_rows(results: Path, table: str, made: dict[str, tuple[float, int]]) -> None:
    """Evaluated runs of a table's rows, from (what is added to each score, updates): 40 prompts, a batch of 64."""
    places = {row.name: row.run for row in table_rows(table)}
    for name, (more, steps) in made.items():
        ledger = {"optimizer_steps": steps, "global_batch_size": 64}
        scores = {"1": [i % 7 + more for i in range(40)]}
        save_evaluation(results / places[name] / "seed10", "dolly", scores, ledger)


def written_rows(results: Path, table: str) -> tuple[list[list[str]], str]:
    """(the cells of the ROUGE-L table of a results folder, all of its text)."""
    output = results / "t.md"
    result = call(make_tables, ["--results", results, "--table", table, "--metrics", "rouge_l", "--output", output])
    assert result.status == 0, result.output
    text = output.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines], text


def test_rows_of_the_ablation_are_compared_with_pocl_and_marked_where_updates_differ(tmp_path: Path) -> None:
    made = {"POCL": (0.0, 3552), "2 subsets": (5.0, 3471), "8 subsets": (0.0, 3196), "hard to easy": (5.0, 3552)}
    save_rows(tmp_path, "ablation", made)
    (head, *rows), text = written_rows(tmp_path, "ablation")
    assert head == ["ROUGE-L", "dolly", "p"]
    # Of 10,001 sign flips of 40 equal differences, none but the first is as far; Holm's factor is 3 for the smallest.
    names = {"POCL": "", "2 subsets †": "< 0.001", "8 subsets †": "1.000", "hard to easy": "< 0.001"}
    assert {row[0]: row[2] for row in rows} == names
    assert "POCL and 8 subsets did not see the same updates: steps 3552, batch 64 against steps 3196, batch 64" in text
    assert "p: paired sign-flip permutation test against POCL, with Holm's correction." in text
    assert text.count("† POCL and") == 2


def test_selective_rows_are_compared_with_kd_and_an_extra_first_look_is_marked(tmp_path: Path) -> None:
    made = {"KD": (0.0, 3560), "KD-CL, teacher": (1.0, 3552), "KD-CL-SR, teacher": (1.0, 3552)}
    save_rows(tmp_path, "selective", made | {"KD-CL, student": (1.0, 3730), "KD-CL-SR, student": (1.0, 3730)})
    (_, *rows), text = written_rows(tmp_path, "selective")
    marked = [row[0] for row in rows if row[0].endswith("†")]
    assert marked == ["KD-CL, student †", "KD-CL-SR, student †"]
    assert [row[2] == "" for row in rows] == [True, False, False, False, False]
    assert "against KD, with Holm's correction" in text


def test_named_rows_are_compared_by_the_ending_pocl_alone(tmp_path: Path) -> None:
    for name, steps in (("POCL", 10), ("2 subsets", 20)):
        save_evaluation(
            tmp_path / name, "dolly", {"1": [1.0, 2.0]}, {"optimizer_steps": steps, "global_batch_size": 8}
        )
    (table,) = tables.make_tables({name: tmp_path / name for name in ("POCL", "2 subsets")}, ["rouge_l"])
    assert [(row.p, row.unlike, row.baseline) for row in table.rows] == [(None, None, None)] * 2


def test_a_set_of_another_size_than_the_papers_is_noted_beside_its_figures(tmp_path: Path) -> None:
    row = save_evaluation(tmp_path / "SFT", "vicuna", {"1": [1.0] * 80})
    save_evaluation(row, "uinst", {"1": [1.0] * 1050})
    note = "uinst: 1,050 prompts here and 10,000 in the paper"
    (table,) = tables.make_tables({"SFT": row}, ["rouge_l"], published="gpt2")
    assert [line for line in tables.notes(table) if "in the paper" in line] == [
        f"{note}, whose figure is of a set of another size."
    ]
    told = call(make_tables, ["--rows", f"SFT={row}", "--published", "gpt2", "--metrics", "exact_match", "rouge_l"])
    assert note in " ".join(told.output.split()) and "vicuna:" not in told.output
    assert "in the paper" not in call(make_tables, ["--rows", f"SFT={row}"]).output


def test_the_notes_name_interval_test_and_correction_by_their_standard_terms(tmp_path: Path) -> None:
    rows = {name: save_evaluation(tmp_path / name, "dolly", {"1": [1.0]}) for name in ("KLD", "KLD + POCL")}
    said = " ".join(tables.notes(tables.make_tables(rows, ["rouge_l"])[0]))
    for term in ("95 % bootstrap interval over prompts and seeds", "paired sign-flip permutation test"):
        assert term in said
    assert "Holm's correction" in said


def test_rows_of_a_results_folder_are_found(tmp_path: Path) -> None:
    save_evaluation(tmp_path / "sft" / "sft" / "seed10", "dolly", {"1": [1.0]})
    save_evaluation(tmp_path / "pocl" / "tfkl" / "seed10", "dolly", {"1": [2.0]})
    result = call(make_tables, ["--results", tmp_path, "--output", tmp_path / "t.csv"])
    assert result.status == 0, result.output
    assert [line.split(",")[0] for line in (tmp_path / "t.csv").read_text().splitlines()[1:3]] == ["SFT", "KLD + POCL"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["either --rows NAME=FOLDER"]),
        (["--rows", "a"], ["NAME=FOLDER"]),
        (["--results", "nowhere"], ["nowhere holds no evaluated row of the main table"]),
        (["--rows", "a=b", "--output", "table.xls"], ["table.xls", ".md, .csv, .tex"]),
        (["--results", "x", "--table", "man"], ["did you mean 'main'"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    result = call(make_tables, arguments)
    assert result.status == 2 and all(word in result.last_line for word in words)


def test_rows_of_other_prompts_and_unknown_figures_are_refused(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 3)):
        save_evaluation(tmp_path / name, "dolly", {"1": [1.0] * count})
    rows = ["--rows", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"]
    assert "different numbers of prompts of dolly (a 2, b 3)" in call(make_tables, rows).last_line
    assert "known: gpt2" in call(make_tables, [*rows[:2], "--published", "gpt5"]).last_line


def test_rows_that_answered_other_prompts_of_one_name_are_refused(tmp_path: Path) -> None:
    for name, asked in (("a", "one"), ("b", "one"), ("c", "another"), ("old", None)):
        path = save_evaluation(tmp_path / name, "dolly", {"1": [1.0, 2.0]}) / "eval" / "summary.json"
        if asked:  # an earlier evaluate.py did not note it
            write_json(path, {"dolly": json.loads(path.read_text())["dolly"] | {"set": asked}})
    rows = {name: f"{name}={tmp_path / name}" for name in ("a", "b", "c", "old")}
    assert call(make_tables, ["--rows", rows["a"], rows["b"], rows["old"]]).status == 0
    result = call(make_tables, ["--rows", rows["a"], rows["old"], f"{rows['c']}/eval"])
    assert result.status == 2 and "a and c answered other prompts of dolly" in result.last_line


def test_published_figures_are_of_the_papers_rows_and_average_as_printed() -> None:
    figures = published_figures("gpt2")
    assert list(figures) == [row.name for row in main_rows(matched=False)]
    # Source: the column "Avg" of the paper's table.
    averages = {"teacher": 23.44, "SFT": 16.80, "SeqKD": 17.11, "KLD": 18.10, "KLD + POCL": 19.70}
    averages |= {"TVD + POCL": 22.76, "reverse skew KLD + POCL": 22.94, "GKD": 20.17, "GKD + POCL": 22.51}
    for row, average in averages.items():
        assert np.mean(list(figures[row].values())) == pytest.approx(average, abs=0.0051)


def test_the_interval_of_one_seed_is_the_normal_one_of_a_mean() -> None:
    values = np.random.default_rng(1).gamma(2.0, 10.0, size=(1, 1, 400))
    ((low, high),) = bootstrap_intervals([[values]], resamples=20_000)
    half = norm.ppf(0.975) * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_seeds_that_differ_widen_the_interval() -> None:
    dice = np.random.default_rng(2)
    alike = np.repeat(dice.normal(20, 5, size=(1, 1, 100)), 5, axis=1)
    apart = alike + np.array([[-8.0], [-4.0], [0.0], [4.0], [8.0]])
    narrow, wide = bootstrap_intervals([[alike], [apart]])
    assert mean_of_sets([apart]) == pytest.approx(mean_of_sets([alike]))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_the_interval_is_a_naive_bootstrap_and_the_same_every_time() -> None:
    dice = np.random.default_rng(3)
    sets = [dice.normal(20, 6, size=(1, 3, 40)), dice.normal(10, 3, size=(1, 3, 25))]
    means = []
    for _ in range(4000):
        drawn = [s[0][dice.integers(0, 3, 3)][:, dice.integers(0, s.shape[2], s.shape[2])].mean() for s in sets]
        means.append(np.mean(drawn))
    naive = np.quantile(means, [0.025, 0.975])
    assert bootstrap_intervals([sets]) == bootstrap_intervals([sets])
    assert bootstrap_intervals([sets], resamples=4000)[0] == pytest.approx(naive, abs=0.15)


def test_training_seeds_are_drawn_with_their_own_answers() -> None:
    dice = np.random.default_rng(7)
    scores = dice.normal(20, 6, size=(4, 2, 30)) + dice.normal(0, 3, size=(4, 1, 1))
    means = []
    for _ in range(4000):
        prompts = dice.integers(0, 30, 30)
        runs = [scores[run][dice.integers(0, 2, 2)][:, prompts].mean() for run in dice.integers(0, 4, 4)]
        means.append(np.mean(runs))
    naive = np.quantile(means, [0.025, 0.975])
    (interval,) = bootstrap_intervals([[scores]], resamples=4000)
    assert interval == pytest.approx(naive, abs=0.2)
    (alone,) = bootstrap_intervals([[scores.reshape(1, 8, 30)]])  # as if one training had answered eight times
    assert interval[1] - interval[0] > 1.2 * (alone[1] - alone[0])


def test_a_row_of_several_training_seeds_is_tested_over_them(tmp_path: Path) -> None:
    runs = {"KLD": [10.0, 20.0, 30.0], "KLD + POCL": [11.0, 22.0, 33.0], "SFT": [7.0]}
    rows = []
    for name, values in runs.items():
        for seed, value in enumerate(values):
            folder = save_evaluation(tmp_path / name / f"seed{seed}", "dolly", {"1": [value, value]})
            rows.append(f"{name}={folder}")
    result = call(make_tables, ["--rows", *rows, "--metrics", "rouge_l", "--output", tmp_path / "t.csv"])
    assert result.status == 0, result.output
    with open(tmp_path / "t.csv", encoding="utf-8") as file:
        records = {record["row"]: record for record in csv.DictReader(file)}
    assert {name: float(record["mean"]) for name, record in records.items()} == {
        "KLD": 20.0,
        "KLD + POCL": 22.0,
        "SFT": 7.0,
    }
    # Differences 1, 2, 3: t = 2 sqrt(3) with two degrees of freedom, whose p is 1 - t / sqrt(t^2 + 2).
    assert float(records["KLD + POCL"]["p"]) == pytest.approx(1 - 3.4641016 / 14**0.5, abs=1e-6)
    said = " ".join(result.output.split())
    assert "A row is the mean of 3 training seeds." in said and "One training seed of SFT:" in said
    assert "paired t-test over training seeds against" in said


def test_a_table_of_one_training_seed_says_so(tmp_path: Path) -> None:
    folder = save_evaluation(tmp_path / "a", "dolly", {"1": [1.0, 2.0]})
    assert any(
        note.startswith("One training seed:")
        for note in tables.notes(tables.make_tables({"A": folder}, ["rouge_l"])[0])
    )


def test_runs_of_a_row_that_were_asked_otherwise_are_refused(tmp_path: Path) -> None:
    a = save_evaluation(tmp_path / "a", "dolly", {"1": [1.0, 2.0]})
    b = save_evaluation(tmp_path / "b", "dolly", {"1": [1.0, 2.0], "2": [1.0, 2.0]})
    result = call(make_tables, ["--rows", f"A={a}", f"A={b}"])
    assert result.status == 2
    assert (
        "the runs of A answered dolly differently (1 seed(s) of 2 prompts, 2 seed(s) of 2 prompts)" in result.last_line
    )


def test_p_is_that_of_scipys_permutation_test() -> None:
    dice = np.random.default_rng(4)
    one, other = dice.normal(1.0, 2.0, size=(1, 12)), dice.normal(0.0, 2.0, size=(1, 12))
    exact = permutation_test(
        (one[0] - other[0],), lambda d, axis: d.mean(axis=axis), permutation_type="samples", vectorized=True
    ).pvalue
    assert paired_p_values([([one[None]], [other[None]])], flips=50_000) == pytest.approx([exact], abs=0.01)


def test_no_difference_has_p_1_and_a_large_one_the_smallest_p() -> None:
    values = np.random.default_rng(5).normal(size=(1, 2, 50))
    assert paired_p_values([([values], [values])]) == [1.0]
    assert paired_p_values([([values + 3], [values])], flips=999) == pytest.approx([0.001])
    with pytest.raises(ValueError, match="50 prompts against 49"):
        paired_p_values([([values], [values[..., 1:]])])


def test_among_others_a_row_has_the_interval_and_the_p_that_it_has_alone() -> None:
    dice = np.random.default_rng(6)
    shapes = [((1, 3, 300), (1, 3, 25))] * 2 + [((1, 1, 300), (1, 2, 25)), ((2, 3, 40),), ((2, 3, 300), (2, 3, 25))]
    rows = [[dice.normal(20, 6, size=shape) for shape in row] for row in shapes]
    pairs = [(row, [values + dice.normal(0, 1, size=values.shape) for values in row]) for row in rows]
    intervals, p_values = bootstrap_intervals(rows, resamples=300), paired_p_values(pairs, flips=300)
    assert intervals == [bootstrap_intervals([row], resamples=300)[0] for row in rows]
    assert p_values == [paired_p_values([pair], flips=300)[0] for pair in pairs]
    assert len(set(intervals)) == 5 and bootstrap_intervals([]) == paired_p_values([]) == []


def test_tables_of_several_metrics_are_those_of_each(tmp_path: Path) -> None:
    for name, score in (("KLD", 20.0), ("KLD + POCL", 24.0), ("SFT", 8.0)):
        scores = {seed: [score, score + 2, score - int(seed)] for seed in ("1", "2")}
        save_evaluation(tmp_path / name, "vicuna", scores)
        if name != "SFT":
            save_evaluation(tmp_path / name, "dolly", {"1": [score, 2 * score]})
    rows = {path.name: path for path in sorted(tmp_path.iterdir())}
    both = tables.make_tables(rows, ["rouge_l", "exact_match"], published="gpt2")
    assert both == [tables.make_tables(rows, [metric], published="gpt2")[0] for metric in ("rouge_l", "exact_match")]
    assert [row.p is None for row in both[0].rows] == [row.p is None for row in both[1].rows] == [True, False, True]
    assert both[0].rows[1].cells["average"].published and both[1].rows[1].cells["average"].published is None


def test_holm_corrects_as_its_steps_say() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_published_answers_give_the_published_scores_with_intervals(shared_data: Path, tmp_path: Path) -> None:
    """Three seeds of the published POCL student on Dolly; the paper's code printed these means."""
    wanted = {10: 24.2393, 20: 24.8958, 30: 24.427}
    rows = []
    for seed in wanted:
        answers = shared_data / "published" / f"dolly-seed{seed}.jsonl"
        arguments = ["--answers", answers, "--sets", "dolly", "--data-root", shared_data]
        result = call(evaluate, [*arguments, "--output-dir", tmp_path / str(seed)])
        assert result.status == 0, result.output
        rows.append(f"seed {seed}={tmp_path / str(seed)}")
    assert call(make_tables, ["--rows", *rows, "--output", tmp_path / "t.csv"]).status == 0
    with open(tmp_path / "t.csv", encoding="utf-8") as file:
        records = [record for record in csv.DictReader(file) if record["metric"] == "rouge_l"]
    for record, mean in zip(records, wanted.values(), strict=True):
        assert float(record["mean"]) == pytest.approx(mean, abs=1e-4)
        assert mean - 2.5 < float(record["low"]) < mean - 1 < mean + 1 < float(record["high"]) < mean + 2.5


def test_a_table_wider_than_the_screen_is_printed_in_blocks_of_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, rows = ["row", "first", "second", "third"], [["a", "1.00\n0.50–1.50", "2.00", "3.00"]]
    for width, blocks in ((36, [[1, 2, 3]]), (35, [[1, 2], [3]]), (10, [[1], [2], [3]])):
        assert [list(block) for block in console._blocks(columns, rows, width)] == blocks
    monkeypatch.setattr(console.CONSOLE, "width", 30)
    console.show_table("title", columns, rows, in_blocks=True)
    said = capsys.readouterr().out
    assert said.count("title") == 1 and said.count("row") == 2
    assert all(said.count(word) == 1 for word in ("first", "second", "third", "0.50–1.50", "3.00"))
    assert max(map(len, said.splitlines())) <= 30


def test_names_are_escaped_in_latex() -> None:
    cell = Cell(1.0, 0.5, 1.5, 3, 1)
    written = latex(Table("rouge_l", ["my_set"], [TableRow("R&D_1", {"my_set": cell})]))
    assert r"ROUGE-L & my\_set \\" in written and r"R\&D\_1 & \makecell" in written
