"""What a table is made of: its options, its steps as script calls, and where each of them leaves what it makes."""

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocl.cli.flags import flag
from pocl.common.files import ROOT, read_json, write_json
from tools.rows import SCALES, TABLES, TEACHER, Row

PAIR = ("teacher", "warmup")  # the quickstart's runs whose students are the tiny pair
# What changes the result of the scripts, of their environment; DATA and TEACHER are said in any case.
GIVEN = ("STUDENT", "TOKENIZER", "TEACHER_BASE", "DTYPE")


@dataclass(frozen=True)
class ReproduceOptions:
    """Which rows of which table, on which models; the script of a family fills in its places."""

    _argument_group_name: ClassVar[str] = "table"
    family: str = flag("model family: a folder of scripts/")
    base_path: str = flag("folder that holds data/ processed_data/ checkpoints/ results/")
    teacher: str = flag("the teacher; where this folder is not there, it is fine-tuned from the scripts' base")
    student: str | None = flag("the student that the scripts take, to see whether it is there", None)
    teacher_base: str | None = flag("what the scripts fine-tune into the teacher, likewise", None)
    data: str = flag("name of the data: a folder of BASE_PATH/data with a raw.jsonl", "dolly")
    table: str = flag(f"which table: {', '.join(TABLES)}", "main", known=TABLES)
    scale: str = flag(
        "full; hour: all rows on less data, for one GPU; tiny: a few rows on the quickstart's pair, for a CPU",
        "full",
        known=SCALES,
    )
    rows: list[str] | None = flag("these rows only [default: all of the table, or of the scale]", None)
    sets: list[str] | None = flag(
        "evaluation sets [default: the paper's five; the valid.jsonl of other data than dolly]", None
    )
    seeds: list[int] | None = flag("one sampled answer per prompt and seed [default: 10 20 30 40 50]", None)
    train_seed: int = flag("seed of every training run, the teacher's too", 10)
    train_seeds: list[int] | None = flag(
        "train every row once under each of these seeds, on one teacher; a row is then the mean of its runs "
        "[default: --train-seed alone]",
        None,
        at_least=0,
    )
    matched: bool = flag(
        "the KD series with POCL's batch, learning rate and number of updates; where nobody says it, on unless the "
        "table is the paper's own, with its figures beside it",
        False,
    )
    plan: bool = flag("print every command with the time that it is likely to take, and run none", False)
    jobs: int = flag("rows at a time, each on a GPU of its own; 1: one after the other on all GPUs [rows]", 1, above=0)


@dataclass(frozen=True)
class Step:
    """One script call.

    ``mark`` is a file that holds the command under ``name`` once it has ended well. Where no command is noted there,
    or there is no such file, it is enough that ``made`` is there.
    """

    name: str
    script: str
    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    mark: Path | None = None
    made: Path | None = None

    def is_done(self) -> bool:
        """Whether this very command has ended well before."""
        noted = self.noted()
        return noted == self.line() if noted else self.made is not None and self.made.is_file()

    def noted(self) -> str | None:
        """The command that has ended well before, or None."""
        return read_json(self.mark).get(self.name) if self.mark and self.mark.is_file() else None

    def note(self) -> None:
        """Remember that this one has."""
        if self.mark:
            others = read_json(self.mark) if self.mark.is_file() else {}
            write_json(self.mark, others | {self.name: self.line()})

    def line(self) -> str:
        """The command as it can be pasted."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*settings, "bash", *map(shlex.quote, (self.script, *self.flags))])


class Reproduction:
    """The steps of a table, and its places."""

    def __init__(self, what: ReproduceOptions, train_flags: Sequence[str], evaluate_flags: Sequence[str]) -> None:
        self.what, self.train_flags, self.evaluate_flags = what, tuple(train_flags), tuple(evaluate_flags)
        self.scale, self.matched = SCALES[what.scale], what.matched
        usual = what.data == ReproduceOptions.data
        self.data = (self.scale.data or what.data) if usual else what.data
        self.sets = tuple(what.sets or (self.scale.sets if usual else (self.data,)))
        self.base = Path(what.base_path).resolve()
        self.results = self.base / "results" / what.family
        self.processed = self.base / "processed_data" / what.family
        self.models = {name: os.environ[name] for name in GIVEN if os.environ.get(name)}
        given = Path(what.teacher)
        if self.scale.quickstart_pair:
            pair = {name: ROOT / "results" / "quickstart" / name / "sft" / "seed10" / "best" for name in PAIR}
            self.models["STUDENT"], given = str(pair["warmup"]), pair["teacher"]
        self.teacher_given = self.scale.quickstart_pair or (given.is_dir() and not self.is_half_trained(given))
        self.teacher = given if self.teacher_given else self.run_folder(TEACHER) / "best"

    @property
    def train_seeds(self) -> list[int]:
        """Under which every row is trained."""
        return list(dict.fromkeys(self.what.train_seeds or [self.what.train_seed]))

    def run_folder(self, row: Row, seed: int | None = None) -> Path:
        """Where the run of a row lies, under this training seed (None: the teacher's)."""
        return self.results / row.run / f"seed{self.what.train_seed if seed is None else seed}"

    def is_half_trained(self, teacher: Path) -> bool:
        """Whether it is the best so far of this table's own teacher, whose training was cut off."""
        run = self.run_folder(TEACHER)
        if teacher.resolve() != (run / "best").resolve() or not (run / "config.json").is_file():
            return False
        return not ((run / "ledger.json").is_file() and read_json(run / "ledger.json")["finished"])

    def evaluation_folder(self, row: Row, seed: int | None = None) -> Path:
        """Where its evaluation lies."""
        given = row == TEACHER and self.teacher.resolve() != (self.run_folder(row) / "best").resolve()
        return self.results / "teacher-evaluation" if given else self.run_folder(row, seed) / "eval"

    def evaluation_folders(self, row: Row) -> list[Path]:
        """Where those of all its training seeds lie; there is one teacher."""
        if row == TEACHER:
            return [self.evaluation_folder(row)]
        return [self.evaluation_folder(row, seed) for seed in self.train_seeds]

    @property
    def teacher_text(self) -> Path:
        """The data whose targets are the teacher's answers; at a smaller scale they are not those of the full one."""
        return self.processed / (f"{self.data}-seqkd" + (f"-{self.what.scale}" if self.scale.generate else ""))

    def step(
        self,
        name: str,
        script: str,
        flags: Sequence[str],
        *,
        environment: Sequence[tuple[str, str]] = (),
        without: Collection[str] = (),
        mark: Path | None = None,
        made: Path | None = None,
    ) -> Step:
        """A script of the family on the base path; ``without``: variables that it does not read."""
        models = {"DATA": self.data, "TEACHER": str(self.teacher)} | self.models
        settings = [(key, value) for key, value in models.items() if key not in without]
        path = str(ROOT / "scripts" / self.what.family / script)
        return Step(name, path, (str(self.base), *flags), (*settings, *environment), mark, made)

    def preparation(self, rows: Sequence[Row]) -> list[Step]:
        """What the rows stand on: the data, the teacher, and its answers where a row trains on them."""
        steps = []
        if self.scale.quickstart_pair:
            script, made = str(ROOT / "scripts" / "quickstart.sh"), Path(self.models["STUDENT"]) / "config.json"
            steps.append(Step("pair", script, ("--pair",), (), made=made))
        made = self.processed / self.data / "manifest.json"
        steps.append(self.step("data", "tools/process_data.sh", self.scale.process, made=made))
        if not self.teacher_given:
            steps.append(self.training(TEACHER))
        if any(row.teacher_text for row in rows):
            steps.append(self.answering())
        return steps

    def answering(self) -> Step:
        """The script call that makes the teacher's answers, whoever the student is."""
        where = ("--output-dir", str(self.teacher_text)) if self.scale.generate else ()
        return self.step(
            "teacher text",
            "seqkd/generate.sh",
            (*self.scale.generate, *where),
            without=("STUDENT", "TOKENIZER", "TEACHER_BASE"),
            mark=self.teacher_text / "reproduce.json",
            made=self.teacher_text / "manifest.json",
        )

    def training(self, row: Row, seed: int | None = None) -> Step:
        """The script call that trains a row under this seed (None: the teacher's)."""
        flags = [flag.replace("{results}", str(self.results)) for flag in row.flags]
        flags += ["--data-dir", str(self.teacher_text)] if row.teacher_text and self.scale.generate else []
        flags += [*self.scale.train, *(self.scale.staged if row.staged else self.scale.unstaged)]
        flags += ["--max-steps", str(self.scale.updates)] if row.own_epochs and self.scale.updates else []
        flags += ["--seed", str(self.what.train_seed if seed is None else seed), *self.train_flags]
        mark = self.run_folder(row, seed) / "reproduce.json"
        return self.step("train", row.script, flags, environment=row.environment, mark=mark)

    def evaluation(self, row: Row, seed: int | None = None) -> Step:
        """The script call that evaluates a row."""
        model, folder = self.teacher, self.evaluation_folder(row, seed)
        if row != TEACHER:
            model = self.run_folder(row, seed) / "best"
        seeds = map(str, self.what.seeds or self.scale.seeds)
        flags = ["--sets", *self.sets, "--seeds", *seeds, "--output-dir", str(folder)]
        flags += [*self.scale.evaluate, *self.evaluate_flags]
        mark = folder / "reproduce.json"
        return self.step("evaluate", "eval/run_eval.sh", flags, environment=(("MODEL", str(model)),), mark=mark)

    def steps_of(self, row: Row) -> list[Step]:
        """Train, then evaluate, under each training seed; the teacher was trained before."""
        if row == TEACHER:
            return [self.evaluation(row)]
        return [step for seed in self.train_seeds for step in (self.training(row, seed), self.evaluation(row, seed))]
