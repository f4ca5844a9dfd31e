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
    from pocl.common.errors import RunStopped, UserError
    from pocl.curriculum.schedule import CosineRate, Reliance, Schedule, Update
    from pocl.curriculum.stages import CURRICULA, Stage, baby_step, plan_stages
    from pocl.data.batch import Batch, collate
    from pocl.data.dataset import Split, load_split
    from pocl.difficulty.measuring import ScoringSettings
    from pocl.difficulty.ranker import rank
    from pocl.difficulty.ranking import Ranking, rank_examples, reciprocal_rank_fusion
    from pocl.losses import LOSSES, DistillationLoss, Head, HiddenStates, LossValues, StageObjective
    from pocl.models.student import Student
    from pocl.models.teacher import Teacher
    from pocl.training.run_folder import RunFolder
    from pocl.training.settings import TrainSettings
    from pocl.training.trainer import Trainer, TrainingData

__version__ = "0.1.0"

_ROOM_OF = {
    "RunStopped": "common.errors",
    "UserError": "common.errors",
    "CosineRate": "curriculum.schedule",
    "Reliance": "curriculum.schedule",
    "Schedule": "curriculum.schedule",
    "Update": "curriculum.schedule",
    "CURRICULA": "curriculum.stages",
    "Stage": "curriculum.stages",
    "baby_step": "curriculum.stages",
    "plan_stages": "curriculum.stages",
    "Batch": "data.batch",
    "collate": "data.batch",
    "Split": "data.dataset",
    "load_split": "data.dataset",
    "rank": "difficulty.ranker",
    "Ranking": "difficulty.ranking",
    "rank_examples": "difficulty.ranking",
    "reciprocal_rank_fusion": "difficulty.ranking",
    "ScoringSettings": "difficulty.measuring",
    "DistillationLoss": "losses",
    "Head": "losses",
    "HiddenStates": "losses",
    "LOSSES": "losses",
    "LossValues": "losses",
    "StageObjective": "losses",
    "Student": "models.student",
    "Teacher": "models.teacher",
    "RunFolder": "training.run_folder",
    "TrainSettings": "training.settings",
    "Trainer": "training.trainer",
    "TrainingData": "training.trainer",
}

__all__ = [
    "CURRICULA",
    "LOSSES",
    "Batch",
    "CosineRate",
    "DistillationLoss",
    "Head",
    "HiddenStates",
    "LossValues",
    "Ranking",
    "Reliance",
    "RunFolder",
    "RunStopped",
    "Schedule",
    "ScoringSettings",
    "Split",
    "Stage",
    "StageObjective",
    "Student",
    "Teacher",
    "TrainSettings",
    "Trainer",
    "TrainingData",
    "Update",
    "UserError",
    "baby_step",
    "collate",
    "load_split",
    "plan_stages",
    "rank",
    "rank_examples",
    "reciprocal_rank_fusion",
]


def __getattr__(name: str) -> Any:
    """A public name, imported from its room."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'pocl' has no attribute {name!r}")
    value = getattr(import_module(f"pocl.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
