"""What a run reports while it trains: metrics.jsonl, trackers, and the note beside the progress bar."""

import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pocl.common import distributed
from pocl.curriculum.schedule import Update
from pocl.curriculum.stages import Stage
from pocl.training.run_folder import RunFolder
from pocl.training.trackers import Trackers

STATUS = Path("/proc/self/status")  # Linux: the peak memory of a process


class MetricsLog:
    """Records of a run; only rank 0 writes."""

    def __init__(
        self, run: RunFolder, num_stages: int, *, distils: bool, report_to: Sequence[str] = ("tensorboard",)
    ) -> None:
        self.run, self.num_stages, self.distils = run, num_stages, distils
        self._dev_note = ""
        self._trackers = Trackers(report_to, run)

    def open(self, step: int) -> None:
        """Start, or resume after optimiser step ``step``."""
        if distributed.is_main():
            self.run.path.mkdir(parents=True, exist_ok=True)
        self._trackers.open(step)

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()

    def record(self, stage: Stage, epoch: int, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl, and one point per curve."""
        if not distributed.is_main():
            return
        where = {"stage": stage.index, "epoch": epoch}
        self.run.append_metrics({"step": step} | where | dict(values))
        self._trackers.log(where | dict(values), step)

    def record_step(self, update: Update, step: int, values: Mapping[str, Any]) -> None:
        """Record an optimiser step, with the stage's pool, temperature and KD ratio."""
        stage = update.stage
        curriculum = {"pool": len(stage.pool), "temperature": stage.temperature, "kd_ratio": stage.kd_ratio}
        self.record(stage, update.epoch, step, curriculum | dict(values))

    def record_dev(self, stage: Stage, epoch: int, step: int, values: Mapping[str, Any]) -> None:
        """Record a dev evaluation; its ROUGE-L joins the note."""
        self._dev_note = f"  dev ROUGE-L {values['dev_rouge_l']:.2f}"
        self.record(stage, epoch, step, values)

    def note(self, stage: Stage, values: Mapping[str, float]) -> str:
        """The text beside the progress bar."""
        divergence = f"  D {values['divergence']:.3f}" if self.distils else ""
        return (
            f"stage {stage.index + 1}/{self.num_stages}  T {stage.temperature:.2f}  r {stage.kd_ratio:.2f}  "
            f"loss {values['loss']:.3f}{divergence}{self._dev_note}"
        )


def peak_memory_gb(device: torch.device) -> float:
    """This rank's peak memory so far: of the GPU, or of the process on the CPU.  -> GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not STATUS.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    # Rather than getrusage, whose maximum is inherited from the parent process.
    status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9
