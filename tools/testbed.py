"""Does an idea help? Arms of training at equal updates on small graded tasks, in minutes, with intervals over seeds.

    bash scripts/testbed.sh --quick                                        # 4 arms, 5 seeds
    bash scripts/testbed.sh --quick --arm "mine: --curriculum one-pass --num-stages 4 --kd-ratio 0.7"
    bash scripts/testbed.sh                                                # all arms, 10 seeds, three regimes

Tasks, tokenizer, teacher and students are made from scratch (tools/testbedding/). An arm is a name and flags of
train.py, and is trained by train.py's own functions. Each result is one small JSON; started again, it goes on.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from pocl.cli import cpu, process
from pocl.cli.checks import parse_train
from pocl.cli.flags import flag, parse
from pocl.common.console import CONSOLE, Progressing, say, show_table
from pocl.common.errors import UserError
from pocl.common.files import write_json
from tools.testbedding import showing
from tools.testbedding.arms import ARMS, Arm, choose_arms
from tools.testbedding.comparing import COLUMNS, Row, compare, notes, text_rows
from tools.testbedding.regimes import REGIMES, SHARED, USUAL, Bench, Size
from tools.testbedding.running import flags_of, make_and_rank, read_result, run_arm
from tools.testbedding.workers import Work, workers

SEEDS, QUICK_SEEDS = tuple(range(10, 101, 10)), (10, 20, 30, 40, 50)


@dataclass(frozen=True)
class TestbedOptions:
    """What is compared."""

    _argument_group_name: ClassVar[str] = "testbed"
    regime: list[str] | None = flag(
        f"{'; '.join(f'{name}: {regime.title}' for name, regime in REGIMES.items())} [default: all; --quick: P]",
        None,
        known=REGIMES,
    )
    arms: list[str] | None = flag("arms by name [default: all; --list names them]", None)
    arm: list[str] = flag('an arm of your own: "NAME: FLAGS of train.py", behind those that all arms share', [])
    seeds: list[int] | None = flag("seeds of data, models and shuffling [default: 10 20 … 100; --quick: … 50]", None)
    quick: bool = flag("four arms, five seeds, regime P", False)
    jobs: int | None = flag("processes, one thread each [default: one a core]", None, above=0)
    output_dir: str = flag("folder of the results", "results/testbed")
    list: bool = flag("print the arms and their flags, and stop", False)


def main() -> None:
    """Run what is missing, then print, draw and write the page."""
    process.quiet_libraries()
    process.stop_on_sigterm()
    (what,) = parse([TestbedOptions], "Compare ways to train on small graded tasks.")
    if what.list:
        show_table("arms", ["arm", "flags of train.py"], [[arm.name, arm.text] for arm in ARMS])
        return
    arms = choose_arms(what.arms, what.arm, quick=what.quick)
    names = what.regime or (["P"] if what.quick else list(REGIMES))
    seeds = what.seeds or (QUICK_SEEDS if what.quick else SEEDS)
    folder = Path(what.output_dir)
    compare_all(arms, benches_of(folder, names, seeds), folder, jobs=what.jobs or os.cpu_count() or 1)


def benches_of(folder: Path, regimes: Sequence[str], seeds: Sequence[int], size: Size = USUAL) -> list[Bench]:
    """The benches of these regimes and seeds."""
    return [Bench(folder / "benches", REGIMES[name], seed, size) for name in regimes for seed in seeds]


def compare_all(arms: Sequence[Arm], benches: Sequence[Bench], folder: Path, *, jobs: int) -> dict[str, list[Row]]:
    """Run what is missing of all arms on all benches; print and write what is there then -> rows by regime.

    Raises UserError for an arm whose flags train.py would refuse, before anything is made.
    """
    for arm in arms:
        check_flags(arm, benches[0])
    results = folder / "outcomes"
    missing = [(bench, arm) for bench in _by_seed(benches) for arm in arms if read_result(results, bench, arm) is None]
    unmade = [bench for bench in benches if any(bench is other for other, _ in missing) and not bench.is_made]
    planned, done = phases(results, unmade, missing), len(arms) * len(benches) - len(missing)
    with Progressing("testbed", done + sum(map(len, planned)), done) as progress, doing(jobs) as each:
        for phase in planned:
            for result in each(phase):
                progress.advance(1, f"{result['regime']}, seed {result['seed']}: {result['arm']}" if result else "")
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for bench in benches:
        for arm in arms:
            result = read_result(results, bench, arm)
            if result:
                found.setdefault(bench.regime.name, {}).setdefault(arm.name, {})[bench.seed] = result
    return show({name: compare(arms, of_regime) for name, of_regime in found.items()}, found, arms, folder)


def phases(results: Path, unmade: Sequence[Bench], missing: Sequence[tuple[Bench, Arm]]) -> list[list[Work]]:
    """What to do at once, and then: while one process trains the teacher, the others do what needs none."""
    work: list[Work] = [(run_arm, results, bench, arm) for bench, arm in missing]
    first: list[Work] = [(_make, bench) for bench in unmade]
    taught = [bench for bench, arm in missing if arm.has_teacher and not bench.has_teacher]
    if not taught:
        return [first, work]
    alone = [one for one in work if not one[-1].has_teacher]
    return [[(_teach, taught[0]), *first, *alone], [one for one in work if one not in alone]]


def check_flags(arm: Arm, bench: Bench) -> None:
    """Raise UserError for flags that train.py would refuse."""
    try:
        parse_train([*SHARED, *flags_of(arm, bench), "--output-dir", "results"])
    except UserError as error:
        raise UserError(f"arm {arm.name!r}: {error}") from error


def show(rows: dict[str, list[Row]], found: dict[str, Any], arms: Sequence[Arm], folder: Path) -> dict[str, list[Row]]:
    """Print a table a regime; write picture, page and all results in one file."""
    for regime, of_regime in rows.items():
        show_table(f"{regime}: {REGIMES[regime].title}", COLUMNS, text_rows(of_regime), in_blocks=True)
    for note in notes([row for of_regime in rows.values() for row in of_regime]):
        say(note)
    everything = [result for of in found.values() for seeds in of.values() for result in seeds.values()]
    write_json(folder / "outcomes.json", everything)
    say(f"written: {', '.join(str(path) for path in [*showing.save(rows, arms, folder), folder / 'outcomes.json'])}")
    return rows


def _by_seed(benches: Sequence[Bench]) -> list[Bench]:
    """So that a run that is stopped has whole seeds."""
    return sorted(benches, key=lambda bench: bench.seed)


def _make(bench: Bench) -> None:
    make_and_rank(bench)


def _teach(bench: Bench) -> None:
    bench.make_teacher()


@contextmanager
def doing(jobs: int) -> Iterator[Callable[[Sequence[Work]], Iterator[Any]]]:
    """What does work in ``jobs`` processes, or here if that is 1, and gives each result as it comes."""
    if jobs > 1:
        with workers(jobs, begin_unheard) as each:
            yield each
        return
    begin()
    yield lambda phase: map(_here, phase)


def begin() -> None:
    """Make this process one that trains with one thread.

    torch's own products: oneDNN's compile a kernel for each shape, which takes longer than these models' products.
    """
    process.quiet_libraries()
    torch.set_num_threads(1)
    process.start()
    cpu.use_torchs_own()


def begin_unheard() -> None:
    """The same for one of several, which prints nothing."""
    begin()
    CONSOLE.file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives


def _here(work: Work) -> Any:
    """Do it in this process; what it says is not said."""
    CONSOLE.quiet = True
    try:
        return work[0](*work[1:])
    finally:
        CONSOLE.quiet = False


if __name__ == "__main__":
    process.run_main(main)
    process.stop()
