"""Which part of POCL helps on a real pair? Arms at equal updates, several training seeds, one table.

    bash scripts/quickstart.sh --pair           # teacher and warm student: SmolLM2-135M and 8 of its layers
    python tools/study.py --seeds 10 20 30 40 50
    python tools/study.py --table               # of what is there

Every arm starts from the same student and sees as many updates of as many examples; the student ranks once, and the
arms that need a ranking share it. The last student is evaluated, chosen by nothing. Each arm and seed leaves one small
JSON in --output-dir; started again, it goes on with what is missing, or was made in another way.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main, stop_on_sigterm
from pocl.common.console import say, show_table
from pocl.common.errors import RunStopped, UserError
from pocl.common.files import ROOT, read_json, read_jsonl, value_sha256, write_json
from tools.reporting.intervals import holm, paired_t

# Four stages of two epochs over N/4, N/2, 3N/4 and N make as many updates as five epochs over N.
_POOLS = ("--num-stages", "4", "--epochs", "2")
_WHOLE = ("--curriculum", "whole-pool", "--num-stages", "1", "--epochs", "5")
_ONE_COSINE = ("--restart-optimizer", "false")
_PLAIN = ("--temperature", "1", "--kd-ratio", "0.7", *_ONE_COSINE)
ARMS: dict[str, tuple[str, ...]] = {
    "KLD": ("--type", "fkl", *_WHOLE, "--kd-ratio", "0.7"),
    "SFT": ("--type", "sft", *_WHOLE),
    "POCL": ("--type", "tfkl", *_POOLS),
    "POCL at T = 1": ("--type", "tfkl", *_POOLS, "--temperature", "1"),
    "POCL without restarts": ("--type", "tfkl", *_POOLS, *_ONE_COSINE),
    "pools, one cosine": ("--type", "tfkl", *_POOLS, *_PLAIN),
    "random pools, one cosine": ("--type", "tfkl", *_POOLS, *_PLAIN, "--curriculum", "random"),
    "exposure-matched, one cosine": ("--type", "tfkl", *_POOLS, *_PLAIN, "--curriculum", "exposure-matched"),
}
BASELINE = "KLD"
_NOT_OF_A_RESULT = ("output_dir", "work_dir", "arms", "seeds", "table")


@dataclass(frozen=True)
class StudyOptions:
    """What is compared, and where it lies."""

    _argument_group_name: ClassVar[str] = "study"
    output_dir: str = flag("folder of the results, one small JSON an arm and seed", "results/study-pair")
    work_dir: str = flag("folder of the runs, which may be deleted afterwards", "results/study-runs")
    model: str = flag("the student", "results/quickstart/warmup/sft/seed10/best")
    teacher: str = flag("the teacher", "results/quickstart/teacher/sft/seed10/best")
    data_dir: str = flag("processed data", "processed_data/quickstart/sample")
    set: str = flag("evaluation set", "sample")
    arms: list[str] = flag(f"arms: {', '.join(ARMS)}", list(ARMS), known=ARMS)
    seeds: list[int] = flag("training seeds", [10, 20, 30, 40, 50])
    num_train: int = flag("training examples, a multiple of four times the batch [examples]", 320, above=0)
    global_batch_size: int = flag("examples of an update [examples]", 8, above=0)
    lr: float = flag("peak learning rate of every arm", 5e-4, above=0)
    max_length: int = flag("prompt and response together [tokens]", 144, above=0)
    max_prompt_length: int = flag("longest prompt of the evaluation [tokens]", 100, above=0)
    table: bool = flag("print the table of what is there, and stop", False)

    def check(self) -> None:
        """Raise UserError for a number of examples with which the arms' updates would differ."""
        if self.num_train % (4 * self.global_batch_size):
            raise UserError(
                f"--num-train {self.num_train} is no multiple of 4 x {self.global_batch_size}: updates would differ"
            )


def main() -> None:
    """Run what is missing, print the table."""
    quiet_libraries()
    stop_on_sigterm()
    (what,) = parse([StudyOptions], "Compare POCL's parts on a real pair, over several training seeds.")
    for seed in [] if what.table else what.seeds:
        for arm in what.arms:
            path, how = result_path(what, arm, seed), made_by(what, arm, seed)
            if not path.is_file() or read_json(path).get("made_by") != how:
                write_json(path, run(what, arm, seed) | {"made_by": how})
                say(f"{arm}, seed {seed}: ROUGE-L {read_json(path)['rouge_l']:.1f}")
    show(what)


def result_path(what: StudyOptions, arm: str, seed: int) -> Path:
    """Where the result of an arm under a training seed lies."""
    name = "".join(letter if letter.isalnum() else "-" for letter in arm.lower())
    return Path(what.output_dir) / f"{name}-{seed}.json"


def made_by(what: StudyOptions, arm: str, seed: int) -> str:
    """What a result depends on, but for what lies in the folders."""
    others = {name: value for name, value in vars(what).items() if name not in _NOT_OF_A_RESULT}
    return value_sha256([list(ARMS[arm]), seed, others])[:16]


def run(what: StudyOptions, arm: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one arm under one seed -> its result."""
    folder = Path(what.work_dir) / result_path(what, arm, seed).stem
    flags = [*ARMS[arm], *(["--teacher", what.teacher] if arm != "SFT" else [])]
    limits = ["--sampling-temperature", 0, "--no-repeat-ngram", 0, "--max-length", what.max_length]
    ranked = value_sha256([what.model, what.data_dir, what.num_train, what.max_length])[:16]
    ranking = Path(what.work_dir) / f"difficulty-{ranked}.jsonl"
    if arm != BASELINE and "whole-pool" not in flags and "random" not in flags and ranking.is_file():
        flags += ["--difficulty-file", str(ranking)]
    command = ["--model", what.model, "--data-dir", what.data_dir, "--output-dir", folder, *flags, *limits]
    command += ["--seed", seed, "--num-train", what.num_train, "--num-dev", 0, "--lr", what.lr]
    command += ["--global-batch-size", what.global_batch_size, "--bucket-examples", 0]
    _call("train.py", *command, "--deepspeed-config", "scripts/deepspeed/zero0.json")
    (trained,) = folder.glob("*/seed*")
    if (trained / "difficulty.jsonl").is_file() and not ranking.is_file():
        shutil.copy(trained / "difficulty.jsonl", ranking)
    evaluation = ["--sets", what.set, "--seeds", 10, "--max-prompt-length", what.max_prompt_length]
    _call("evaluate.py", "--model", trained / "best", "--output-dir", trained / "eval", *evaluation, *limits)
    answers = read_jsonl(trained / "eval" / what.set / "10.jsonl")
    scores = {name: [record[name] for record in answers] for name in ("rouge_l", "exact_match")}
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    means |= {"cross_entropy": read_json(trained / "eval" / "summary.json")[what.set].get("cross_entropy")}
    ledger = read_json(trained / "ledger.json")
    shutil.rmtree(folder)  # a student of some hundred megabytes
    command_line = [str(word) for word in command]
    return {"arm": arm, "seed": seed, **means, "flags": command_line, "ledger": ledger, "prompts": scores}


def _call(program: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, str(ROOT / program), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise RunStopped(f"{program} stopped: {' '.join(last)}")


def show(what: StudyOptions) -> None:
    """Print means over seeds, and the paired difference to the baseline with its t-interval."""
    read: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in what.arms:
        paths = {seed: result_path(what, arm, seed) for seed in what.seeds}
        read[arm] = {seed: read_json(path) for seed, path in paths.items() if path.is_file()}
    rows, p_values = [], []
    for arm, results in read.items():
        values = np.array([result["rouge_l"] for result in results.values()])
        exact = [result["exact_match"] for result in results.values()]
        losses = [result.get("cross_entropy") for result in results.values()]  # none in results of earlier versions
        row = [
            arm,
            len(results),
            f"{values.mean():.1f}" if len(values) else "",
            f"{np.mean(exact):.1f}" if exact else "",
            f"{np.mean(losses):.3f}" if losses and None not in losses else "",
        ]
        shared = sorted(results.keys() & read.get(BASELINE, {}).keys())
        if arm != BASELINE and len(shared) > 1:
            differences = [results[s]["rouge_l"] - read[BASELINE][s]["rouge_l"] for s in shared]
            mean, half, p = paired_t(differences)
            p_values.append(p)
            row += [f"{mean:+.1f} ± {half:.1f}", p]
        else:
            row += ["", ""]
        rows.append(row)
    corrected = iter(holm(p_values))
    for row in rows:
        row[-1] = f"{next(corrected):.3f}" if row[-1] != "" else ""
    show_table(
        f"{what.num_train} examples, held-out {what.set}, greedy; differences over training seeds",
        ["arm", "seeds", "ROUGE-L", "exact match", "cross-entropy", f"to {BASELINE} (95 %)", "p, Holm"],
        rows,
    )


if __name__ == "__main__":
    run_main(main)
