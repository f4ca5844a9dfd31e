"""A stand-in for vLLM that speaks its interface: the tests' worker finds it where the real one is not installed.

It reads prompts in two pieces, fills free rows as answers end, moves rows, and drops and re-adds a request now and
then, as vLLM does; the logits come from transformers, without a cache. FAKE_VLLM_FAULT says how it is to fail, and
a prompt of token 599 three times makes a call fail.
"""

# ruff: noqa: E402  A fault comes before the imports that take long.

import os
import sys
import time

_FAULT = os.environ.get("FAKE_VLLM_FAULT")
print("chatter on standard output", flush=True)
if _FAULT == "load":
    raise ValueError("this model\nis not for vLLM")
if _FAULT == "exit":
    print("fatal: out of everything", file=sys.stderr)
    os._exit(7)
if _FAULT == "hang":
    time.sleep(600)

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm.v1.sample.logits_processor import BatchUpdate

__version__ = "0.0.fake"
_NUM_ROWS = 3


class SamplingParams(SimpleNamespace):
    """What a request asks for."""


class LLM:
    """One model, answering."""

    def __init__(self, *, model: str, dtype: str, max_model_len: int, logits_processors: list[str], **_: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.max_model_len = max_model_len
        module, _, name = logits_processors[0].partition(":")
        config = SimpleNamespace(model_config=SimpleNamespace(dtype=getattr(torch, dtype)))
        self.processor = getattr(importlib.import_module(module), name)(config, torch.device("cpu"), False)

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], *, use_tqdm: bool) -> list:
        """One output per prompt, in their order."""
        if {"prompt_token_ids": [599, 599, 599]} in prompts:
            raise RuntimeError("no more blocks")
        waiting = [
            SimpleNamespace(prompt=prompt["prompt_token_ids"], params=p, tokens=[], read=False)
            for prompt, p in zip(prompts, params, strict=True)
        ]
        requests, rows, step = list(waiting), [], 0
        while waiting or rows:
            step += 1
            added, removed, moved = [], [], []
            for row in [row for row, request in enumerate(rows) if request.done][::-1]:
                last = len(rows) - 1
                removed.append(row)
                if row != last:
                    rows[row] = rows[last]
                    moved.append((last, row, None))
                rows.pop()
            self._update(removed, [], moved)  # the rows settle before others come
            while waiting and len(rows) < _NUM_ROWS:
                rows.append(waiting.pop(0))
                rows[-1].done = False
                added.append(len(rows) - 1)
            if step % 5 == 0 and rows:  # preempted: the request comes back with what it had
                added.append(0)
            self._update([], [(i, rows[i].params, rows[i].prompt, rows[i].tokens) for i in added], [])
            if rows:
                self._step(rows)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=request.tokens)]) for request in requests]

    def _update(self, removed: list, added: list, moved: list) -> None:
        self.processor.update_state(BatchUpdate(removed, added, moved))

    def _step(self, rows: list[SimpleNamespace]) -> None:
        texts = [r.prompt + r.tokens if r.read else r.prompt[: max(1, len(r.prompt) // 2)] for r in rows]
        logits = torch.stack([self.model(torch.tensor([text])).logits[0, -1] for text in texts])
        chosen = self.processor.apply(logits.float()).argmax(-1).tolist()
        for request, token in zip(rows, chosen, strict=True):
            if not request.read:  # half a prompt: its token is nobody's
                request.read = True
                continue
            request.tokens.append(token)
            full = len(request.prompt) + len(request.tokens) >= self.max_model_len
            ended = token in request.params.stop_token_ids or len(request.tokens) == request.params.max_tokens
            request.done = ended or full
