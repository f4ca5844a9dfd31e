"""Which weights of a student are trained, and how its activations are kept."""

from torch import nn
from transformers import PreTrainedModel

from pocl.common.errors import UserError
from pocl.models.states import text_config, trunk


def recompute_activations(model: PreTrainedModel, *, enable: bool = True) -> None:
    """Gradient checkpointing on or off: keep one tensor per layer for the backward pass, recompute the rest."""
    # transformers below 5.20 has only the older names.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        arguments = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**arguments)
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer layers: the one ModuleList with as many modules as the configuration has layers.

    Raises UserError if it is not the only one.
    """
    wanted = text_config(model).num_hidden_layers
    stacks = [m for m in trunk(model).modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if len(stacks) != 1:
        raise UserError(f"{model.config.model_type} has {len(stacks)} stacks of {wanted} layers; expected one")
    return stacks[0]


def check_last_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """The stack of layers.  Raises UserError if it has fewer than these."""
    stack = layer_stack(model)
    if num_layers > len(stack):
        raise UserError(f"`train_last_layers` {num_layers}: the student has {len(stack)} layers")
    return stack


def train_only_last_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Freeze all but the last ``num_layers`` layers and the final norm, so also a head tied to the embeddings.

    The backward pass then ends at the first of these layers.  Raises UserError if there are fewer layers.
    """
    stack = check_last_layers(model, num_layers)
    model.requires_grad_(False)
    stack[-num_layers:].requires_grad_(True)
    # A sibling of the layers, which OPT keeps one module deeper than other models; projections stay frozen.
    parent = next(module for module in model.modules() if any(child is stack for child in module.children()))
    for child in parent.children():
        if not any(True for _ in child.children()) and not isinstance(child, (nn.Embedding, nn.Linear, nn.ModuleList)):
            child.requires_grad_(True)  # the final norm
