"""Facts about ranks and their fusion, counted by hand."""

import numpy as np
import pytest

from pocl.difficulty.ranking import easy_to_hard, ordinal_ranks, reciprocal_rank_fusion


def order_of_ids(rouge: np.ndarray, cross_entropy: np.ndarray, ids: np.ndarray) -> list[int]:
    """Example ids from the easiest to the hardest."""
    ranks = [ordinal_ranks(rouge, ids, highest_first=True), ordinal_ranks(cross_entropy, ids, highest_first=False)]
    return ids[easy_to_hard(reciprocal_rank_fusion(ranks), ids)].tolist()


def test_the_first_rank_is_1_and_weighs_1_in_61() -> None:
    ranks = ordinal_ranks(np.array([0.2, 0.9, 0.5]), np.arange(3), highest_first=True)
    assert ranks.tolist() == [3, 1, 2]
    assert reciprocal_rank_fusion([ranks]).tolist() == [1 / 63, 1 / 61, 1 / 62]


def test_fused_scores_are_the_hand_count() -> None:
    scores = reciprocal_rank_fusion([np.array([1, 2, 3]), np.array([3, 1, 2])])
    assert scores.tolist() == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62], abs=1e-17)
    assert scores == pytest.approx([0.03226645849, 0.03252247488, 0.03200204813], abs=1e-10)


def test_another_k_is_used() -> None:
    assert reciprocal_rank_fusion([np.array([1, 2])], k=0).tolist() == [1.0, 0.5]


def test_high_rouge_l_and_low_cross_entropy_come_first() -> None:
    # ROUGE-L ranks: a 1, c 2, b 3, d 4. Cross-entropy ranks: c 1, a 2, d 3, b 4.
    # a 1/61 + 1/62 ties with c 1/62 + 1/61: the lower id goes first. b 1/63 + 1/64 ties with d likewise.
    ids = np.array([7, 5, 3, 9])  # a, b, c, d
    assert order_of_ids(np.array([0.9, 0.3, 0.8, 0.1]), np.array([2.0, 5.0, 1.0, 4.0]), ids) == [3, 7, 5, 9]


def test_a_middling_example_loses_to_one_that_is_best_somewhere() -> None:
    # Fused over ranks (1, 3), (2, 2), (3, 1): 1/61 + 1/63 > 2/62, as 1/x is convex.
    assert order_of_ids(np.array([0.9, 0.5, 0.1]), np.array([3.0, 2.0, 1.0]), np.array([0, 1, 2])) == [0, 2, 1]


def test_ties_of_a_measure_go_to_the_lower_id() -> None:
    ids = np.array([4, 2, 8, 6])
    assert ordinal_ranks(np.zeros(4), ids, highest_first=True).tolist() == [2, 1, 4, 3]
    assert ordinal_ranks(np.zeros(4), ids, highest_first=False).tolist() == [2, 1, 4, 3]
    assert ordinal_ranks(np.array([1.0, 5.0, 1.0, 5.0]), ids, highest_first=True).tolist() == [3, 1, 4, 2]


def test_ties_of_the_score_go_to_the_lower_id() -> None:
    assert easy_to_hard(np.array([0.5, 0.7, 0.5, 0.7]), np.array([3, 9, 1, 2])).tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_order_does_not_depend_on_the_order_of_the_input(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.choice(1000, size=60, replace=False)
    rouge = rng.integers(0, 8, size=60) / 8  # few values: many ties
    cross_entropy = rng.integers(0, 8, size=60) / 4
    shuffle = rng.permutation(60)
    assert order_of_ids(rouge, cross_entropy, ids) == order_of_ids(
        rouge[shuffle], cross_entropy[shuffle], ids[shuffle]
    )


@pytest.mark.parametrize("seed", range(20))
def test_ranks_are_what_a_naive_count_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, values = rng.permutation(40), rng.integers(0, 6, size=40).astype(float)
    for highest_first in (True, False):
        sign = -1 if highest_first else 1
        keys = [(sign * value, example_id) for value, example_id in zip(values, ids, strict=True)]
        wanted = [1 + sum(other < key for other in keys) for key in keys]
        assert ordinal_ranks(values, ids, highest_first=highest_first).tolist() == wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_id(bad: float) -> None:
    with pytest.raises(ValueError, match=r"example ids \[42\]"):
        ordinal_ranks(np.array([0.1, bad, 0.3]), np.array([7, 42, 9]), highest_first=True)
