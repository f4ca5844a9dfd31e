"""Make a whole table: process the data, fine-tune the teacher, train and evaluate every row, print the table.

    bash scripts/gpt2/reproduce.sh [BASE_PATH] [--rows SFT "KLD + POCL" ...] [--sets dolly ...] [--seeds 10 ...]
        [-- flags of train.py] [-- flags of evaluate.py]

Every step is one script call, whose output goes to results/<family>/logs. A step that is done is skipped when the
command is started again; a row that fails is reported at the end, and does not keep the others.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pocl.console import quiet_libraries, say, show_table
from pocl.errors import RunStopped, UserError, closest, run_main
from pocl.files import read_json, write_json
from pocl.flags import flag, parse
from pocl.rundir import ROOT
from pocl.tables import published_families
from tools.make_tables import WRITERS, write_tables
from tools.rows import SCALES, TABLES, TEACHER, Row, table_baselines, table_rows

PAIR = ("teacher", "warmup")  # the quickstart's runs whose students are the tiny pair


@dataclass(frozen=True)
class ReproduceOptions:
    """Which rows of which table, on which models; the script of a family fills in its places."""

    _argument_group_name: ClassVar[str] = "table"
    family: str = flag("model family: a folder of scripts/")
    base_path: str = flag("folder that holds data/ processed_data/ checkpoints/ results/")
    teacher: str = flag("the teacher; where this folder is not there, it is fine-tuned from the scripts' base")
    data: str = flag("name of the data: a folder of BASE_PATH/data with a raw.jsonl", "dolly")
    table: str = flag(f"which table: {', '.join(TABLES)}", "main")
    scale: str = flag(
        "full; hour: all rows on less data, for one GPU; tiny: a few rows on the quickstart's pair, for a CPU", "full"
    )
    rows: list[str] | None = flag("these rows only [default: all of the table, or of the scale]", None)
    sets: list[str] | None = flag("evaluation sets [default: the paper's five]", None)
    seeds: list[int] | None = flag("one sampled answer per prompt and seed [default: 10 20 30 40 50]", None)
    train_seed: int = flag("seed of every training run", 10)
    matched: bool = flag("the KD series with POCL's batch, learning rate and number of updates", False)
    plan: bool = flag("print every command with the time that it is likely to take, and run none", False)
    jobs: int = flag("rows at a time, each on a GPU of its own; 1: one after the other on all GPUs [rows]", 1)


@dataclass(frozen=True)
class Step:
    """One script call. ``done`` is a file that holds the command under ``name``, or whose being there is enough."""

    name: str
    script: str
    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    done: Path
    marks: bool = True

    def is_done(self) -> bool:
        """Whether this very command has ended well before."""
        if not self.done.is_file():
            return False
        return not self.marks or read_json(self.done).get(self.name) == self.line()

    def mark(self) -> None:
        """Remember that it has."""
        if self.marks:
            others = read_json(self.done) if self.done.is_file() else {}
            write_json(self.done, others | {self.name: self.line()})

    def line(self) -> str:
        """The command as it can be pasted."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*settings, "bash", *map(shlex.quote, (self.script, *self.flags))])


class Reproduction:
    """The steps of a table and how they are run."""

    def __init__(self, what: ReproduceOptions, train_flags: Sequence[str], evaluate_flags: Sequence[str]) -> None:
        self.what, self.train_flags, self.evaluate_flags = what, tuple(train_flags), tuple(evaluate_flags)
        self.scale = SCALES[what.scale]
        self.data = self.scale.data or what.data
        self.base = Path(what.base_path).resolve()
        self.results = self.base / "results" / what.family
        self.processed = self.base / "processed_data" / what.family
        self.models: dict[str, str] = {}
        given = Path(what.teacher)
        if self.scale.quickstart_pair:
            pair = {name: ROOT / "results" / "quickstart" / name / "sft" / "seed10" / "best" for name in PAIR}
            self.models, given = {"STUDENT": str(pair["warmup"])}, pair["teacher"]
        self.teacher_given = self.scale.quickstart_pair or (given.is_dir() and not self.is_half_trained(given))
        self.teacher = given if self.teacher_given else self.run_folder(TEACHER) / "best"
        self.lock = Lock()
        self.slots: Queue[dict[str, str]] = Queue()
        for slot in slots(what.jobs):
            self.slots.put(slot)

    def run_folder(self, row: Row) -> Path:
        """Where the run of a row lies."""
        return self.results / row.run / f"seed{self.what.train_seed}"

    def is_half_trained(self, teacher: Path) -> bool:
        """Whether it is the best so far of this table's own teacher, whose training was cut off."""
        run = self.run_folder(TEACHER)
        if teacher.resolve() != (run / "best").resolve() or not (run / "config.json").is_file():
            return False
        return not ((run / "ledger.json").is_file() and read_json(run / "ledger.json")["finished"])

    def evaluation_folder(self, row: Row) -> Path:
        """Where its evaluation lies."""
        given = row == TEACHER and self.teacher.resolve() != (self.run_folder(row) / "best").resolve()
        return self.results / "teacher-evaluation" if given else self.run_folder(row) / "eval"

    @property
    def teacher_text(self) -> Path:
        """The data whose targets are the teacher's answers; at a smaller scale they are not those of the full one."""
        return self.processed / (f"{self.data}-seqkd" + (f"-{self.what.scale}" if self.scale.generate else ""))

    def step(
        self,
        name: str,
        script: str,
        flags: Sequence[str],
        done: Path,
        *,
        environment: Sequence[tuple[str, str]] = (),
        marks: bool = True,
    ) -> Step:
        """A script of the family on the base path."""
        models = {"DATA": self.data, "TEACHER": str(self.teacher)} | self.models
        path = str(ROOT / "scripts" / self.what.family / script)
        return Step(name, path, (str(self.base), *flags), (*models.items(), *environment), done, marks)

    def preparation(self, rows: Sequence[Row]) -> list[Step]:
        """What the rows stand on: the data, the teacher, and its answers where a row trains on them."""
        steps = []
        if self.scale.quickstart_pair:
            script, done = str(ROOT / "scripts" / "quickstart.sh"), Path(self.models["STUDENT"]) / "config.json"
            steps.append(Step("pair", script, ("--pair",), (), done, marks=False))
        done = self.processed / self.data / "manifest.json"
        steps.append(self.step("data", "tools/process_data.sh", self.scale.process, done, marks=False))
        if not self.teacher_given:
            steps.append(self.training(TEACHER))
        if any(row.teacher_text for row in rows):
            where = ("--output-dir", str(self.teacher_text)) if self.scale.generate else ()
            done = self.teacher_text / "manifest.json"
            flags = (*self.scale.generate, *where)
            steps.append(self.step("teacher text", "seqkd/generate.sh", flags, done, marks=False))
        return steps

    def training(self, row: Row) -> Step:
        """The script call that trains a row."""
        flags = [flag.replace("{results}", str(self.results)) for flag in row.flags]
        flags += ["--data-dir", str(self.teacher_text)] if row.teacher_text and self.scale.generate else []
        flags += [*self.scale.train, *(self.scale.staged if row.staged else self.scale.unstaged)]
        flags += ["--seed", str(self.what.train_seed), *self.train_flags]
        done = self.run_folder(row) / "reproduce.json"
        return self.step("train", row.script, flags, done, environment=row.environment)

    def evaluation(self, row: Row) -> Step:
        """The script call that evaluates a row."""
        model = self.teacher if row == TEACHER else self.run_folder(row) / "best"
        sets, seeds = self.what.sets or self.scale.sets, map(str, self.what.seeds or self.scale.seeds)
        flags = ["--sets", *sets, "--seeds", *seeds, "--output-dir", str(self.evaluation_folder(row))]
        flags += self.scale.evaluate
        done = self.evaluation_folder(row) / "reproduce.json"
        model_is = (("MODEL", str(model)),)
        return self.step("evaluate", "eval/run_eval.sh", [*flags, *self.evaluate_flags], done, environment=model_is)

    def steps_of(self, row: Row) -> list[Step]:
        """Train, then evaluate; the teacher was trained before."""
        return [self.evaluation(row)] if row == TEACHER else [self.training(row), self.evaluation(row)]

    def unpublished(self) -> list[str]:
        """What keeps the runs from the setting of the paper's main table, by the names of flags and variables."""
        what = self.what
        differs = {
            "--scale": what.scale != "full",
            "--data": what.data != ReproduceOptions.data,
            "--seeds": set(what.seeds or self.scale.seeds) != set(SCALES["full"].seeds),
            "--train-seed": what.train_seed != ReproduceOptions.train_seed,
            "--matched": what.matched,
            "flags of train.py": bool(self.train_flags),
            "flags of evaluate.py": bool(self.evaluate_flags),
        }
        differs |= {name: bool(os.environ.get(name)) for name in ("STUDENT", "TEACHER_BASE", "TOKENIZER")}
        found = [name for name, differing in differs.items() if differing]
        if not found and Path(what.teacher).resolve() != usual_teacher(what.family, self.base):
            found.append("TEACHER")
        return found

    def published(self) -> str | None:
        """The family whose published figures belong beside the cells; None, and a line that says why, for none."""
        if self.what.table != "main" or self.what.family not in published_families():
            return None
        different = self.unpublished()
        if different:
            say(f"the paper's figures are left out: {', '.join(different)} made other runs than the paper's")
        return None if different else self.what.family

    def show_steps(self, steps: Sequence[Step]) -> None:
        """Print the commands, with the time that the last step of the same kind took here, where there was one."""
        known, expected, unknown = self.times(), 0.0, 0
        for step in steps:
            if step.is_done():
                say(f"# done: {step.line()}")
                continue
            say(step.line())
            seconds = known.get(self.kind(step))
            unknown += seconds is None
            expected += seconds or 0.0
            if seconds is not None:
                say(f"#   about {clock(seconds)}, as {self.kind(step)} took here")
        if unknown:
            say(f"# {unknown} step(s) of a kind that has not run here: time unknown (train.py --plan estimates one)")
        if expected:
            say(f"# about {clock(expected)} for the others, one after the other")

    def kind(self, step: Step) -> str:
        """What steps that take about as long have in common: script and size."""
        return f"{Path(step.script).parent.name}/{Path(step.script).name} ({self.what.scale})"

    def times(self) -> dict[str, float]:
        """Seconds that the last step of each kind took here."""
        path = self.results / "logs" / "times.json"
        return read_json(path) if path.is_file() else {}

    def run(self, title: str, steps: Sequence[Step]) -> str | None:
        """Run the steps that are not done, one after the other -> the error of the first that failed, or None."""
        slot = self.slots.get()
        try:
            for step in steps:
                if step.is_done():
                    say(f"{title}: {step.name} is done")
                    continue
                error = self.run_step(title, step, slot)
                if error:
                    return error
            return None
        finally:
            self.slots.put(slot)

    def environment(self, step: Step, slot: dict[str, str]) -> dict[str, str]:
        """What a step is started with; rows that run together do not share a port."""
        ours = {name: value for name, value in os.environ.items() if not slot or name != "MASTER_PORT"}
        return ours | dict(step.environment) | slot

    def run_step(self, title: str, step: Step, slot: dict[str, str]) -> str | None:
        """Run one step with its output in a log -> its last line where it failed."""
        log = self.results / "logs" / f"{title.replace(' ', '-').lower()}-{step.name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with open(log, "w", encoding="utf-8") as file:
            file.write(step.line() + "\n")
            file.flush()
            status = subprocess.run(
                ["bash", step.script, *step.flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment(step, slot),
            ).returncode
        seconds = time.monotonic() - started
        if status == 0:
            step.mark()
            with self.lock:
                write_json(log.with_name("times.json"), self.times() | {self.kind(step): round(seconds, 1)})
            say(f"{title}: {step.name} {clock(seconds)}")
            return None
        say(f"{title}: {step.name} FAILED after {clock(seconds)}, see {log}")
        return last_error(log)


def clock(seconds: float) -> str:
    """Minutes and seconds, as 2:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def main() -> None:
    """Plan or run all of it, then print the table."""
    quiet_libraries()
    argv, train_flags, evaluate_flags = split_arguments(sys.argv[1:])
    (what,) = parse([ReproduceOptions], "Make a whole table of the paper.", argv)
    rows = choose_rows(what)
    work = Reproduction(what, train_flags, evaluate_flags)
    preparation = work.preparation(rows)
    if os.environ.get("NNODES", "1") != "1":
        raise UserError("NNODES would do every step on every node; start a table on one node, with HOSTFILE for more")
    if what.plan or os.environ.get("DRY_RUN") == "1":
        work.show_steps([*preparation, *(step for row in rows for step in work.steps_of(row))])
        return
    error = work.run("preparation", preparation)
    if error:
        raise RunStopped(f"nothing can be trained without it: {error}")
    with ThreadPoolExecutor(what.jobs) as pool:
        errors = dict(zip(rows, pool.map(lambda row: work.run(row.name, work.steps_of(row)), rows), strict=True))
    made = {row.name: work.evaluation_folder(row) for row in rows if errors[row] is None}
    if made:
        files = [work.results / f"table-{what.table}{ending}" for ending in WRITERS]
        baselines = table_baselines(what.table)
        write_tables(made, files, f"{what.table} table", published=work.published(), baselines=baselines)
    failed = {row.name: error for row, error in errors.items() if error}
    if failed:
        show_table("rows that failed", ["row", "error"], failed.items())
        raise RunStopped(f"{len(failed)} of {len(rows)} rows failed; the same command goes on with them")


def usual_teacher(family: str, base: Path) -> Path | None:
    """The teacher that a family's scripts take where the environment names none, by a command that one prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TEACHER"} | {"DRY_RUN": "1"}
    script = ROOT / "scripts" / family / "kd" / "train.sh"
    printed = subprocess.run(["bash", str(script), str(base)], capture_output=True, text=True, env=environment)
    words = shlex.split(printed.stdout)
    return Path(words[words.index("--teacher") + 1]).resolve() if "--teacher" in words else None


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(own arguments, flags of train.py, flags of evaluate.py), which ``--`` keeps apart.

    Raises UserError for a third ``--``.
    """
    parts: list[list[str]] = [[]]
    for argument in argv:
        if argument == "--":
            parts.append([])
        else:
            parts[-1].append(argument)
    if len(parts) > 3:
        raise UserError("one '--' stands before the flags of train.py, a second before those of evaluate.py")
    own, train_flags, evaluate_flags = (*parts, [], [])[:3]
    return own, train_flags, evaluate_flags


def choose_rows(what: ReproduceOptions) -> list[Row]:
    """The rows that were asked for, in the table's order.  Raises UserError for names that are none."""
    if what.table not in TABLES:
        raise UserError(f"unknown --table {what.table!r}{closest(what.table, TABLES)} (known: {', '.join(TABLES)})")
    if what.scale not in SCALES:
        raise UserError(f"unknown --scale {what.scale!r}{closest(what.scale, SCALES)} (known: {', '.join(SCALES)})")
    if what.jobs < 1:
        raise UserError(f"--jobs is {what.jobs}; it must be above 0")
    rows = table_rows(what.table, matched=what.matched)
    names = [row.name for row in rows]
    for name in what.rows or ():
        if name not in names:
            raise UserError(f"unknown row {name!r}{closest(name, names)} (known: {', '.join(names)})")
    chosen = what.rows or (SCALES[what.scale].rows if what.table == "main" else None) or names
    return [row for row in rows if row.name in chosen]


def slots(jobs: int) -> list[dict[str, str]]:
    """What each job adds to the environment: all GPUs for one, a GPU each for several, or a share of the cores."""
    if jobs == 1:
        return [{}]
    if os.environ.get("HOSTFILE"):
        raise UserError(
            "--jobs shares the GPUs of this machine, and HOSTFILE gives every row those of others; drop one"
        )
    import torch

    count = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if count:
        if jobs > count:
            raise UserError(f"--jobs {jobs}, but {count} GPU(s) are visible here")
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": shown[i], "NUM_GPUS": "1"} for i in range(jobs)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong: the last error, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "Error", "RuntimeError"))]
    return (errors or lines)[-1]


if __name__ == "__main__":
    run_main(main)
