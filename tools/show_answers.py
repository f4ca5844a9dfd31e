"""Print some prompts with the answers of several models and their ROUGE-L, to see what the numbers mean.

python tools/show_answers.py --set sample --rows "before=results/a/eval" "after=results/b/eval"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import show_table
from pocl.common.errors import UserError, closest
from pocl.common.files import read_json, read_jsonl
from pocl.evaluation.sets import load_set
from tools.make_tables import named_folders
from tools.reporting.scores import answers_file, evaluation_of


@dataclass(frozen=True)
class AnswersOptions:
    """Whose answers to which prompts."""

    _argument_group_name: ClassVar[str] = "answers"
    set: str = flag("evaluation set")
    rows: list[str] = flag("NAME=FOLDER, one a model: folders that evaluate.py wrote")
    seed: int | None = flag("sampling seed whose answers are shown [default: the first there is]", None)
    num_examples: int = flag("prompts to show, spread over the set [examples]", 5)
    data_root: str = flag("folder that holds the evaluation sets", "data")


def main() -> None:
    """Read, pick prompts, print."""
    quiet_libraries()
    (what,) = parse([AnswersOptions], "Print some prompts with the answers of several models.")
    answers = {}
    for name, folder in named_folders(what.rows):
        answers[name] = {record["id"]: record for record in read_jsonl(answers_path(folder, what.set, what.seed))}
    shared = sorted(set.intersection(*(set(records) for records in answers.values())))
    examples = {example.id: example for example in load_set(Path(what.data_root), what.set)}
    stride = max(1, len(shared) // max(1, what.num_examples))
    for example_id in shared[::stride][: what.num_examples]:
        example = examples[example_id]
        rows = [["reference", example.references[0], ""]]
        for name, records in answers.items():
            record = records[example_id]
            rows.append([name, shorten(record["answer"]), f"{record['rouge_l']:.0f}"])
        show_table(shorten(question(example.prompt, " | "), 300), ["", "answer", "ROUGE-L"], rows)


def answers_path(folder: Path, name: str, seed: int | None) -> Path:
    """The per-example file of one set and seed, or of the first seed that summary.json names.

    Raises UserError where there is none.
    """
    place = evaluation_of(folder)
    summary = read_json(place / "summary.json")
    if name not in summary:
        here = f"{closest(name, summary)} (here are: {', '.join(summary)})"
        raise UserError(f"{place} holds no answers to {name!r}{here}; run evaluate.py --sets {name} first")
    seeds = list(summary[name]["rouge_l"]["seeds"])
    if seed is not None and str(seed) not in seeds:
        raise UserError(f"{place} holds no answers to {name} of --seed {seed}; its seeds are {' '.join(seeds)}")
    return answers_file(place, name, seeds[0] if seed is None else seed)


def question(prompt: str, between: str = "\n\n") -> str:
    """The instruction and input of a prompt, without the words around them."""
    text = prompt.partition("### Instruction:\n")[2].rpartition("\n\n### Response:")[0] or prompt
    return text.replace("\n\n### Input:\n", between)


def shorten(text: str, length: int = 200) -> str:
    """The text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


if __name__ == "__main__":
    run_main(main)
