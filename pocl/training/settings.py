"""How a run trains, as plain values."""

from dataclasses import dataclass, field

from pocl.data.micro_batches import MicroBatchLimits
from pocl.training.engine import OptimiserSettings
from pocl.training.on_policy import OnPolicy


@dataclass(frozen=True)
class TrainSettings:
    """How the steps of a schedule are made, and what is measured and kept between them."""

    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    limits: MicroBatchLimits = MicroBatchLimits(max_tokens=4096, batch_size=None, overhead=64)
    max_new_tokens: int = 256  # of a response that the student samples during training
    on_policy: OnPolicy | None = None  # when the student's own text is trained on; None: never
    patience: int | None = None  # dev evaluations without a rise that end a stage early; None: nothing does
    eval_every: int = 1  # epochs
    log_every: int = 1  # steps
    bucket_examples: int = 16  # examples per difficulty bucket that are evaluated at each stage's end; 0: none
    keep_stages: bool = False  # save the student at each stage's end
    max_skipped_steps: int = 0  # that may be skipped because a loss or gradient is not finite
    report_to: tuple[str, ...] = ("tensorboard",)  # trackers beside metrics.jsonl
