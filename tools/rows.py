"""The rows of the paper's tables as data: which script makes each, with which flags, and where its run lies."""

import re
from dataclasses import dataclass

DIVERGENCES = {
    "KLD": "fkl",
    "RKLD": "rkl",
    "JSD": "jsd",
    "TVD": "tvd",
    "skew KLD": "sfkl",
    "reverse skew KLD": "srkl",
}


@dataclass(frozen=True)
class Row:
    """One row. ``script`` is below scripts/<family>, ``run`` below results/<family> (without the run's name).

    ``flags`` go to train.py behind the script's own; ``{results}`` in them is results/<family>. ``baseline`` names the
    row of the same table that this one is compared with.
    """

    name: str
    script: str
    run: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    teacher_text: bool = False  # trains on the teacher's answers, which seqkd/generate.sh makes
    staged: bool = False  # trains on widening pools; the other rows on all examples from the start
    baseline: str | None = None
    own_epochs: bool = False  # other pools than POCL's: a scale's epochs a stage would make other updates


TEACHER = Row("teacher", "sft/teacher.sh", "teacher/sft")


def main_rows(*, matched: bool) -> list[Row]:
    """The seventeen rows of the main table; ``matched`` gives the KD series POCL's batch, rate and updates."""
    kd = "kd-matched" if matched else "kd"
    environment = (("MATCHED", "1"),) if matched else ()
    rows = [
        TEACHER,
        Row("SFT", "sft/base.sh", "sft/sft"),
        Row("SeqKD", "seqkd/train.sh", "seqkd/sft", teacher_text=True),
    ]
    for name, divergence in DIVERGENCES.items():
        rows.append(Row(name, "kd/train.sh", f"{kd}/{divergence}", ("--type", divergence), environment))
        flags = ("--type", f"t{divergence}")
        rows.append(Row(f"{name} + POCL", "pocl/train.sh", f"pocl/t{divergence}", flags, staged=True, baseline=name))
    on_policy = ("--type", "tjsd", "--on-policy", "mixed", "--replay-buffer", "1000")
    rows.append(Row("GKD", "gkd/train.sh", "gkd/jsd"))
    where = ("--output-dir", "{results}/gkd-pocl")
    flags = (*on_policy, *where)
    rows.append(Row("GKD + POCL", "pocl/train.sh", "gkd-pocl/tjsd", flags, staged=True, baseline="GKD"))
    return rows


def selective_rows() -> list[Row]:
    """KD, with a curriculum (CL), with selective reliance on the teacher as well (SR).  Source: Khan, 2023.

    The teacher's confidence, or the student's own losses of training, say what is difficult.
    """
    names = {"kd": "KD"}
    for by in ("teacher", "student"):
        names |= {f"kd-cl-{by}": f"KD-CL, {by}", f"kd-cl-sr-{by}": f"KD-CL-SR, {by}"}
    return [
        Row(
            name,
            "selective/train.sh",
            f"selective/{row}/tfkl",
            environment=(("ROW", row),),
            staged=row != "kd",
            baseline=None if row == "kd" else names["kd"],
        )
        for row, name in names.items()
    ]


_ONE_COSINE = ("--restart-optimizer", "false")
_WHOLE = ("--curriculum", "whole-pool", "--epochs", "5")  # a stage: 3,560 updates in four, where POCL makes 3,552
_NO_RAMPS = ("--temperature", "1", "--kd-ratio", "0.7")
_STEADY = ("--recipe", "steady")  # POCL's pools alone
_PACED = ("--weighting", "paced")


def ablation_rows() -> list[Row]:
    """POCL with one part changed at a time, and with one part left, at equal updates.

    Other numbers of subsets make other numbers of updates. Their epochs a stage are those whose updates are closest
    to POCL's 3,552 (Dolly's 11,435 examples, 64 an update): with 2 subsets, an epoch of every stage is 267 updates, so
    13 make 3,471 and 14 make 3,738; with 8 it is 799, so 4 make 3,196 and 5 make 3,995; of the easiest three quarters
    334, so 10 make 3,340 and 11 make 3,674. The table marks what still differs.
    """
    ramps = ("--temperature", "1", "2", "--kd-ratio", "0.7", "1")
    variants = {
        "POCL": (),
        "2 subsets": ("--num-stages", "2", "--epochs", "13", *ramps),
        "8 subsets": ("--num-stages", "8", "--epochs", "4", *ramps),
        "hard to easy": ("--curriculum", "hard-to-easy"),
        "random pools": ("--curriculum", "random"),
        "no temperature ramp": ("--temperature", "1"),
        "T = 1.5": ("--temperature", "1.5"),
        "T = 2": ("--temperature", "2"),
        "T falling": ("--temperature", "2", "1.67", "1.33", "1"),
        "no ratio ramp": ("--kd-ratio", "1"),
        "r = 0.7": ("--kd-ratio", "0.7"),
        "ROUGE-L alone": ("--difficulty", "rouge-l"),
        "cross-entropy alone": ("--difficulty", "cross-entropy"),
        "one cosine": _ONE_COSINE,
        "T = 1, one cosine": ("--temperature", "1", *_ONE_COSINE),
        "whole pool, ramps and restarts": _WHOLE,
        "whole pool, restarts alone": (*_WHOLE, *_NO_RAMPS),
        "steady": _STEADY,
        "pools alone, hard first": (*_STEADY, "--curriculum", "hard-to-easy"),
        "pools alone, random": (*_STEADY, "--curriculum", "random"),
        "same visits shuffled": ("--curriculum", "exposure-matched"),
        "pools alone, same visits shuffled": (*_STEADY, "--curriculum", "exposure-matched"),
        "pools alone, constant rate": (*_STEADY, "--lr-schedule", "constant"),
        "forward, then reverse KL": ("--type-of-stage", "tfkl", "tfkl", "trkl", "trkl"),
        "easiest three quarters": ("--keep-share", "0.75", "--epochs", "11"),
        "PACED weights": ("--difficulty", "student", "pass-rate", *_PACED),
        "whole pool, PACED weights alone": (*_WHOLE, *_NO_RAMPS, *_ONE_COSINE, "--difficulty", "pass-rate", *_PACED),
    }
    rows = []
    for name, flags in variants.items():
        folder = f"ablation/{re.sub('[^a-z0-9.]+', '-', name.lower())}"
        where = ("--output-dir", f"{{results}}/{folder}")
        other_pools = name.startswith("whole pool") or "--keep-share" in flags
        more = {"baseline": None if name == "POCL" else "POCL", "own_epochs": other_pools}
        rows.append(Row(name, "pocl/train.sh", f"{folder}/tfkl", (*flags, *where), staged=True, **more))
    matched = (("MATCHED", "1"),)
    rows.append(Row("KLD, matched", "kd/train.sh", "kd-matched/fkl", environment=matched, baseline="POCL"))
    rows.append(Row("KLD, its own batch and rate", "kd/train.sh", "kd/fkl", baseline="POCL"))
    return rows


def table_rows(table: str, *, matched: bool = False) -> list[Row]:
    """The rows of a table by its name, which is one of ``TABLES``."""
    makers = {"main": lambda: main_rows(matched=matched), "selective": selective_rows, "ablation": ablation_rows}
    return makers[table]()


def table_baselines(table: str) -> dict[str, str]:
    """Row -> the row that it is compared with, of a table by its name."""
    return {row.name: row.baseline for row in table_rows(table) if row.baseline is not None}


TABLES = ("main", "selective", "ablation")


@dataclass(frozen=True)
class Scale:
    """How large a table is made: rows, data, and flags behind those of the scripts."""

    rows: tuple[str, ...] | None = None  # None: all
    data: str | None = None  # None: what the family's scripts say
    sets: tuple[str, ...] = ("dolly", "self-inst", "vicuna", "sinst", "uinst")
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    process: tuple[str, ...] = ()
    generate: tuple[str, ...] = ()  # of tools/generate_seqkd.py; the answers lie in a folder of the scale's name then
    train: tuple[str, ...] = ()
    staged: tuple[str, ...] = ()  # of train.py, for rows in stages
    unstaged: tuple[str, ...] = ()  # and for the others
    updates: int | None = None  # of a row in stages, where ``staged`` says its epochs
    evaluate: tuple[str, ...] = ()
    quickstart_pair: bool = False  # the quickstart's teacher and student in place of the family's


_SHORT = ("--max-length", "144", "--sampling-temperature", "0")
SCALES = {
    "full": Scale(),
    # For one GPU: every row and set on less data. The hour is an estimate from assumed rates, nobody has run it: 72 or
    # 75 updates of 64 examples at half a second, answers of at most 128 tokens, 256 or more at once, at 25 ms a token.
    # That is two minutes a row, four and a half an on-policy one, and seven for the teacher and its texts: 46 minutes.
    "hour": Scale(
        seeds=(10, 20),
        generate=("--num-train", "1000", "--max-length", "384"),
        train=("--num-train", "1000", "--num-dev", "32", "--global-batch-size", "64", "--max-length", "384"),
        staged=("--epochs", "2"),
        unstaged=("--epochs", "5"),
        updates=72,
        evaluate=("--num-examples", "100", "--max-length", "384"),
    ),
    # For two CPU cores: the quickstart's pair on a few examples. Two epochs in each of four stages are as many updates
    # as five epochs over the whole pool.
    "tiny": Scale(
        rows=("teacher", "SFT", "KLD", "KLD + POCL"),
        data="sample",
        sets=("sample",),
        seeds=(10,),
        process=("--num-dev", "60", "--max-prompt-length", "100"),
        generate=("--num-train", "64", "--max-length", "144"),
        train=("--num-train", "64", "--num-dev", "12", "--global-batch-size", "8", "--lr", "5e-4", *_SHORT)
        + ("--eval-every", "5", "--bucket-examples", "4", "--deepspeed-config", "scripts/deepspeed/zero0.json"),
        staged=("--epochs", "2"),
        unstaged=("--epochs", "5"),
        updates=40,
        evaluate=("--max-prompt-length", "100", "--num-examples", "30", *_SHORT),
        quickstart_pair=True,
    ),
}
