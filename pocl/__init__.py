"""POCL: curriculum distillation of language models (arXiv 2506.05695).

    import pocl

    train    = pocl.load_split("processed_data/gpt2/dolly", "train", max_length=512)
    student  = pocl.Student.load("checkpoints/gpt2/base")
    teacher  = pocl.Teacher.open("checkpoints/gpt2/teacher-1.5B", train, cache="teacher-cache")
    ranking  = pocl.rank(train, student, signals=["student"])
    schedule = pocl.Schedule(pocl.baby_step(len(train)), ranking.order, global_batch_size=64, seed=10)
    loss     = pocl.DistillationLoss("tfkl")

One folder a room, and imports run down only (tests/test_house.py holds it):

    cli          from the command line to the parts of a run
    integrations the same in the loops of transformers and TRL
    training     stages to a student
    difficulty   how hard an example is
    evaluation   answers to scores
    generation   prompts to answers
    models       student and teacher
    curriculum   which examples when, at which temperature, KD ratio and learning rate
    losses       the objective
    data         records to batches
    common       what every room stands on

What ``__all__`` names is the public interface; it is imported when it is first used, so that ``import pocl`` loads
neither torch nor transformers. Everything else may change between versions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl.common.errors import RunStopped as RunStopped
    from pocl.common.errors import UserError as UserError
    from pocl.curriculum.schedule import CosineRate as CosineRate
    from pocl.curriculum.schedule import Reliance as Reliance
    from pocl.curriculum.schedule import Schedule as Schedule
    from pocl.curriculum.schedule import Update as Update
    from pocl.curriculum.stages import CURRICULA as CURRICULA
    from pocl.curriculum.stages import Stage as Stage
    from pocl.curriculum.stages import baby_step as baby_step
    from pocl.curriculum.stages import plan_stages as plan_stages
    from pocl.data.batch import Batch as Batch
    from pocl.data.batch import collate as collate
    from pocl.data.dataset import Split as Split
    from pocl.data.dataset import load_split as load_split
    from pocl.data.processing import encode as encode
    from pocl.data.records import load_records as load_records
    from pocl.data.templates import Template as Template
    from pocl.difficulty.measuring import ScoringSettings as ScoringSettings
    from pocl.difficulty.ranker import rank as rank
    from pocl.difficulty.ranking import Ranking as Ranking
    from pocl.difficulty.ranking import rank_examples as rank_examples
    from pocl.difficulty.ranking import reciprocal_rank_fusion as reciprocal_rank_fusion
    from pocl.difficulty.ranking_file import read_ranking as read_ranking
    from pocl.difficulty.ranking_file import write_ranking as write_ranking
    from pocl.integrations.distillation import DistillationTrainer as DistillationTrainer
    from pocl.integrations.transformers import Curriculum as Curriculum
    from pocl.losses import LOSSES as LOSSES
    from pocl.losses import DistillationLoss as DistillationLoss
    from pocl.losses import Head as Head
    from pocl.losses import HiddenStates as HiddenStates
    from pocl.losses import LossValues as LossValues
    from pocl.losses import StageObjective as StageObjective
    from pocl.models.student import Student as Student
    from pocl.models.teacher import Teacher as Teacher
    from pocl.training.run_folder import RunFolder as RunFolder
    from pocl.training.settings import TrainSettings as TrainSettings
    from pocl.training.trainer import Trainer as Trainer
    from pocl.training.trainer import TrainingData as TrainingData

__version__ = "0.2.0"

_NAMES_OF = {
    "common.errors": ("RunStopped", "UserError"),
    "curriculum.schedule": ("CosineRate", "Reliance", "Schedule", "Update"),
    "curriculum.stages": ("CURRICULA", "Stage", "baby_step", "plan_stages"),
    "data.batch": ("Batch", "collate"),
    "data.dataset": ("Split", "load_split"),
    "data.processing": ("encode",),
    "data.records": ("load_records",),
    "data.templates": ("Template",),
    "difficulty.measuring": ("ScoringSettings",),
    "difficulty.ranker": ("rank",),
    "difficulty.ranking": ("Ranking", "rank_examples", "reciprocal_rank_fusion"),
    "difficulty.ranking_file": ("read_ranking", "write_ranking"),
    "integrations.distillation": ("DistillationTrainer",),
    "integrations.transformers": ("Curriculum",),
    "losses": ("LOSSES", "DistillationLoss", "Head", "HiddenStates", "LossValues", "StageObjective"),
    "models.student": ("Student",),
    "models.teacher": ("Teacher",),
    "training.run_folder": ("RunFolder",),
    "training.settings": ("TrainSettings",),
    "training.trainer": ("Trainer", "TrainingData"),
}
_ROOM_OF = {name: room for room, names in _NAMES_OF.items() for name in names}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    """A public name, imported from its room."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'pocl' has no attribute {name!r}")
    value = getattr(import_module(f"pocl.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
