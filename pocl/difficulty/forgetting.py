"""How the student does on easy and on hard training examples as the curriculum proceeds."""

import statistics

import numpy as np

from pocl.common import distributed
from pocl.data.dataset import Split
from pocl.difficulty.measuring import ScoringSettings
from pocl.difficulty.student import score_block
from pocl.generation.decoding import BuiltIn
from pocl.models.student import Student

NUM_BUCKETS = 4


class BucketProbe:
    """A few fixed examples of each quarter of a ranking, from the easiest to the hardest, evaluated repeatedly.

    ``ranked`` [N] holds positions in ``train`` from the easiest to the hardest.
    """

    def __init__(
        self, train: Split, ranked: np.ndarray, *, examples_per_bucket: int, settings: ScoringSettings
    ) -> None:
        self.train, self.settings = train, settings
        self.buckets = probe_positions(ranked, examples_per_bucket)

    def measure(self, student: Student) -> dict[str, float]:
        """Mean ROUGE-L (0 to 100, greedy answers) and mean cross-entropy of each bucket; bucket 1 is the easiest."""
        was_training = student.model.training
        student.model.train(False)
        positions = np.concatenate(self.buckets)
        generator = BuiltIn(student, self.settings.batch_size)
        blocks = generator.blocks(self.train.prompt_lengths[positions])
        mine = [
            record
            for block in distributed.my_share(blocks)
            for record in score_block(student, self.train, positions[block], self.settings, generator)
        ]
        records = distributed.gather_by_id({record["id"]: record for record in mine})
        student.model.train(was_training)
        values: dict[str, float] = {}
        for number, bucket in enumerate(self.buckets, start=1):
            found = [records[i] for i in self.train.ids[bucket].tolist()]
            values[f"bucket{number}_rouge_l"] = 100.0 * statistics.fmean(record["rouge_l"] for record in found)
            values[f"bucket{number}_cross_entropy"] = statistics.fmean(record["cross_entropy"] for record in found)
        return values


def probe_positions(ranked: np.ndarray, examples_per_bucket: int) -> list[np.ndarray]:
    """For each quarter of the ranking, positions evenly spaced in it.  [N] -> at most 4 x [<= examples_per_bucket]."""
    quarters = [quarter for quarter in np.array_split(ranked, NUM_BUCKETS) if len(quarter)]
    return [
        quarter[np.linspace(0, len(quarter) - 1, min(examples_per_bucket, len(quarter))).round().astype(int)]
        for quarter in quarters
    ]
