"""The teacher as a source of hidden states at response positions, and a head that turns them into logits.

Online, the teacher's trunk reads every batch. Cached, it has read every training text once and is gone: its states
come from disk (``teacher_cache``), and only its head is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batch import Batch
from pocl.data.dataset import Split
from pocl.losses.head import Head, aligned
from pocl.models.identity import shared_vocabulary, used_vocabulary, weights_fingerprint
from pocl.models.loading import load_model, load_tokenizer
from pocl.models.offload import place, place_head
from pocl.models.states import check_head, make_head, response_states
from pocl.models.teacher_cache import open_cache


@dataclass(frozen=True)
class Teacher:
    """A frozen model, or what is left of it: its head and the states that it would compute."""

    head: Head
    read: Callable[[Batch], Tensor]  # the states after the final norm at the response positions.  -> [N, H]
    device: torch.device
    fingerprint: str  # of the weights
    model: PreTrainedModel | None = None  # what reads every batch; None if the states come from elsewhere

    @classmethod
    def open(
        cls,
        path: str,
        train: Split | None = None,
        *,
        cache: str | Path | None = None,
        dtype: str = "fp32",
        attention: str = "auto",
        device: str | torch.device = "cpu",
    ) -> "Teacher":
        """The teacher of a model folder, adapter folder or hub name: online, or with its states of ``train`` cached.

        ``cache`` is a folder, where the states are read if they are there already and else made, over all ranks.
        Raises UserError if there is no model, if its head is none that ``Head`` describes, or if the folder holds
        something else or the disk has no room.
        """
        model = load_model(path, dtype, attention)
        teacher = cls.of(model, torch.device(device), num_tokens=used_vocabulary(load_tokenizer(path), model))
        check_head(model, path, torch.device(device))
        return teacher if cache is None or train is None else teacher.cached(train, Path(cache))

    @classmethod
    def of(
        cls, model: PreTrainedModel, device: torch.device, *, num_tokens: int | None = None, layerwise: bool = False
    ) -> "Teacher":
        """A loaded model, frozen and on ``device``, as an online teacher.

        ``num_tokens`` is the tokenizer's size, to which padded vocabulary entries are cut; ``layerwise`` keeps the
        weights in CPU memory and sends them to the device layer by layer.
        """
        fingerprint = weights_fingerprint(model)
        model = model.eval().requires_grad_(False)
        place(model, device, layerwise=layerwise)
        return cls(_head(model, num_tokens), lambda batch: response_states(model, batch), device, fingerprint, model)

    @property
    def online(self) -> bool:
        """Whether ``states`` runs the teacher's trunk."""
        return self.model is not None

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """The hidden states after the final norm at the batch's response positions, in order.  -> [N, H].

        Raises KeyError if the states are cached and the batch holds another example.
        """
        return self.read(batch)

    def cached(self, train: Split, folder: Path) -> "Teacher":
        """The same teacher with its states of ``train`` in ``folder``: afterwards only its head is on the device."""
        if self.model is None:
            return self
        model, num_tokens = self.model, self.head.vocab_size
        cache = open_cache(model, train, folder, self.device, key={"teacher": self.fingerprint} | train.key)
        place_head(model, self.device)
        return Teacher(_head(model, num_tokens), cache.read, self.device, self.fingerprint)


def _head(model: PreTrainedModel, num_tokens: int | None) -> Head:
    vocab_size = None if num_tokens is None else shared_vocabulary(num_tokens, teacher=model)
    return aligned(make_head(model, vocab_size))
