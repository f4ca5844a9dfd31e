"""Where a teacher's weights are: all on the device, or in CPU memory and sent to the device layer by layer.

The second is for a teacher that is larger than a GPU. Every forward pass sends all weights once, so it pays off with
the cache, which takes one pass over the data; after that only the head goes to the device.
"""

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedModel


def place(model: PreTrainedModel, device: torch.device, *, layerwise: bool) -> None:
    """Make the model run on ``device``.

    ``layerwise``: a weight is there only while its layer computes; between passes it takes up CPU memory only, and
    the model's parameters appear as tensors on the meta device.
    """
    if layerwise:
        cpu_offload(model, execution_device=device)
    else:
        model.to(device)


def place_head(model: PreTrainedModel, device: torch.device) -> None:
    """Keep only the model's head on ``device``; the rest is no longer run."""
    remove_hook_from_submodules(model)  # the weights are back on the CPU
    model.get_output_embeddings().to(device)
