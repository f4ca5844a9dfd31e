"""vLLM in a process of its own, driven by lines of JSON: ``python -m pocl.generation.vllm_worker``.

The first line from standard input is the settings; ``{"ready": version}`` answers it. Every further line holds
prompts, example ids and sampling; ``{"answers": lists of token ids}`` answers it. ``{"error": text}`` answers either.
The process ends when its input does. It runs in vLLM's own environment, so it needs none of the project's packages
except those that vLLM brings.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

_GPU_SHARE = 0.8  # of the free memory; the calling process runs its own forward passes between the calls


def main() -> None:
    """Answer line by line; a failure is reported as an answer too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the caller decides what it means
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the replies
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    worker = _Worker()
    while True:
        try:
            reply = worker.handle(json.loads(lines.get()))
        except Exception as error:  # whatever it is, the caller must be told
            traceback.print_exc()
            text = " ".join(str(error).split())
            reply = {"error": f"{type(error).__name__}: {text[:400]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # at once, even during a call: the caller is gone, and others need the GPU


class _Worker:
    """One model in vLLM. The first message is its settings, every other one a request."""

    def __init__(self) -> None:
        self.settings: Mapping[str, Any] | None = None
        self.model: Any = None

    def handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one message."""
        if self.settings is None:
            self.settings = message
            return {"ready": self._load(message)}
        return {"answers": self._generate(message, self.settings)}

    def _load(self, settings: Mapping[str, Any]) -> str:
        """Load the model and try it -> vLLM's version.

        ``vllm_choice`` uses the interface of the V1 model runner, and must see every token before the next is
        computed.
        """
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; else most of the machine's memory
        import vllm

        memory = _gpu_memory()
        self.model = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_length"],
            skip_tokenizer_init=True,
            trust_remote_code=False,
            generation_config="vllm",  # not the model's own sampling defaults
            logits_processors=["pocl.generation.vllm_choice:ChooseToken"],
            async_scheduling=False,
            enforce_eager=not memory,  # on a CPU, compiling takes longer than it saves
            **memory,
        )
        # vLLM rejects some models only at their first token (head size 16 on a CPU).
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        self._generate({"prompts": [[0]], "example_ids": [0], "sampling": sampling}, settings)
        return str(vllm.__version__)

    def _generate(self, request: Mapping[str, Any], settings: Mapping[str, Any]) -> list[list[int]]:
        """Answers as token ids, without the end-of-text token, in the order of the prompts."""
        from vllm import SamplingParams

        ends, sampling = settings["eos_ids"], request["sampling"]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=sampling["max_new_tokens"],
                stop_token_ids=ends,
                ignore_eos=True,  # only the given ids end an answer
                detokenize=False,
                extra_args={"example_id": i, "sampling": sampling, "vocab_size": settings["vocab_size"]},
            )
            for i in request["example_ids"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        outputs = self.model.generate(prompts, params, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]


def _gpu_memory() -> dict[str, float]:
    """vLLM's share of the GPU's memory, or nothing on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": _GPU_SHARE * free / total}


if __name__ == "__main__":
    main()
