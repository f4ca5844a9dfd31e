"""PAPER  Which examples when, at which temperature, KD ratio and learning rate (numpy alone)."""

from pocl.curriculum.schedule import CosineRate, Reliance, Schedule, Update
from pocl.curriculum.stages import CURRICULA, Curriculum, Stage, baby_step, plan_stages

__all__ = [
    "CURRICULA",
    "CosineRate",
    "Curriculum",
    "Reliance",
    "Schedule",
    "Stage",
    "Update",
    "baby_step",
    "plan_stages",
]
