"""The rows of the paper's tables as data: which script makes each, with which flags, and where its run lies."""

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

    ``flags`` go to train.py behind the script's own; ``{results}`` in them is results/<family>.
    """

    name: str
    script: str
    run: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    teacher_text: bool = False  # trains on the teacher's answers, which seqkd/generate.sh makes


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
        rows.append(Row(f"{name} + POCL", "pocl/train.sh", f"pocl/t{divergence}", ("--type", f"t{divergence}")))
    on_policy = ("--type", "tjsd", "--on-policy", "mixed", "--replay-buffer", "1000")
    rows.append(Row("GKD", "gkd/train.sh", "gkd/jsd"))
    where = ("--output-dir", "{results}/gkd-pocl")
    rows.append(Row("GKD + POCL", "pocl/train.sh", "gkd-pocl/tjsd", (*on_policy, *where)))
    return rows


def selective_rows() -> list[Row]:
    """KD, with a curriculum (CL), with selective reliance on the teacher as well (SR).  Source: Khan, 2023.

    The teacher's confidence, or the student's own losses of training, say what is difficult.
    """
    names = {"kd": "KD"}
    for by in ("teacher", "student"):
        names |= {f"kd-cl-{by}": f"KD-CL, {by}", f"kd-cl-sr-{by}": f"KD-CL-SR, {by}"}
    return [
        Row(name, "selective/train.sh", f"selective/{row}/tfkl", environment=(("ROW", row),))
        for row, name in names.items()
    ]


def ablation_rows() -> list[Row]:
    """POCL with one part changed at a time."""
    variants = {
        "POCL": (),
        "2 subsets": ("--num-stages", "2", "--temperature", "1", "2", "--kd-ratio", "0.7", "1"),
        "8 subsets": ("--num-stages", "8", "--temperature", "1", "2", "--kd-ratio", "0.7", "1"),
        "hard to easy": ("--curriculum", "hard-to-easy"),
        "random pools": ("--curriculum", "random"),
        "no temperature ramp": ("--temperature", "1"),
        "no ratio ramp": ("--kd-ratio", "1"),
        "ROUGE-L alone": ("--difficulty", "rouge-l"),
        "cross-entropy alone": ("--difficulty", "cross-entropy"),
    }
    rows = []
    for name, flags in variants.items():
        folder = f"ablation/{name.replace(' ', '-').lower()}"
        rows.append(Row(name, "pocl/train.sh", f"{folder}/tfkl", (*flags, "--output-dir", f"{{results}}/{folder}")))
    return rows


def table_rows(table: str, *, matched: bool = False) -> list[Row]:
    """The rows of a table by its name, which is one of ``TABLES``."""
    makers = {"main": lambda: main_rows(matched=matched), "selective": selective_rows, "ablation": ablation_rows}
    return makers[table]()


TABLES = ("main", "selective", "ablation")
