"""Where a teacher's weights are: whole on the device, or in the CPU's memory and sent there layer by layer.

The second is for a teacher that is larger than a GPU. Every forward pass sends all weights once, so it pays with the
cache, which is one pass over the data: behind it only the head goes to the device.
"""

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedModel


def place(model: PreTrainedModel, device: torch.device, *, layerwise: bool) -> None:
    """Make the model answer on ``device``.

    ``layerwise``: a weight is there only while its layer computes; between passes it has no memory but the CPU's, and
    the model's parameters read as tensors of the meta device.
    """
    if layerwise:
        cpu_offload(model, execution_device=device)
    else:
        model.to(device)


def place_head(model: PreTrainedModel, device: torch.device) -> None:
    """Leave only the model's head on ``device``, whole; the rest is not run any more."""
    remove_hook_from_submodules(model)  # the weights are the CPU's again
    model.get_output_embeddings().to(device)
