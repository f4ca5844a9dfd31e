"""ROUGE-L is rouge-score's to the last bit; the published answers have the published scores."""

import random
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pocl.common.errors import UserError
from pocl.common.files import read_jsonl
from pocl.evaluation.answers import mean_scores, score_answers
from pocl.evaluation.metrics import chrf, exact_match, metric_named, rouge_l, rouge_n, token_f1
from pocl.evaluation.sets import Example, load_set

WORD_LIST = (
    "the a run runs running runner studies study 3.14 42 U.S. don't e-mail naïve café 北京 Москва ünïcode flies fly "
    "generously general , . ... !? -- ( ) \u2028 \u00a0 \t \n ’ “quoted” x y z aa 𝒜 ﬁ ß İ _ under_score"
)
WORDS = WORD_LIST.split(" ")


@pytest.fixture(scope="module")
def scorer() -> RougeScorer:
    """The reference."""
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


@pytest.fixture(scope="module")
def dolly(shared_data: Path) -> list[Example]:
    """The 500 prompts of DollyEval."""
    return load_set(shared_data, "dolly")


def published_answers(shared_data: Path, seed: int) -> list[str]:
    """The published student's answers, in the order of the set."""
    return [record["text"] for record in read_jsonl(shared_data / "published" / f"dolly-seed{seed}.jsonl")]


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_rouge_l_of_published_answers_is_rouge_scores_to_the_last_bit(
    scorer: RougeScorer, shared_data: Path, dolly: list[Example], seed: int
) -> None:
    answers = published_answers(shared_data, seed)
    assert len(answers) == len(dolly) == 500
    for example, answer in zip(dolly, answers, strict=True):
        wanted = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in example.references)
        assert rouge_l(answer, example.references) == wanted


@pytest.mark.parametrize(("seed", "rouge", "exact"), [(10, 24.2393, 2.8), (20, 24.8958, 2.6), (30, 24.427, 2.6)])
def test_published_answers_have_the_published_scores(
    shared_data: Path, dolly: list[Example], seed: int, rouge: float, exact: float
) -> None:
    means = mean_scores(score_answers(dolly, published_answers(shared_data, seed)))
    assert round(means["rouge_l"], 4) == rouge
    assert means["exact_match"] == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_rouge_l_of_random_text_is_rouge_scores_to_the_last_bit(scorer: RougeScorer, seed: int) -> None:
    rng = random.Random(seed)
    scores = []
    for _ in range(500):
        words = rng.choices(WORDS, k=rng.choice([1, 2, 5, 20]))
        reference = rng.choice([" ", "", "\n"]).join(rng.choices(words, k=rng.choice([0, 1, 1, 3, 10, 30])))
        answer = rng.choice([" ", "  ", "-"]).join(rng.choices(words, k=rng.choice([0, 1, 1, 3, 10, 30])))
        scores.append(rouge_l(answer, [reference]))
        assert scores[-1] == scorer.score(reference, answer)["rougeL"].fmeasure, (reference, answer)
    assert min(scores) == 0.0 and max(scores) == 1.0 and len(set(scores)) > 50


def test_rouge_l_of_random_characters_is_rouge_scores_to_the_last_bit(scorer: RougeScorer) -> None:
    rng = random.Random(0)
    for _ in range(500):
        reference, answer = ("".join(rng.choices("abAB01 .,'é\u2003\n", k=rng.randrange(25))) for _ in range(2))
        assert rouge_l(answer, [reference]) == scorer.score(reference, answer)["rougeL"].fmeasure, (reference, answer)


@pytest.mark.parametrize("n", [1, 2])
def test_rouge_n_is_rouge_scores_to_the_last_bit(
    scorer: RougeScorer, shared_data: Path, dolly: list[Example], n: int
) -> None:
    scores = []
    for example, answer in zip(dolly, published_answers(shared_data, 10), strict=True):
        wanted = max(scorer.score(reference, answer)[f"rouge{n}"].fmeasure for reference in example.references)
        scores.append(rouge_n(answer, example.references, n))
        assert scores[-1] == wanted
    assert len(set(scores)) > 50


@pytest.mark.parametrize("n", [1, 2])
def test_rouge_n_of_random_text_is_rouge_scores_to_the_last_bit(scorer: RougeScorer, n: int) -> None:
    rng = random.Random(n)
    for _ in range(500):
        words = rng.choices(WORDS, k=rng.choice([1, 2, 5]))
        reference, answer = (" ".join(rng.choices(words, k=rng.choice([0, 1, 2, 3, 12]))) for _ in range(2))
        assert rouge_n(answer, [reference], n) == scorer.score(reference, answer)[f"rouge{n}"].fmeasure


def test_rouge_n_is_the_hand_count() -> None:
    assert rouge_n("the big cat", ["the cat sat"], 1) == pytest.approx(2 / 3)
    assert rouge_n("a b c", ["a b d", "b c a"], 2) == pytest.approx(1 / 2)


def test_rouge_l_is_the_hand_count() -> None:
    # The longest common subsequence of "the cat sat" and "the big cat" is "the cat": both shares are 2/3.
    assert rouge_l("the big cat", ["the cat sat"]) == pytest.approx(2 / 3, abs=1e-15)
    # 1 of 1 tokens of the answer, 1 of 4 of the reference: 2 * 1 * 0.25 / 1.25.
    assert rouge_l("dogs", ["one dog ran away"]) == pytest.approx(0.4, abs=1e-15)


def test_rouge_l_of_nothing_is_0() -> None:
    for answer, reference in (("", ""), ("", "a word"), ("a word", ""), ("...", "..."), ("北京", "北京")):
        assert rouge_l(answer, [reference]) == 0.0


def test_rouge_l_takes_the_best_reference() -> None:
    answer, poor, good = "the big cat", "one dog ran away", "the cat sat"
    for references in ([poor, good], [good, poor], [good]):
        assert rouge_l(answer, references) == pytest.approx(2 / 3, abs=1e-15)


def test_rouge_l_of_real_multiple_references_is_the_best_of_rouge_score(
    scorer: RougeScorer, shared_data: Path
) -> None:
    examples = [example for example in load_set(shared_data, "sinst") if len(example.references) > 1][:100]
    assert len(examples) == 100
    for example in examples:
        answer = example.prompt[-200:]
        wanted = scorer.score_multi(example.references, answer)["rougeL"].fmeasure
        assert rouge_l(answer, example.references) == wanted


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Paris", "paris", True),
        ("  Paris. ", "paris", True),
        ("New\n York!", "new york", True),
        ("e-mail", "email", True),
        ("Paris France", "Paris", False),
        ("", "Paris", False),
        ("café", "cafe", False),
        ("the Paris", "Paris", False),
    ],
)
def test_exact_match_ignores_case_punctuation_and_white_space(answer: str, reference: str, equal: bool) -> None:
    assert exact_match(answer, [reference]) is equal


def test_exact_match_takes_any_reference() -> None:
    assert exact_match("Paris", ["London", "Paris."])
    assert not exact_match("Paris", ["London", "Rome"])


def test_chrf_is_the_hand_count_of_character_ngrams() -> None:
    # 3 of 4 characters, 2 of 3 pairs, 1 of 2 triples, none of 1.
    assert chrf("ab cd", ["abce"]) == pytest.approx((3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
    # Precision 1; recall 2/3 of characters and 1/2 of pairs, and a triple that the answer is too short for.
    assert chrf("ab", ["abc", "xyz"]) == pytest.approx(5 * (7 / 12) / (4 + 7 / 12))
    assert chrf("北京上海", ["北京 上海"]) == 1.0 and chrf("", ["a"]) == chrf("x", ["y"]) == 0.0


def test_token_f1_is_the_hand_count_of_shared_words_without_articles() -> None:
    assert token_f1("The cat sat.", ["a cat", "dogs"]) == pytest.approx(2 / 3)  # 1 of 2, 1 of 1
    assert token_f1("it is, it is", ["it was"]) == pytest.approx(2 * (1 / 4) * (1 / 2) / (3 / 4))
    assert token_f1("the", ["an"]) == 1.0 and token_f1("", ["word"]) == 0.0
    assert token_f1("北京", ["北海"], "unicode") == pytest.approx(1 / 2)


def test_a_metric_that_there_is_not_is_refused() -> None:
    assert metric_named("chrf") == "chrf"
    for name, told in (
        ("chrff", "did you mean 'chrf'"),
        ("nowhere:score", "No module named"),
        ("math:f1", "no metric"),
    ):
        with pytest.raises(UserError, match=told):
            metric_named(name)
