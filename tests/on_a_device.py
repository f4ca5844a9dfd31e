"""Micro-batches and answers on a device that is not the CPU: what would wait for it, or mix it up with the CPU?

    python tests/on_a_device.py

The device is torch's place for others' backends, its tensors are FakeTensors: shapes and types without numbers.
Whoever asks for one of the numbers, as a program does that waits for its GPU, gets an exception, and so does an
operation on tensors of two devices. What stays on the CPU is computed as ever. Prints what each case raised, as JSON.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from pocl.data.dataset import Split
from pocl.difficulty.training_losses import TrainingLosses
from pocl.generation.decoding import Decoder
from pocl.generation.reading import takes_whole_masks
from pocl.generation.sampling import Sampling
from pocl.losses.chunked import BLOCK_NUMBERS, LossValues
from pocl.losses.divergences import LOSSES
from pocl.losses.head import HEAD_ROWS, aligned
from pocl.losses.token import StageObjective
from pocl.models.attention import attend_by_example
from pocl.models.states import make_head, response_states
from pocl.models.teacher import Teacher
from pocl.models.teacher_cache import StatesCache
from pocl.training.batches import MicroBatch
from pocl.training.student import Factors, StudentInTraining
from tests.parts import module_of
from tests.tiny import FAMILIES, tiny_model

NAME = "elsewhere"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)


class WaitedFor(Exception):
    """A tensor of the device was brought to the CPU."""


class OnTheDevice(TorchDispatchMode):
    """What concerns the device becomes fake; everything else is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        here = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        target = kwargs.get("device")
        if here and target is not None and torch.device(target).type == "cpu":
            raise WaitedFor(str(func))
        if not here and (target is None or torch.device(target).type != NAME):
            return func(*args, **kwargs)
        if not here:  # onto the device
            args = tree_map_only(Tensor, self.fake.from_tensor, args)
        with self.fake:
            return func(*args, **kwargs)


class PlainEngine:
    """What the trainer asks of its engine, without DeepSpeed."""

    zero_stage, scales_loss = 0, False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, *inputs: Any) -> LossValues:
        """Run the module."""
        return LossValues(*self.module(*inputs))

    def backward(self, loss_sum: Tensor, num_tokens: float) -> None:
        """Add the gradient."""
        (loss_sum * (1.0 / num_tokens)).backward()


def make_split() -> Split:
    """Six examples."""
    rows = [{"prompt_ids": [5 + i] * (3 + i), "response_ids": [40 + i, 9, 7, 0][i % 2 :]} for i in range(6)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"id": list(range(6)), "num_prompt_tokens": [len(row["prompt_ids"]) for row in rows]}
    return Split(
        datasets.Dataset.from_dict(columns | {"num_response_tokens": [len(row["response_ids"]) for row in rows]}), 16
    )


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights on the device. ``to`` would swap tensors, which fake ones do not like."""
    known: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in known:
                    there = tensor.detach().to(DEVICE)
                    known[tensor] = nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there
                tensors[name] = None if tensor is None else known[tensor]  # type: ignore[assignment]
    return model


def micro_batch(
    family: str,
    term: StageObjective,
    *,
    teacher: str = "online",
    reliance: bool = False,
    on_policy: bool = False,
    packed: bool = False,
    split: Split,
    folder: Path,
) -> None:
    """One micro-batch of the trainer, forward and backward."""
    shape = {"vocab_size": 600, "end_id": 0}
    student, other = tiny_model(family, **shape), tiny_model(family, num_layers=3, width=48, seed=1, **shape)
    for model in (student, other):
        attend_by_example(model)
        moved(model)
    source: Teacher | None = None
    if teacher == "online":
        source = Teacher(aligned(make_head(other)), partial(response_states, other), DEVICE, "", other)
    elif teacher == "cached":
        width = make_head(other).module.in_features
        np.zeros((int(split.num_labels.sum()), width), np.float32).tofile(folder / "states.bin")
        source = Teacher(aligned(make_head(other)), StatesCache(folder, split, other).read, DEVICE, "")
    learner: Any = object.__new__(StudentInTraining)  # whose engine is not DeepSpeed
    learner.teacher, learner.device, learner.student_cross_entropy = source, DEVICE, False
    learner.engine = PlainEngine(module_of(student, 8))
    factor = Factors(np.linspace(0, 1, 6), None) if reliance else None
    positions = np.array([4, 1, 2])
    batch = split.batch(positions).packed() if packed else split.batch(positions)
    of_student = np.array([False, True, False]) if on_policy else np.zeros(3, dtype=bool)
    states = source.states(batch.to(DEVICE)) if teacher == "cached" and source else None
    micro = MicroBatch(positions, of_student, batch.to(DEVICE), states)
    sums, cross_entropy = learner.forward_backward(micro, term, factor, 9)
    TrainingLosses(len(split)).note(positions, of_student, micro.batch, cross_entropy)
    assert sums.device == DEVICE and sums.shape == (3,)
    assert {parameter.grad.device for parameter in student.parameters()} == {DEVICE}


def answering(family: str, sampling: Sampling) -> None:
    """The first columns of answers to three prompts."""
    model = tiny_model(family, vocab_size=600, end_id=0).eval()
    attend_by_example(model)
    assert takes_whole_masks(model)  # tried where there are numbers
    moved(model)
    decoder = Decoder(model, [[5, 6, 7], [8] * 9, [4]], [3, 1, 2], sampling, [0, 9])
    with torch.no_grad():
        for step in range(3):
            decoder.add_column(make_head(model), step)
    assert decoder.answers.device == DEVICE and decoder.length == 9 + 3


def cases() -> dict[str, Callable[[], object]]:
    """Every case by its name."""
    split, folder = make_split(), Path(tempfile.mkdtemp())
    kd = StageObjective(LOSSES["tfkl"].bind(), 1.5, 2.25, 0.7)
    shared = {"split": split, "folder": folder}
    found: dict[str, Callable[[], object]] = {}
    for family in FAMILIES:
        found[f"{family}, online"] = lambda family=family: micro_batch(family, kd, **shared)
        found[f"{family}, packed"] = lambda family=family: micro_batch(family, kd, packed=True, **shared)
        found[f"{family}, cached"] = lambda family=family: micro_batch(family, kd, teacher="cached", **shared)
        for kind, sampling in (("greedy", Sampling(8, temperature=0.0)), ("sampled", Sampling(8, top_p=0.9, top_k=9))):
            found[f"{family}, {kind}"] = lambda family=family, sampling=sampling: answering(family, sampling)
    found["sft"] = lambda: micro_batch("gpt2", StageObjective(), teacher="none", **shared)
    found["selective reliance"] = lambda: micro_batch("gpt2", kd, teacher="cached", reliance=True, **shared)
    found["on-policy"] = lambda: micro_batch("gpt2", kd, on_policy=True, packed=True, **shared)
    for name, loss in LOSSES.items():
        term = StageObjective(loss.bind(), 1.5 if loss.tempered else 1.0, 1.0, 0.7)
        found[name] = lambda term=term: micro_batch("gpt2", term, **shared)
    # What has to be noticed.
    found["a number is asked for"] = lambda: bool(torch.ones(2, device=DEVICE).isfinite().all())
    found["a tensor is brought here"] = lambda: torch.ones(2, device=DEVICE).cpu()
    found["a mask counts"] = lambda: torch.ones(2, device=DEVICE)[torch.ones(2, device=DEVICE) > 0]
    found["two devices"] = lambda: torch.ones(2, device=DEVICE) + torch.ones(2)
    return found


def main() -> None:
    """Try every case."""
    BLOCK_NUMBERS[NAME], HEAD_ROWS[NAME] = BLOCK_NUMBERS["cuda"], HEAD_ROWS["cuda"]
    raised = {}
    with OnTheDevice():
        for name, case in cases().items():
            try:
                case()
                raised[name] = None
            except Exception as error:
                raised[name] = f"{type(error).__name__}: {error}"[:400]
    print(json.dumps(raised))


if __name__ == "__main__":
    main()
