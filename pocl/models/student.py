"""A causal language model with its tokenizer: what ranks, answers and is trained."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.data.batch import Batch
from pocl.data.templates import ALPACA, Template
from pocl.losses.head import Head
from pocl.models.identity import end_ids, shared_vocabulary, used_vocabulary, weights_fingerprint
from pocl.models.loading import load_model, load_template, load_tokenizer
from pocl.models.states import check_head, make_head, response_states


@dataclass(frozen=True)
class Student:
    """A model in memory. ``path`` is the folder or hub name that its weights came from, empty if they are no longer
    those; ``most_tokens`` is how many vocabulary entries may be used, such as those that its teacher has."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str = ""
    most_tokens: int | None = None
    template: Template = ALPACA  # of the prompts that it is asked

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "fp32",
        attention: str = "auto",
        device: str | torch.device = "cpu",
        most_tokens: int | None = None,
    ) -> "Student":
        """The student of a model folder, an adapter folder (merged into its base) or a hub name, in evaluation mode.

        ``dtype`` is fp32, bf16 or fp16; ``attention`` transformers' name of an implementation, or auto.  Raises
        UserError if the folder holds no model, no safetensors or no tokenizer, or if its head is none that ``Head``
        describes.
        """
        tokenizer = load_tokenizer(path)
        model = load_model(path, dtype, attention)
        model.to(device)
        check_head(model, path, torch.device(device))
        return cls(model, tokenizer, path, most_tokens, load_template(path) or ALPACA)

    @cached_property
    def head(self) -> Head:
        """The head, cut to the tokenizer's size where the model pads its vocabulary."""
        used = used_vocabulary(self.tokenizer, self.model, self.most_tokens)
        return make_head(self.model, shared_vocabulary(used, student=self.model))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return end_ids(self.model, self.tokenizer, self.template)

    def states(self, batch: Batch) -> Tensor:
        """The hidden states after the final norm at the batch's response positions, in order.  -> [N, H]."""
        return response_states(self.model, batch)

    def fingerprint(self) -> str:
        """SHA-256 of a sample of every weight."""
        return weights_fingerprint(self.model)

    def asked_by(self, template: Template) -> "Student":
        """The same student, which ends its answers as this template does."""
        return self if template == self.template else replace(self, template=template)

    def with_model(self, model: PreTrainedModel) -> "Student":
        """The same student with another model in memory, such as one whose sharded weights were gathered."""
        return replace(self, model=model, path="")
