"""What tools/benchmark.py measures: one training step, from the way that papers' code does it to this project's.

Each variant adds one idea to the one before it. All of them compute the same objective on the same examples: the
gradients are equal up to rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from pocl.cli.cpu import onednn_is_better, use_onednn, use_torchs_own
from pocl.common.errors import UserError
from pocl.common.files import ROOT
from pocl.data.batch import IGNORE, Batch
from pocl.data.blocks import blocks_by_length
from pocl.data.dataset import Split, load_split
from pocl.data.micro_batches import OVERHEAD_TOKENS, MicroBatchLimits, micro_batches
from pocl.data.sources import read_instructions
from pocl.losses import head as heads
from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.divergences import LOSSES
from pocl.losses.fused import never_fused
from pocl.losses.head import Head, aligned
from pocl.losses.token import StageObjective
from pocl.models.attention import attend_by_example
from pocl.models.loading import DTYPES, fuse_activations
from pocl.models.states import make_head, response_states, trunk
from pocl.models.teacher import CachedTeacher
from pocl.training.student import StudentObjective
from tools.process_data import tokenised

TEMPERATURE, KD_RATIO = 1.5, 0.8  # as in the middle of the curriculum


def _gpt2(width: int, layers: int, heads: int, vocab_size: int = 50257) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocab_size)


def _opt(width: int, layers: int, heads: int, **others: Any) -> OPTConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width}
    return OPTConfig(vocab_size=50272, **sizes, **others)


def _smollm2(layers: int) -> LlamaConfig:
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, **heads}
    return LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)


HEAD_ROWS = dict(heads.HEAD_ROWS)  # as train.py has it

# name -> (student, teacher)
PAIRS: dict[str, Callable[[], tuple[PreTrainedConfig, PreTrainedConfig]]] = {
    "gpt2": lambda: (_gpt2(768, 12, 12), _gpt2(1600, 48, 25)),
    "opt": lambda: (_opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), _opt(2560, 32, 32)),
    "small": lambda: (_gpt2(256, 4, 4), _gpt2(512, 12, 8)),
    "smollm2": lambda: (_smollm2(8), _smollm2(30)),
    "micro": lambda: (_gpt2(32, 2, 2, 500), _gpt2(48, 3, 3, 500)),
}


def build_model(config: PreTrainedConfig, *, dtype: str, device: torch.device, head_only: bool = False) -> Any:
    """A model of this shape with random weights; ``head_only``: without its layers, for what needs the head alone."""
    # Logits of about the size that a trained model has: with flat ones the divergence would hardly count.
    setattr(config, "init_std" if hasattr(config, "init_std") else "initializer_range", 2.0 / config.hidden_size**0.5)
    torch.manual_seed(config.num_hidden_layers)
    if head_only:
        config.num_hidden_layers = 0
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.eval()  # no dropout: the variants must agree


def load_examples(data_dir: Path | None, count: int, *, max_length: int, vocab_size: int) -> Split:
    """``count`` examples, drawn at random, of a processed folder or of the set that ships with the project."""
    whole = load_split(data_dir, "train", max_length=max_length) if data_dir else shipped_split(max_length)
    positions = np.flatnonzero(whole.prompt_lengths < max_length)
    if len(positions) < count:
        raise UserError(
            f"{data_dir or 'data/sample'} has {len(positions)} examples, --batch times --rounds asks for {count}"
        )
    rows = whole.table.select(np.random.default_rng(0).choice(positions, count, replace=False))

    def fitting(row: Mapping[str, Any]) -> dict[str, list[int]]:
        """The tokens of another vocabulary as some of this one: only their number matters here."""
        return {name: [token % vocab_size for token in row[name]] for name in ("prompt_ids", "response_ids")}

    return Split(rows.map(fitting), max_length)


@cache
def shipped_split(max_length: int) -> Split:
    """data/sample in the tokens of a byte-level BPE that is trained on it."""
    raw = ROOT / "data" / "sample" / "raw.jsonl"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([raw.read_text(encoding="utf-8")], vocab_size=8000, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="\n")
    table = tokenised(read_instructions(raw), tokenizer, num_workers=1)
    datasets.disable_progress_bars()
    return Split(table, max_length)


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    cached: CachedTeacher | None  # None where no variant reads it
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


def by_tokens(bench: Bench, examples: np.ndarray) -> list[np.ndarray]:
    """The project's micro-batches, by a budget of tokens."""
    return _within_budget(bench, examples, packed=False)


def by_tokens_packed(bench: Bench, examples: np.ndarray) -> list[np.ndarray]:
    """The same where no token is padding."""
    return _within_budget(bench, examples, packed=True)


def _within_budget(bench: Bench, examples: np.ndarray, *, packed: bool) -> list[np.ndarray]:
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
    labels = batch.response_labels()
    return distillation_objective(
        response_states(bench.student, batch),
        make_head(bench.student),
        _teacher_states(bench, batch, cached=variant.cached),
        variant.teacher_head(bench),
        labels,
        term=_term(),
        num_chunks=chunks_needed(len(labels), bench.chunk_tokens),
    ).loss


def module_loss(bench: Bench, batch: Batch, variant: Variant) -> Tensor:
    """The module that train.py trains, where a tied weight has one gradient."""
    module = StudentObjective(bench.student, chunk_tokens=bench.chunk_tokens, fused=variant.kernel)
    states = _teacher_states(bench, batch, cached=variant.cached)
    return module(batch, _term(), states, variant.teacher_head(bench))[0]


def _teacher_states(bench: Bench, batch: Batch, *, cached: bool) -> Tensor:
    with torch.no_grad():
        return bench.cached.states(batch) if cached else response_states(bench.teacher, batch)


def _term() -> StageObjective:
    return StageObjective(LOSSES["tfkl"].bind(), TEMPERATURE, TEMPERATURE**2, KD_RATIO)


PACKED = Variant("+ packed, no padding", by_tokens_packed, chunked_loss, cached=True, packed=True)
TIED = replace(PACKED, name="+ one tied gradient", loss=module_loss)
GELU = replace(TIED, name="+ GELU in one kernel", gelu=True)
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
    TIED,
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
    if never_fused(_term().divergence, device, DTYPES[dtype]) is None:
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


@dataclass(frozen=True)
class Work:
    """The least that one step has to do, however it is written; the teacher's trunk has run before."""

    flops: float
    bytes: float


def least_work(bench: Bench, examples: np.ndarray) -> Work:
    """Counted for one global batch: matrix products without padding, six passes over logits, seven of AdamW's.

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
    return Work(flops, (6 * tokens * head.shape[0] + 7 * parameters) * head.element_size())
