"""What a run takes, counted before any weights are loaded: tokens, matmuls, memory.

Everything here is arithmetic on lengths and on models without weights (``load_skeleton``), except
``matmul_rate``, which measures this machine. Memory is in bytes, work in floating-point operations.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from pocl.curriculum.stages import Stage
from pocl.data.dataset import Split
from pocl.losses.chunked import chunk_bytes
from pocl.models.identity import count_parameters
from pocl.models.states import trunk
from pocl.models.tuning import layer_stack, recompute_activations

_CUT_STEPS = 500  # steps of a stage's first epoch that are cut into micro-batches; the rest are like them
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size
_LIVE_ELEMENTS = 1_000_000_000  # and for stage3_max_live_parameters
_MOST_PROMPTS, _KEYS_SHARE = {"cpu": 64, "cuda": 1024}, 1 / 4
_DROPOUT = 4  # the position of dropout_p among the arguments of scaled_dot_product_attention
_MOST_TOKENS, _LEAST_TOKENS, _SAMPLE_TOKENS = 16_384, 1024, 512


@dataclass(frozen=True)
class Workload:
    """What a stage feeds through the student, over all ranks."""

    steps: int
    samples: int
    tokens: int  # without padding, as ledger.json counts them
    response_tokens: int
    padded_tokens: float
    pairs: float  # sum over samples of the padded length squared: the cost of attention
    largest: tuple[tuple[int, int], ...]  # (samples, padded length) of the micro-batches with most tokens, most pairs


def count_stage(
    stage: Stage,
    examples: Callable[[int], np.ndarray],
    split: Split,
    *,
    global_batch_size: int,
    cut: Callable[[np.ndarray], Iterable[np.ndarray]],
    num_ranks: int,
    packed: bool = False,
) -> Workload:
    """The amount of one stage.

    ``examples(epoch)`` gives the shuffled positions of the pool, ``cut`` the first rank's micro-batches of a global
    batch; the other ranks' are about the same. Padding is counted in steps spread over the first epoch;
    ``packed`` micro-batches have none.
    """
    steps = stage.steps_per_epoch(global_batch_size)
    tokens = response_tokens = 0
    for epoch in range(stage.epochs):
        seen = examples(epoch)[: steps * global_batch_size]
        tokens += int(split.lengths[seen].sum())
        response_tokens += int(split.num_labels[seen].sum())
    batches = examples(0)[: steps * global_batch_size].reshape(steps, global_batch_size)
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, _CUT_STEPS)).astype(int))
    cuts = [split.lengths[rows] for batch in batches[chosen] for rows in cut(batch)]
    shapes = [(len(lengths), int(lengths.max())) for lengths in cuts]
    if packed:  # as many rows of the longest example's length as hold all tokens
        shapes = [
            (math.ceil(lengths.sum() / length), length) for lengths, (_, length) in zip(cuts, shapes, strict=True)
        ]
        tokens_read, pairs = (sum(int((lengths**power).sum()) for lengths in cuts) for power in (1, 2))
    else:  # attention is computed for padding as well
        tokens_read, pairs = (sum(rows * length**power for rows, length in shapes) for power in (1, 2))
    scale = num_ranks * stage.epochs * steps / len(chosen)
    return Workload(
        steps=stage.steps(global_batch_size),
        samples=stage.steps(global_batch_size) * global_batch_size,
        tokens=tokens,
        response_tokens=response_tokens,
        padded_tokens=float(tokens) if packed else scale * tokens_read,
        pairs=scale * pairs,
        largest=_largest(shapes),
    )


def _largest(shapes: Collection[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    pairs = max(shapes, key=lambda shape: shape[0] * shape[1] ** 2)
    return tuple(dict.fromkeys((tokens, pairs)))


def total(amounts: Iterable[Workload]) -> Workload:
    """All stages together."""
    amounts = list(amounts)
    sums = {
        name: sum(getattr(amount, name) for amount in amounts)
        for name in ("steps", "samples", "tokens", "response_tokens", "padded_tokens", "pairs")
    }
    return Workload(**sums, largest=_largest([shape for amount in amounts for shape in amount.largest]))


def one_pass(split: Split) -> Workload:
    """Every example read once, without padding."""
    tokens, longest = int(split.lengths.sum()), int(split.lengths.max())
    pairs = float((split.lengths.astype(np.float64) ** 2).sum())
    return Workload(0, len(split), tokens, int(split.num_labels.sum()), tokens, pairs, ((1, longest),))


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its cost depends on."""

    parameters: int  # tied ones counted once
    trained: int  # trainable parameters
    itemsize: int  # bytes per parameter
    products: int  # weights of the trunk's matmuls, through which every token goes
    trained_products: int  # those of them that are trainable
    passed_products: int  # those that the backward pass goes through
    attention: int  # layers x heads x head size
    head: int  # weights of the head
    trained_head: bool
    vocab_size: int
    cached_numbers: int  # KV cache elements of one token


def sketch(model: PreTrainedModel) -> ModelSize:
    """The sizes of a model, with or without its weights."""
    config, head = model.config, model.get_output_embeddings().weight
    heads, head_size = config.num_attention_heads, _head_size(config)
    products = list(_products(trunk(model)))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    passed = products
    if trained < count_parameters(model):
        layers = list(layer_stack(model))
        first = next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), None)
        passed = [] if first is None else [weight for layer in layers[first:] for weight in _products(layer)]
    return ModelSize(
        parameters=count_parameters(model),
        trained=trained,
        itemsize=model.dtype.itemsize,
        products=_numel(products),
        trained_products=_numel(weight for weight in products if weight.requires_grad),
        passed_products=_numel(passed),
        attention=config.num_hidden_layers * heads * head_size,
        head=head.numel(),
        trained_head=head.requires_grad,
        vocab_size=head.shape[0],
        cached_numbers=cached_numbers(config),
    )


def cached_numbers(config: PretrainedConfig) -> int:
    """KV cache elements of one token, over all layers."""
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * key_heads * _head_size(config)


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def with_adapters(model: ModelSize, layers: Iterable[nn.Module], rank: int) -> ModelSize:
    """The sizes of a model whose ``layers`` get LoRA adapters and in which nothing else is trained.

    An adapter of a layer [in, out] has ``rank`` times (in + out) weights. The backward pass goes through everything.
    """
    adapters = sum(rank * sum(layer.weight.shape) for layer in layers)
    return replace(
        model,
        parameters=model.parameters + adapters,
        trained=adapters,
        products=model.products + adapters,
        trained_products=adapters,
        passed_products=model.products + adapters,
        trained_head=False,
    )


def _products(module: nn.Module) -> Iterable[Tensor]:
    """The weights of a module that enter matmuls, so without embeddings, which are looked up."""
    for part in module.modules():
        if not isinstance(part, nn.Embedding):
            yield from (weight for weight in part.parameters(recurse=False) if weight.dim() == 2)


def _numel(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def forward_work(model: ModelSize, amount: Workload, *, trunk: bool = True, head: bool = True) -> float:
    """FLOPs of a forward pass: two per weight and token, four per pair of tokens times attention's size."""
    body = 2.0 * model.products * amount.padded_tokens + 4.0 * model.attention * amount.pairs
    return body * trunk + 2.0 * model.head * amount.response_tokens * head


def training_work(model: ModelSize, amount: Workload, *, recomputes: bool) -> float:
    """FLOPs of training: forward, and backward down to the lowest trainable layer.

    ``recomputes``: the trunk is run a second time in the backward pass (gradient checkpointing).
    """
    back = 2.0 * (model.passed_products + model.trained_products) * amount.padded_tokens
    back += 8.0 * model.attention * amount.pairs * model.passed_products / max(1, model.products)
    back += 2.0 * (1 + model.trained_head) * model.head * amount.response_tokens
    again = forward_work(model, amount, head=False) if recomputes else 0.0
    return forward_work(model, amount) + back + again


def state_bytes(model: ModelSize, zero: Mapping[str, Any], *, num_ranks: int, on_gpu: bool) -> dict[str, int]:
    """Bytes that a rank holds of the student between steps, by component, under a DeepSpeed ``zero_optimization``.

    Matches the live tensors of DeepSpeed 0.19: stage 0 updates the fp32 weights themselves, the other stages keep
    fp32 master weights as well, whatever the precision. A buffer that is never filled takes no memory on the CPU.
    """
    stage = zero.get("stage", 0)
    weights, gradients = model.parameters * model.itemsize, model.trained * model.itemsize
    states = {
        "student's weights": weights // num_ranks if stage == 3 else weights,
        "gradients": gradients // num_ranks if stage >= 2 else gradients,
        "optimiser": 12 * model.trained // num_ranks if stage else 8 * model.trained,
    }
    if stage == 3:
        live = int(zero.get("stage3_max_live_parameters", _LIVE_ELEMENTS))
        states["gathered weights"] = min(model.parameters, live) * model.itemsize
    if stage and zero.get("contiguous_gradients", True):
        bucket = int(zero.get("reduce_bucket_size", _BUCKET_ELEMENTS))
        states["gradient buckets"] = (bucket if on_gpu else min(bucket, model.trained)) * model.itemsize
    for part, name in (("offload_optimizer", "optimiser"), ("offload_param", "student's weights")):
        if on_gpu and zero.get(part, {}).get("device", "none") != "none":
            states[name] = 0
    return states


class _FlashAttention(TorchFunctionMode):
    """Counts what attention on a GPU saves for the backward pass, which dropout does not change.

    Flash and memory-efficient attention redraw the dropout mask from its seed in the backward pass; on a CPU,
    attention with dropout saves three [T, T] matrices per head.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention and len(args) > _DROPOUT:
            args = (*args[:_DROPOUT], 0.0, *args[_DROPOUT + 1 :])
        elif func is scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def activation_bytes(model: PreTrainedModel, rows: int, length: int, *, device_type: str = "cpu") -> int:
    """Bytes that the trunk saves of a micro-batch for the backward pass, counted on a model without weights.

    Call it under FakeTensorMode. With gradient checkpointing, one layer at a time is recomputed on top of them.
    ``device_type`` is what the run is on; the model here is on the CPU.
    """
    with _FlashAttention() if device_type == "cuda" else nullcontext():
        return _activation_bytes(model, rows, length)


def _activation_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    checkpointing = model.is_gradient_checkpointing
    model.train()
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # OPT's decoder would draw a number and read it; its layers go on training
            module.training = False
    if not checkpointing:
        return _saved_bytes(model, rows, length)
    kept = _saved_bytes(model, rows, length)
    recompute_activations(model, enable=False)
    whole = _saved_bytes(model, rows, length)
    recompute_activations(model)
    return kept + whole // model.config.num_hidden_layers


def _saved_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no two share an address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    model.config.pad_token_id = None  # else some models look for it in the ids, which hold no data
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk(model)(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


def objective_bytes(model: ModelSize, chunk_tokens: int, device_type: str) -> int:
    """Bytes of one chunk of logits at its peak, of the head's gradient in fp32, and of the latter once more.

    This last part is the gradient of one more chunk in a lower precision, or that of embeddings tied to the head.
    """
    return chunk_bytes(chunk_tokens, model.vocab_size, device_type) + 8 * model.head * model.trained_head


def answering_bytes(model: ModelSize, num_prompts: int, max_length: int) -> int:
    """Bytes of the KV cache of prompts that are answered together."""
    return num_prompts * max_length * model.cached_numbers * model.itemsize


def prompts_at_once(numbers: int, itemsize: int, max_length: int, memory: int, device_type: str) -> int:
    """How many prompts are answered together by default: as many as fill a quarter of ``memory``.

    A token's keys and values are ``numbers`` elements of ``itemsize`` bytes. A power of two, at most 64 on the CPU,
    where 96 were 9 % faster per token than 64, which were 18 % faster than 32; at most 1,024 on a GPU, where a step
    with few prompts takes as long as one with many.
    """
    count = _MOST_PROMPTS[device_type]
    while count > 1 and count * max_length * numbers * itemsize > memory * _KEYS_SHARE:
        count //= 2
    return count


def micro_batch_tokens(student: PreTrainedModel, memory: int) -> int:
    """The default largest micro-batch on a GPU: at most 16,384 tokens, halved until it fits.

    Half of ``memory`` is for activations and for the weights, gradients and AdamW state of ``student``, at most 18
    bytes per weight; call it under FakeTensorMode.
    """
    room = memory / 2 - 18 * count_parameters(student)
    a_token = activation_bytes(student, 1, _SAMPLE_TOKENS, device_type="cuda") / _SAMPLE_TOKENS
    count = _MOST_TOKENS
    while count > _LEAST_TOKENS and count * a_token > room:
        count //= 2
    return count


def matmul_rate(width: int, dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s that matmuls [1024, width] x [width, 4 width] reach on this machine right now."""
    left = torch.randn(1024, width, device=device).to(dtype)
    right = torch.randn(width, 4 * width, device=device).to(dtype)
    count, started = 0, 0.0
    for warm in (False, True):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < (seconds if warm else seconds / 4):
            for _ in range(8 if device.type == "cuda" else 1):
                left @ right
                count += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return count * 2.0 * 1024 * width * 4 * width / (time.perf_counter() - started)
