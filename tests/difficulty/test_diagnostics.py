"""The diagnostics of a curriculum, counted by hand, and what a run leaves of them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from pocl.difficulty.diagnostics import buckets, categories, diagnose, summary, tau, ties
from pocl.difficulty.forgetting import probe_positions
from tests.runs import call
from tools import plot_difficulty


def record(place: int, rouge_l: float, cross_entropy_rank: int, **more: object) -> dict[str, object]:
    ranks = {
        "rouge_l_rank": place,
        "cross_entropy_rank": cross_entropy_rank,
        "cross_entropy": 1.0 * cross_entropy_rank,
    }
    return {"id": place, "rouge_l": rouge_l, "prompt_tokens": 10 * place, "response_tokens": 7} | ranks | more


RANKING = [record(1, 0.5, 2, category="a"), record(2, 0.2, 1, category="b"), record(3, 0.0, 3, category="a")]
RANKING += [record(4, 0.0, 4, category="")]


def metrics(values: list[list[float]]) -> list[dict[str, float]]:
    """Stage ends from ROUGE-L by bucket; cross-entropy is a tenth of it."""
    rows = []
    for step, row in enumerate(values, start=1):
        scores = {f"bucket{i}_rouge_l": value for i, value in enumerate(row, start=1)}
        rows.append(
            {"step": step} | scores | {name.replace("rouge_l", "cross_entropy"): v / 10 for name, v in scores.items()}
        )
    return [{"step": 0, "loss": 1.0}, *rows]


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_what_a_naive_count_of_pairs_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.permutation(20), rng.integers(0, 6, 20)
    signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i, j in itertools.combinations(range(20), 2)]
    product = sum(a * b for a, b in signs)
    wanted = product / np.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    assert tau(one, other) == pytest.approx(float(wanted), abs=1e-12)


def test_a_flat_ranking_agrees_with_nothing() -> None:
    assert tau([1, 1, 1], [1, 2, 3]) is None
    assert any("undefined" in line for line in summary(diagnose(RANKING, [])))


def test_numbers_of_a_small_ranking_by_hand() -> None:
    found = diagnose(RANKING, [])
    assert found["agreement"] == {"ROUGE-L and cross-entropy": pytest.approx(4 / 6)}
    assert found["ties"] == {"rouge_l": 2, "cross_entropy": 0}
    assert found["rouge_l_is_0"] == 2
    assert found["difficulty_and_length"] == {"prompt": pytest.approx(1.0), "response": None}
    assert found["buckets"] == []


def test_ties_count_every_example_that_shares_its_value() -> None:
    assert ties([0.0, 0.0, 0.0, 1.0, 2.0, 2.0]) == 5


def test_categories_go_from_the_easiest_and_leave_out_what_has_none() -> None:
    found = categories(RANKING)
    assert list(found) == ["a", "b"]
    assert found["a"] == {"examples": 2, "mean_percentile": pytest.approx(1 / 3)}


def test_forgetting_is_the_distance_to_the_best_stage_end() -> None:
    easiest, hardest = buckets(metrics([[10, 1], [30, 2], [25, 3]]))
    assert (easiest["rouge_l_forgotten"], hardest["rouge_l_forgotten"]) == (5, 0)
    assert easiest["cross_entropy_risen"] == pytest.approx(1.5)
    assert easiest["steps"] == [1, 2, 3] and hardest["rouge_l"] == [1, 2, 3]


@pytest.mark.parametrize(("num_examples", "count"), [(48, 3), (4, 16), (3, 2), (17, 5)])
def test_probe_positions_are_of_their_quarter_and_no_two_alike(num_examples: int, count: int) -> None:
    ranked = np.random.default_rng(0).permutation(num_examples)
    probe = probe_positions(ranked, count)
    places = [[int(np.flatnonzero(ranked == p)[0]) for p in bucket] for bucket in probe]
    flat = sum(places, [])
    assert flat == sorted(set(flat))
    assert len(places) == min(4, num_examples) and all(1 <= len(bucket) <= count for bucket in places)


def test_a_run_leaves_its_diagnostics_and_a_picture(probed: tuple[Path, str]) -> None:
    run, said = probed
    assert "Kendall's tau" in said and "easiest quarter: ROUGE-L" in said
    found = json.loads((run / "diagnostics.json").read_text())
    assert len(found["buckets"]) == 4 and len(found["buckets"][0]["rouge_l"]) == 4
    assert sum(row["examples"] for row in found["categories"].values()) == found["examples"] == 48
    drawn = call(plot_difficulty, ["--run", run])
    assert drawn.status == 0, drawn.output
    assert (run / "difficulty.png").stat().st_size > 20_000


def test_a_folder_without_a_ranking_is_refused(tmp_path: Path) -> None:
    result = call(plot_difficulty, ["--run", tmp_path])
    assert result.status == 2 and "holds no ranking" in result.last_line
