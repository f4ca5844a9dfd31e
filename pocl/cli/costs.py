"""What a run holds in memory, in bytes, counted before any weights are loaded.

Everything here is arithmetic on sizes and on models without weights (``load_skeleton``).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from pocl.losses.chunked import chunk_bytes
from pocl.models.identity import count_parameters
from pocl.models.states import text_config, trunk
from pocl.models.tuning import recompute_activations

_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size
_LIVE_ELEMENTS = 1_000_000_000  # and for stage3_max_live_parameters
_MOST_PROMPTS, _KEYS_SHARE = {"cpu": 64, "cuda": 1024}, 1 / 4
_KEEP_NO_KEYS = ("linear_attention", "conv", "mamba", "mlp", "moe")  # layers that a text's length does not change
_MOST_TOKENS, _LEAST_TOKENS, _SAMPLE_TOKENS = 16_384, 1024, 512


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its memory depends on."""

    parameters: int  # tied ones counted once
    trained: int  # trainable parameters
    itemsize: int  # bytes per parameter
    head: int  # weights of the head
    trained_head: bool
    vocab_size: int
    cached_numbers: int  # KV cache elements of one token

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.itemsize


def model_size(model: PreTrainedModel) -> ModelSize:
    """The sizes of a model, with or without its weights."""
    head = model.get_output_embeddings().weight
    return ModelSize(
        parameters=count_parameters(model),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        itemsize=model.dtype.itemsize,
        head=head.numel(),
        trained_head=head.requires_grad,
        vocab_size=head.shape[0],
        cached_numbers=cached_numbers(model.config),
    )


def cached_numbers(config: PretrainedConfig) -> int:
    """KV cache elements of one token, over all layers; recurrent ones keep nothing that grows with the text."""
    text = config.get_text_config(decoder=True)
    if not getattr(text, "num_attention_heads", None):
        return 0
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    num_layers = sum(kind not in _KEEP_NO_KEYS for kind in kinds)
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * num_layers * key_heads * head_size)


def state_bytes(model: ModelSize, zero: Mapping[str, Any], *, num_ranks: int, on_gpu: bool) -> dict[str, int]:
    """Bytes that a rank holds of the student between steps, by component, under a DeepSpeed ``zero_optimization``.

    Matches the live tensors of DeepSpeed 0.19: stage 0 updates the fp32 weights themselves, the other stages keep
    fp32 master weights as well, whatever the precision. A buffer that is never filled takes no memory on the CPU.
    """
    stage = zero.get("stage", 0)
    weights, gradients = model.weights, model.trained * model.itemsize
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


class _Countable(TorchFunctionMode):
    """Has attention save for the backward pass what it saves on a GPU, if the run is ``on_gpu``, and counts experts.

    Flash and memory-efficient attention redraw the dropout mask from its seed in the backward pass; on a CPU,
    attention with dropout saves three [T, T] matrices per head. A product with the experts' weights saves what one
    with a single expert's does; torch has it without data in bfloat16 only.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._grouped_mm:
            return args[0] @ args[1][0]
        drops = func is scaled_dot_product_attention and self.on_gpu
        return func(*args, **{**(kwargs or {}), **({"dropout_p": 0.0} if drops else {})})  # transformers names it


def activation_bytes(model: PreTrainedModel, rows: int, length: int, *, device_type: str = "cpu") -> int:
    """Bytes that the trunk saves of a micro-batch for the backward pass, counted on a model without weights.

    Call it under FakeTensorMode. With gradient checkpointing, one layer at a time is recomputed on top of them.
    ``device_type`` is what the run is on; the model here is on the CPU.
    """
    model.train()
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # OPT's decoder would draw a number and read it; its layers go on training
            module.training = False
    with _Countable(on_gpu=device_type == "cuda"):
        kept = _saved_bytes(model, rows, length)
        if not model.is_gradient_checkpointing:
            return kept
        recompute_activations(model, enable=False)
        whole = _saved_bytes(model, rows, length)
    recompute_activations(model)
    return kept + whole // int(text_config(model).num_hidden_layers)


def _saved_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no two share an address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    text_config(model).pad_token_id = None  # else some models look for it in the ids, which hold no data
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
