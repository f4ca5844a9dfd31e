"""temp"""

from pocl.losses.divergences import loss_type
from pocl.losses.token import StageObjective


class DistillationLoss:
    def __init__(self, name, *, scaling="uniform", skew=0.1, teacher_weight=0.1):
        self.kind = loss_type(name)
        self.divergence = None if self.kind is None else self.kind.bind(skew=skew, teacher_weight=teacher_weight)
        self.power = 0 if self.kind is None else self.kind.power(scaling)

    def objective(self, temperature=1.0, kd_ratio=1.0):
        if self.divergence is None:
            return StageObjective()
        return StageObjective(self.divergence, temperature, temperature**self.power, kd_ratio)
