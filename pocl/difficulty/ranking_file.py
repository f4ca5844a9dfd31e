"""difficulty.jsonl: a ranking as a file, one line an example, easiest first."""

from pathlib import Path

from pocl.common.errors import UserError
from pocl.common.files import read_jsonl, write_jsonl
from pocl.data.dataset import Split
from pocl.difficulty.ranking import Ranking


def write_ranking(path: Path, ranking: Ranking) -> None:
    """Write the records, easiest first."""
    write_jsonl(path, ranking.records)


def read_ranking(path: Path, train: Split) -> Ranking:
    """The ranking that a file gives of a split; a line needs only its ``id``.

    Raises UserError if the file is missing or malformed, or ranks other examples than those of the split.
    """
    records = read_jsonl(path)
    try:
        return Ranking.of(records, train.ids)
    except (ValueError, TypeError) as error:  # TypeError: an id that is a list
        raise UserError(
            f"{path} ranks {len(records)} examples, but the training split holds {len(train)} (or others); "
            f"score again without `difficulty_file`"
        ) from error
