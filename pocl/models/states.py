"""A model as trunk and head: hidden states at response positions, and the head that turns them into logits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pocl.common.errors import UserError
from pocl.data.batch import Batch
from pocl.losses.head import Head
from pocl.models import attention


def make_head(model: PreTrainedModel, vocab_size: int | None = None) -> Head:
    """The head of a model; ``vocab_size`` cuts off padded vocabulary entries.

    Raises UserError if the head is not a linear layer.
    """
    config, module = text_config(model), model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise UserError(f"the head of {config.model_type} is {type(module).__name__}; expected a linear layer")
    # Granite divides by logits_scaling, Cohere multiplies by logit_scale, Gemma 2 caps with a tanh.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((value for name in caps if (value := getattr(config, name, None))), None)
    return Head(module, scale, cap, vocab_size)


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The settings of the part that reads text, which is the whole of most models."""
    config: PretrainedConfig = model.config.get_text_config(decoder=True)
    return config


def trunk(model: PreTrainedModel) -> nn.Module:
    """The part that reads text, without its head: token ids in, hidden states after the final norm out."""
    # Llama 4 names no base model, and that of a multimodal model reads pictures, too.
    whole = model.base_model is model or text_config(model) is not model.config
    inner: nn.Module = model.get_decoder() if whole else model.base_model
    return getattr(model, "model", inner) if inner is model else inner


def response_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The trunk's hidden states at the positions that have a label.  -> [N, H].

    No attention mask is passed: padding is to the right of every response, where a causal trunk never looks. The
    examples of a packed batch are kept apart by ``pocl.models.attention``, or by positions (``pocl.models.packing``).
    """
    others: dict[str, Any] = {}
    if batch.position_ids is not None:
        others["position_ids"] = batch.position_ids
        if model.config._attn_implementation == attention.NAME:
            # A four-dimensional mask is passed through as it is: no other one is made.
            others |= {"segments": batch.segments, "attention_mask": batch.attention_mask[None, None]}
    output = trunk(model)(input_ids=batch.input_ids, use_cache=False, **others)
    states: Tensor = output.last_hidden_state  # [B, T, H]
    return states.flatten(0, 1).index_select(0, batch.response_positions)


@torch.no_grad()
def some_logits(model: PreTrainedModel) -> Tensor:
    """The logits of one short text, to tell two models apart.  -> [1, 8, V], float32."""
    ids = torch.arange(1, 9, device=model.device)[None] % len(model.get_input_embeddings().weight)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise UserError if trunk and head apart do not give the model's own logits, or earlier states see later tokens.

    Tried on one short sequence; ``device`` is where the model runs.
    """
    head = make_head(model)
    ids = torch.arange(1, 7, device=device)[None] % head.num_logits
    whole = model(input_ids=ids, use_cache=False).logits.float()
    states, first = (trunk(model)(input_ids=part, use_cache=False).last_hidden_state for part in (ids, ids[:, :3]))
    exact = model.dtype in (torch.float32, torch.float64)
    if torch.norm(states[:, :3] - first) > (1e-3 if exact else 0.5) * torch.norm(first):
        raise UserError(
            f"{name!r} is no causal language model ({model.config.model_type}: what it makes of a token depends on "
            f"later ones); give one, such as a GPT-2"
        )
    apart = head(states).float()
    tolerance = 1e-4 if exact else 1e-2
    close = whole.shape == apart.shape and torch.allclose(whole, apart, atol=tolerance, rtol=tolerance, equal_nan=True)
    if not close:
        raise UserError(
            f"{name!r} ({model.config.model_type}) changes its logits after the head in a way that is not known "
            f"here; add it to make_head in pocl/models/states.py"
        )
