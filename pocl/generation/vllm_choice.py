"""vLLM computes the logits, the project chooses the tokens: a logits processor that leaves one token possible.

Imported inside vLLM's environment only. So temperature, top-p, top-k, the ban of repeated n-grams, the padded
vocabulary and the random numbers of an example mean what they mean in the built-in loop, in every version of vLLM.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from pocl.generation.sampling import NgramBan, Sampling, can_choose, example_uniforms, next_tokens, not_finite


class _Answer:
    """One answer under way. ``tokens`` is vLLM's own list, which grows by each token that it accepts."""

    def __init__(self, params: Any, prompt: list[int] | None, tokens: list[int]) -> None:
        request = params.extra_args
        self.vocab_size: int = request["vocab_size"]
        self.sampling = Sampling(**request["sampling"])
        self.uniforms = example_uniforms(request["example_id"], self.sampling)
        self.tokens = tokens
        self.ban = NgramBan(prompt or [], self.sampling.no_repeat_ngram)
        self.num_banned = 0

    def catch_up(self) -> None:
        """Feed the ban the tokens accepted since; one chosen for a partly read prompt is discarded."""
        for token in self.tokens[self.num_banned :]:
            self.ban.append(token)
        self.num_banned = len(self.tokens)


class ChooseToken(LogitsProcessor):
    """Sets every logit except the chosen token's to minus infinity; vLLM then decodes greedily."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.answers: dict[int, _Answer] = {}  # by row of the logits
        self.dtype = vllm_config.model_config.dtype

    def is_argmax_invariant(self) -> bool:
        """No: it decides which token is the most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow vLLM's requests as they come, move between rows and go."""
        process_dict_updates(self.answers, batch_update, _Answer)

    def apply(self, logits: Tensor) -> Tensor:
        """[rows, V] -> the same, with one finite entry in each row that is a request."""
        if not self.answers:
            return logits
        rows = sorted(self.answers)
        answers = [self.answers[row] for row in rows]
        for answer in answers:
            answer.catch_up()
        draws = torch.tensor([answer.uniforms[len(answer.tokens)] for answer in answers], dtype=torch.float64)
        index = torch.tensor(rows, device=logits.device)
        # The requests of one call differ only in their example.
        candidates = logits[index, : answers[0].vocab_size]
        if not can_choose(candidates).all():  # a wait, as the tokens themselves are: vLLM takes them at once
            raise ValueError(not_finite(self.dtype))
        bans = [answer.ban for answer in answers]
        chosen = next_tokens(candidates, bans, draws.to(logits.device), answers[0].sampling)
        logits[index] = -torch.inf
        logits[index, chosen] = 0.0
        return logits
