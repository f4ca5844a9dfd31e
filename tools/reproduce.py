"""Make a whole table: process the data, fine-tune the teacher, train and evaluate every row, print the table.

    bash scripts/gpt2/reproduce.sh [BASE_PATH] [--rows SFT "KLD + POCL" ...] [--sets dolly ...] [--seeds 10 ...]
        [--train-seeds 10 20 30] [-- flags of train.py] [-- flags of evaluate.py]

Every step is one script call, whose output goes to results/<family>/logs. A step that is done is skipped when the
command is started again; a row that fails is reported at the end, and does not keep the others.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock

from pocl.cli.flags import parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say, show_table
from pocl.common.errors import RunStopped, UserError, closest
from pocl.common.files import read_json, write_json
from tools.reproducing.needs import what_is_missing
from tools.reproducing.results import unpublished, write_table
from tools.reproducing.steps import ReproduceOptions, Reproduction, Step
from tools.rows import SCALES, Row, table_rows

OF_ROWS = ("MATCHED", "ROW")  # variables that a row sets where it wants them


class Runner:
    """Runs steps, each with its output in a log of its own, several rows at a time."""

    def __init__(self, logs: Path, scale: str, jobs: int) -> None:
        self.logs, self.scale, self.jobs = logs, scale, jobs
        self.lock = Lock()
        self.slots: Queue[dict[str, str]] = Queue()
        for slot in slots(jobs):
            self.slots.put(slot)

    def run_rows(self, work: Reproduction, rows: Sequence[Row]) -> dict[Row, str | None]:
        """Train and evaluate rows -> the error of each, or None."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(rows, pool.map(lambda row: self.run(row.name, work.steps_of(row)), rows), strict=True))

    def kind(self, step: Step) -> str:
        """What steps that take about as long have in common: script and size."""
        return f"{Path(step.script).parent.name}/{Path(step.script).name} ({self.scale})"

    def times(self) -> dict[str, float]:
        """Seconds that the last step of each kind took here."""
        path = self.logs / "times.json"
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
        left_out = (*OF_ROWS, *(["MASTER_PORT"] if slot else []))
        ours = {name: value for name, value in os.environ.items() if name not in left_out}
        return ours | dict(step.environment) | slot

    def run_step(self, title: str, step: Step, slot: dict[str, str]) -> str | None:
        """Run one step with its output in a log -> its last line where it failed."""
        log = self.logs / f"{title.replace(' ', '-').lower()}-{step.name.replace(' ', '-')}.log"
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
            step.note()
            with self.lock:
                write_json(log.with_name("times.json"), self.times() | {self.kind(step): round(seconds, 1)})
            say(f"{title}: {step.name} {clock(seconds)}")
            return None
        say(f"{title}: {step.name} FAILED after {clock(seconds)}, see {log}")
        return last_error(log)

    def show(self, steps: Sequence[Step]) -> None:
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


def clock(seconds: float) -> str:
    """Minutes and seconds, as 2:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def main() -> None:
    """Plan or run all of it, then print the table."""
    quiet_libraries()
    argv, train_flags, evaluate_flags = split_arguments(sys.argv[1:])
    (what,) = parse([ReproduceOptions], "Make a whole table of the paper.", argv)
    work = Reproduction(what, train_flags, evaluate_flags)
    if not any(word.split("=")[0] == "--matched" for word in argv):
        work.matched = bool(unpublished(work))  # a table that is not the paper's compares its rows with each other
    rows = choose_rows(what, matched=work.matched)
    runner = Runner(work.results / "logs", what.scale, what.jobs)
    if os.environ.get("NNODES", "1") != "1":
        raise UserError("NNODES would do every step on every node; start a table on one node, with HOSTFILE for more")
    preparation = work.preparation(rows)
    steps = [*preparation, *(step for row in rows for step in work.steps_of(row))]
    missing = what_is_missing(work, steps)
    if what.plan or os.environ.get("DRY_RUN") == "1":
        runner.show(steps)
        for sentence in missing:
            say(f"# missing: {sentence}")
        return
    if missing:
        raise UserError(f"nothing was run: {'; '.join(missing)}")
    error = runner.run("preparation", preparation)
    if error:
        raise RunStopped(f"nothing can be trained without it: {error}")
    errors = runner.run_rows(work, rows)
    made = [row for row in rows if errors[row] is None]
    if made:
        write_table(work, made)
    failed = {row.name: error for row, error in errors.items() if error}
    if failed:
        show_table("rows that failed", ["row", "error"], failed.items())
        raise RunStopped(f"{len(failed)} of {len(rows)} rows failed; the same command goes on with them")


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


def choose_rows(what: ReproduceOptions, *, matched: bool) -> list[Row]:
    """The rows that were asked for, in the table's order.  Raises UserError for names that are none."""
    rows = table_rows(what.table, matched=matched)
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
