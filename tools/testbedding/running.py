"""One arm on one seed of one regime: trained by train.py's own functions, scored, and left as a small JSON."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import scipy.stats

import pocl
from pocl.common.files import read_json, read_jsonl, value_sha256, write_json
from pocl.data.dataset import load_split
from pocl.difficulty.ranking_file import write_ranking
from pocl.evaluation.answers import evaluate, mean_scores
from pocl.evaluation.likelihood import mean_cross_entropy
from pocl.evaluation.sets import Example
from pocl.generation.decoding import BuiltIn
from pocl.generation.sampling import Sampling
from tools.testbedding.arms import UPDATES, Arm
from tools.testbedding.regimes import MAX_LENGTH, MAX_PROMPT, Bench, alone, train_here
from tools.testbedding.tasks import grades

_TOGETHER = 200  # prompts that are answered at a time
OWN_RANKING = {"--difficulty", "--rerank", "--difficulty-file"}  # an arm with one of these ranks by itself


def flags_of(arm: Arm, bench: Bench) -> list[str]:
    """The flags of train.py: the arm's own, behind those that all arms of a regime share."""
    shared = ["--model", str(bench.student), "--data-dir", str(bench.data), "--lr", str(bench.regime.lr)]
    shared += ["--global-batch-size", str(bench.batch), "--max-steps", str(UPDATES), "--seed", str(bench.seed)]
    if arm.has_teacher:
        shared += ["--teacher", str(bench.teacher), "--teacher-cache", str(bench.place / "teacher-cache")]
    if not OWN_RANKING & set(arm.flags):
        shared += ["--difficulty-file", str(bench.ranking)]
    return [*shared, *arm.flags]


def result_path(results: Path, bench: Bench, arm: Arm) -> Path:
    """Where the result of an arm lies."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in arm.name.lower())
    return results / bench.regime.name / slug / f"seed{bench.seed}.json"


def made_by(arm: Arm, bench: Bench) -> str:
    """What a result depends on."""
    return value_sha256([list(arm.flags), vars(bench.regime), vars(bench.size), bench.seed])[:16]


def read_result(results: Path, bench: Bench, arm: Arm) -> dict[str, Any] | None:
    """The result of an arm, if it is there and was made with these flags."""
    path = result_path(results, bench, arm)
    found = read_json(path) if path.is_file() else None
    return found if found and found["made_by"] == made_by(arm, bench) else None


def run_arm(results: Path, bench: Bench, arm: Arm) -> dict[str, Any]:
    """Train and score, unless another command has meanwhile; the result is written, and nothing else is left."""
    known = read_result(results, bench, arm)
    if known is not None:
        return known
    started = time.perf_counter()
    if arm.has_teacher:
        bench.make_teacher()
    agreement = make_and_rank(bench)
    folder = Path(tempfile.mkdtemp(dir=bench.place))
    try:
        run = train_here(flags_of(arm, bench), folder)
        ranking = run.first_ranking() if OWN_RANKING & set(arm.flags) else None
        agreement = agreement_of(read_jsonl(ranking), bench) if ranking else agreement
        ledger = read_json(run.path / "ledger.json")
        scores = score(pocl.Student.load(str(run.best)), bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ledger = {name: ledger[name] for name in ("optimizer_steps", "samples", "tokens", "teacher_forward_passes")}
    result = {"regime": bench.regime.name, "arm": arm.name, "seed": bench.seed, "flags": list(arm.flags)}
    result |= scores | ledger | {"agreement": agreement}
    result |= {"seconds": round(time.perf_counter() - started, 1), "made_by": made_by(arm, bench)}
    write_json(result_path(results, bench, arm), result)
    return result


def make_and_rank(bench: Bench) -> float:
    """Make data and student and rank by that, unless it was done -> how the ranking and the grade agree."""
    bench.make()
    with alone(bench.place / "making"):
        kept = bench.place / "agreement.json"
        if not kept.is_file():
            train = load_split(bench.data, "train", max_length=MAX_LENGTH)
            settings = pocl.ScoringSettings(
                max_new_tokens=MAX_LENGTH - MAX_PROMPT, no_repeat_ngram=0, batch_size=_TOGETHER
            )
            ranking = pocl.rank(train, pocl.Student.load(str(bench.student)), settings=settings)
            write_ranking(bench.ranking, ranking)
            write_json(kept, {"spearman": agreement_of(ranking.records, bench)})
        return read_json(kept)["spearman"]


def agreement_of(records: Any, bench: Bench) -> float:
    """Spearman's correlation of places, easiest first, with the known grades."""
    return float(scipy.stats.spearmanr(range(len(records)), grades([r["category"] for r in records])).statistic)


def score(student: pocl.Student, bench: Bench) -> dict[str, float]:
    """Greedy answers to the held-out prompts: ROUGE-L, exact match, and the cross-entropy of the references."""
    split = load_split(bench.data, "dev", max_length=MAX_LENGTH)
    rows = zip(split.column("id"), split.column("prompt"), split.column("response"), strict=True)
    examples = [Example(number, prompt, (response,)) for number, prompt, response in rows]
    records = evaluate(
        BuiltIn(student, _TOGETHER),
        student.tokenizer,
        examples,
        split.column("prompt_ids"),
        sampling=Sampling(MAX_LENGTH - MAX_PROMPT, temperature=0.0, no_repeat_ngram=0),
        title="held out",
    )
    scores = mean_scores(records)
    loss = mean_cross_entropy(student, split, chunk_tokens=4096)
    return {"rouge_l": scores["rouge_l"], "exact_match": scores["exact_match"], "cross_entropy": loss}
