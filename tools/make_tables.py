"""Print the results of several runs as one table, and write it as Markdown.

    python tools/make_tables.py --rows "SFT=results/gpt2/sft/sft/seed10" "POCL=results/gpt2/pocl/tfkl/seed10" \\
        --output results/table.md
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pocl.console import quiet_libraries, say, show_table
from pocl.errors import UserError, run_main
from pocl.files import write_text
from pocl.flags import flag, parse
from pocl.tables import METRICS, markdown, results_table


@dataclass(frozen=True)
class TableOptions:
    """Which runs."""

    _argument_group_name: ClassVar[str] = "table"
    rows: list[str] = flag("NAME=FOLDER, one a row: a run folder, or a folder that evaluate.py wrote")
    output: str | None = flag("Markdown file to write", None)
    title: str = flag("title of the table", "results (mean over prompts; ± spread over seeds)")


def main() -> None:
    """Read, print, write."""
    quiet_libraries()
    (what,) = parse([TableOptions], "Print the results of several runs as one table.")
    rows = {}
    for row in what.rows:
        name, equals, folder = row.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"--rows {row!r}: give NAME=FOLDER")
        rows[name] = Path(folder)
    texts = []
    for metric in METRICS:
        columns, body = results_table(rows, metric)
        show_table(f"{METRICS[metric]}: {what.title}", columns, body)
        texts.append(markdown(columns, body))
    if what.output:
        write_text(Path(what.output), "\n".join(texts))
        say(f"written to {what.output}")


if __name__ == "__main__":
    run_main(main)
