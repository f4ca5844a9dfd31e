"""Kill runs at random moments, start them again, and compare what they leave with a run that nobody killed.

    python -m tests.faults                                # 200 kills over all cases
    python -m tests.faults --kills 20 --cases pocl lora   # fewer

Prints a line a case, and ends with status 1 where a run was lost.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.cases import CASES, Case
from tests.faults.killing import Whole, import_everything, killed_run, whole_run
from tests.runs import Folders, make_folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills over all cases together")
    parser.add_argument("--kills-per-run", type=int, default=4, help="kills before a run is left to end")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; those that are times differ all the same")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    given = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="pocl-faults-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return walk(given, folder, random.Random(given.seed))


def walk(given: argparse.Namespace, folder: Path, chance: random.Random) -> int:
    """Kill until the number is reached, case after case -> exit status."""
    started = time.monotonic()
    shutil.rmtree(folder / "inputs", ignore_errors=True)
    folders = make_folders(folder / "inputs", "gpt2")
    kills, lost = dict.fromkeys(given.cases, 0), dict.fromkeys(given.cases, 0)
    for number, name in enumerate(given.cases):
        whole = whole_run(CASES[name], folders, folder / name / "whole")
        share = given.kills // len(given.cases) + (number < given.kills % len(given.cases))
        runs = 0
        while kills[name] < share and runs < 3 * share + 5:  # some end before they can be killed
            wanted = min(given.kills_per_run, share - kills[name])
            made, complaint = one(CASES[name], folders, folder / name / f"run-{runs}", whole, wanted, chance)
            kills[name], runs = kills[name] + made, runs + 1
            if complaint:
                lost[name] += 1
                print(f"LOST  {CASES[name].title}, run {runs}: {complaint}", flush=True)
        print(f"{CASES[name].title}: {kills[name]} kills in {runs} runs, {lost[name]} lost", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{sum(kills.values())} kills, {sum(lost.values())} runs lost, {minutes:.1f} minutes", flush=True)
    return 1 if any(lost.values()) or sum(kills.values()) < given.kills else 0


def one(
    case: Case, folders: Folders, folder: Path, whole: Whole, wanted: int, chance: random.Random
) -> tuple[int, str]:
    """One run, killed up to ``wanted`` times and then left to end -> (kills, what is wrong with it or nothing)."""
    made, found = killed_run(case, folders, folder, whole, kills=wanted, chance=chance)
    if isinstance(found, str):
        return made, found
    different = sorted(name for name in {*found, *whole.left} if found.get(name) != whole.left.get(name))
    return made, f"{', '.join(different)} differ from the run that nobody killed" if different else ""


if __name__ == "__main__":
    sys.exit(main())
