"""What a difficulty signal is made of: the columns that it ranks by, and what it is measured with.

Light to import: the command line and the reports only list the signals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from pocl.common.resumable_pass import ResumablePass
    from pocl.data.dataset import Split
    from pocl.evaluation.words import RougeTokenizer
    from pocl.generation.vllm_backend import Backend
    from pocl.models.student import Student
    from pocl.models.teacher import Teacher

Source = Literal["student", "teacher", "training", "data"]  # what tells how hard an example is
Values = dict[int, dict[str, Any]]  # what was measured, by example id and column


@dataclass(frozen=True)
class Column:
    """A measure of difficulty, one column of difficulty.jsonl."""

    label: str  # in reports and figures
    unit: str
    source: Source
    highest_is_easiest: bool = False


@dataclass(frozen=True)
class ScoringSettings:
    """How a pass over the training examples is made: what its result depends on, and how much is done at once."""

    max_new_tokens: int = 256  # of an answer
    no_repeat_ngram: int = 6  # size of n-grams that an answer may not repeat; 0: no ban
    batch_size: int = 32  # prompts that are answered together
    chunk_tokens: int = 1024  # response tokens whose logits are in memory together
    backend: Backend = "builtin"  # what generates
    rouge_tokenizer: RougeTokenizer = "rouge"  # what ROUGE takes for words
    samples: int = 4  # answers of a pass rate

    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        names = ("max_new_tokens", "no_repeat_ngram", "rouge_tokenizer")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Request:
    """What the signals may measure with; None is what the caller has not."""

    train: Split
    student: Student | None = None
    teacher: Teacher | None = None
    losses: np.ndarray | None = None  # [N] of training, NaN where an example had none
    settings: ScoringSettings = ScoringSettings()
    folder: Path | None = None  # where passes are kept until all are done

    def resumable(self, source: Source, **key: Any) -> ResumablePass:
        """A pass over the examples, which resumes in the folder if there is one; ``key`` is what it depends on."""
        from pocl.common.resumable_pass import ResumablePass

        if self.folder is None:
            return ResumablePass(None, key)
        return ResumablePass(self.folder / source, key | self.train.key)
