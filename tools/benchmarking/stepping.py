"""What tools/benchmark.py measures: one training step, from the way that papers' code does it to this project's.

Each variant adds one idea to the one before it. All of them compute the same objective on the same examples: the
gradients are equal up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from pocl.cli.cpu import onednn_is_better, use_onednn, use_torchs_own
from pocl.common.errors import RunStopped
from pocl.data.batch import IGNORE, Batch
from pocl.data.blocks import blocks_by_length
from pocl.data.dataset import Split
from pocl.data.micro_batches import OVERHEAD_TOKENS, MicroBatchLimits, micro_batches
from pocl.losses import DistillationLoss, Head, HiddenStates
from pocl.losses import head as heads
from pocl.losses.fused import never_fused
from pocl.losses.head import aligned
from pocl.models.attention import attend_by_example
from pocl.models.loading import DTYPES, fuse_activations
from pocl.models.states import make_head, response_states, trunk
from pocl.models.teacher_cache import StatesCache
from tools.benchmarking.pairs import PAIRS

LOSS, TEMPERATURE, KD_RATIO = "tfkl", 1.5, 0.8  # as in the middle of the curriculum

# Largest differences from the reference, as shares: of the loss, and of the whole gradient's norm.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 1e-1)}


HEAD_ROWS = dict(heads.HEAD_ROWS)  # as train.py has it


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    cached: StatesCache | None  # None where no variant reads it
    split: Split
    batch_size: int  # examples of a micro-batch where there is no token budget
    max_tokens: int
    chunk_tokens: int
    device: torch.device

    @cached_property
    def aligned_teacher_head(self) -> Head:
        """The teacher's head as train.py has it."""
        return aligned(make_head(self.teacher))


@dataclass(frozen=True)
class Variant:
    """One way of doing the step."""

    name: str
    cut: Callable[[Bench, np.ndarray], list[np.ndarray]]  # a global batch [G] into micro-batches
    loss: Callable[[Bench, Batch, "Variant"], Tensor]  # the objective of one, summed over its response tokens
    padded_to_max: bool = False
    cached: bool = False  # whether the teacher's states come from the cache
    packed: bool = False  # whether examples lie one behind the other, and attend to themselves alone
    gelu: bool = False  # whether the activations are single kernels, as load_model has them
    aligned: bool = False  # whether heads have rows added to them, where the device wants that
    kernel: bool = False  # whether the objective is one kernel
    onednn: bool = False  # whether the products are oneDNN's, as train.py has them on this processor

    def set_up(self, bench: Bench) -> None:
        """Have this process multiply, and the models compute their activations, as the variant does."""
        (use_onednn if self.onednn else use_torchs_own)()
        for model in (bench.student, bench.teacher):
            model.set_attn_implementation("sdpa")
            if self.packed:
                attend_by_example(model)
            fuse_activations(model) if self.gelu else _as_transformers_has_them(model)
        heads.HEAD_ROWS[bench.device.type] = HEAD_ROWS[bench.device.type] if self.aligned else 1

    def teacher_head(self, bench: Bench) -> Head:
        """The teacher's head."""
        return bench.aligned_teacher_head if self.aligned else make_head(bench.teacher)


def _as_transformers_has_them(model: nn.Module) -> None:
    """Take ``fuse_activations`` back."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, NewGELUActivation())


def in_order(bench: Bench, examples: np.ndarray) -> list[np.ndarray]:
    """Micro-batches of a fixed size in the order of the shuffled data."""
    return [examples[start : start + bench.batch_size] for start in range(0, len(examples), bench.batch_size)]


def by_length(bench: Bench, examples: np.ndarray) -> list[np.ndarray]:
    """Micro-batches of a fixed size of neighbours in length."""
    return [examples[block] for block in blocks_by_length(bench.split.lengths[examples], bench.batch_size)]


def by_tokens(bench: Bench, examples: np.ndarray, *, packed: bool = False) -> list[np.ndarray]:
    """The project's micro-batches, by a budget of tokens; ``packed``: none of them is padding."""
    limits = MicroBatchLimits(bench.max_tokens, None, OVERHEAD_TOKENS[bench.device.type], packed)
    return micro_batches(examples, bench.split.lengths, limits, rank=0, world_size=1)


def naive_objective(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """(1 - r) CE + r T^2 KL(teacher || student), summed over labelled positions, by plain autograd.

    [..., V], [..., V], [...] -> [].  Every position is computed, and masked afterwards, as papers' code does it.
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    flat = labels.flatten()
    supervised = cross_entropy(student_logits.flatten(0, -2), flat, ignore_index=IGNORE, reduction="none")
    teacher_probs = torch.softmax(teacher_logits / TEMPERATURE, dim=-1)
    teacher_logp = torch.log_softmax(teacher_logits / TEMPERATURE, dim=-1)
    student_logp = torch.log_softmax(student_logits / TEMPERATURE, dim=-1)
    divergence = (teacher_probs * (teacher_logp - student_logp)).sum(-1).flatten()
    tokens = (1 - KD_RATIO) * supervised + KD_RATIO * TEMPERATURE**2 * divergence
    return (tokens * (flat != IGNORE)).sum()


def whole_loss(bench: Bench, batch: Batch, variant: Variant) -> Tensor:
    """Both models as they come, logits at every position."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with torch.no_grad():
        teacher_logits = bench.teacher(**inputs).logits
    return naive_objective(bench.student(**inputs).logits, teacher_logits, batch.labels)


def response_loss(bench: Bench, batch: Batch, variant: Variant) -> Tensor:
    """Heads and the same losses at response positions alone."""
    with torch.no_grad():
        teacher_logits = make_head(bench.teacher)(response_states(bench.teacher, batch))
    student_logits = make_head(bench.student)(response_states(bench.student, batch))
    return naive_objective(student_logits, teacher_logits, batch.response_labels())


def chunked_loss(bench: Bench, batch: Batch, variant: Variant) -> Tensor:
    """The project's objective, on hidden states alone."""
    with torch.no_grad():
        states = bench.cached.read(batch) if variant.cached else response_states(bench.teacher, batch)
    teacher = HiddenStates(states, variant.teacher_head(bench))
    student = HiddenStates(response_states(bench.student, batch), make_head(bench.student))
    loss = DistillationLoss(LOSS, chunk_tokens=bench.chunk_tokens, fused=variant.kernel)
    return loss(student, teacher, batch.response_labels(), temperature=TEMPERATURE, kd_ratio=KD_RATIO).loss


PACKED = Variant("+ packed, no padding", partial(by_tokens, packed=True), chunked_loss, cached=True, packed=True)
GELU = replace(PACKED, name="+ GELU in one kernel", gelu=True)
ONEDNN = replace(GELU, name="+ products by oneDNN", onednn=True)
ALIGNED = replace(GELU, name="+ heads of whole words", aligned=True)
KERNEL = replace(ALIGNED, name="+ objective in one kernel", kernel=True)
VARIANTS: tuple[Variant, ...] = (
    Variant("reference", in_order, whole_loss, padded_to_max=True),
    Variant("+ pad to the longest", in_order, whole_loss),
    Variant("+ sort by length", by_length, whole_loss),
    Variant("+ response positions only", by_length, response_loss),
    Variant("+ chunks, gradient forward", by_length, chunked_loss),
    Variant("+ cached teacher", by_length, chunked_loss, cached=True),
    Variant("+ token budget", by_tokens, chunked_loss, cached=True),
    PACKED,
)


def variants_of(pair: str, device: torch.device, dtype: str) -> list[Variant]:
    """The variants that run, and differ, on this pair and device in this precision."""
    shapes = PAIRS[pair]()
    found = [*VARIANTS]
    if any(getattr(shape, "activation_function", None) == "gelu_new" for shape in shapes):  # GPT-2's
        found.append(GELU)
    if device.type == "cpu" and onednn_is_better():
        found.append(ONEDNN)
    if any(shape.vocab_size % HEAD_ROWS[device.type] for shape in shapes):
        found.append(ALIGNED)
    if never_fused(DistillationLoss(LOSS).divergence, device, DTYPES[dtype]) is None:
        found.append(KERNEL)
    if not can_pack(device, dtype):  # those that came after it are built on it
        found = [variant for variant in found if not variant.packed]
    # As on text that the student has just written.
    return [*found, replace(found[-1], name="the last, teacher online", cached=False)]


def can_pack(device: torch.device, dtype: str) -> bool:
    """Whether the pairs can be packed, by the rule of ``never_packed``: flash attention takes no fp32."""
    return device.type != "cuda" or DTYPES[dtype] in (torch.bfloat16, torch.float16)


def fresh_optimizer(student: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW with its moments made. Its learning rate is 0: it does all of its work, and every variant finds the same
    weights."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def forward_backward(bench: Bench, variant: Variant, examples: np.ndarray) -> tuple[float, int]:
    """The gradient of one global batch [G] -> (objective per response token, processed tokens, padding included)."""
    num_tokens, processed = int(bench.split.num_labels[examples].sum()), 0
    losses: list[Tensor] = []
    for positions in variant.cut(bench, examples):
        batch = bench.split.batch(positions)
        if variant.padded_to_max:
            batch = pad_to(batch, bench.split.max_length)
        if variant.packed:
            batch = batch.packed()
        processed += batch.input_ids.numel()
        loss = variant.loss(bench, batch.to(bench.device), variant) / num_tokens
        loss.backward()
        losses.append(loss.detach())
    # Read once a step, as the trainer does: a GPU is waited for here, and not between micro-batches.
    return float(torch.stack(losses).double().sum()), processed


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The norm of the difference of two gradients as a share of the second one's."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    return (apart / sum(float(b.double().square().sum()) for b in wanted)) ** 0.5


def check_equal(name: str, errors: Mapping[str, float], dtype: str) -> None:
    """Raise RunStopped where a variant computes something else than the reference."""
    for (key, error), allowed in zip(errors.items(), TOLERANCE[dtype], strict=True):
        if not error <= allowed:  # also where it is not a number
            raise RunStopped(
                f"{name!r} differs from the reference: {key.replace('_', ' ')} {error:.1e}, "
                f"at most {allowed:.0e} is rounding; nothing is told of the speed"
            )


def pad_to(batch: Batch, length: int) -> Batch:
    """The batch with positions added on the right.  [B, T] -> [B, length]."""
    extra = (0, length - batch.input_ids.shape[1])
    return Batch.of(
        batch.example_ids,
        batch.num_labels,
        pad(batch.input_ids, extra),
        pad(batch.attention_mask, extra),
        pad(batch.labels, extra, value=IGNORE),
    )


def least_work(bench: Bench, examples: np.ndarray) -> tuple[float, float]:
    """(FLOP, bytes): the least that the step of one global batch [G] has to do, the teacher's trunk having run before.

    However it is written: matrix products without padding, six passes over logits, seven of AdamW's.

    A pass writes or reads a number once: student and teacher logits, and the gradient, are written and read; AdamW
    reads weight, gradient and two moments and writes three of them back.
    """
    lengths, tokens = bench.split.lengths[examples], int(bench.split.num_labels[examples].sum())
    config, head = bench.student.config, bench.student.get_output_embeddings().weight
    modules = [m for m in trunk(bench.student).modules() if not isinstance(m, nn.Embedding)]
    weights = sum(p.numel() for m in modules for p in m.parameters(recurse=False) if p.ndim == 2)
    attention = 2 * config.num_hidden_layers * config.hidden_size * int((lengths**2).sum())  # half of it is masked
    teacher_head = 2 * bench.teacher.get_output_embeddings().weight.numel() * tokens
    # Backward is twice forward: one product for the inputs and one for the weights.
    flops = 3 * (2 * weights * int(lengths.sum()) + attention + 2 * head.numel() * tokens) + teacher_head
    parameters = sum(p.numel() for p in bench.student.parameters())
    return flops, (6 * tokens * head.shape[0] + 7 * parameters) * head.element_size()
