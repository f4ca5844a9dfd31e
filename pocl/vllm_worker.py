"""vLLM in a process of its own, spoken to in lines of JSON: ``python -m pocl.vllm_worker``, started by vllm_backend.

The first line from standard input is the settings; ``{"ready": version}`` or ``{"error": text}`` answers it. Every
further line holds prompts, example ids and sampling; ``{"answers": lists of token ids}`` or an error answers it. The
process ends when its input does. It runs in vLLM's own environment, so it needs nothing of the project's packages
but what vLLM brings.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

# What is left of the GPU's free memory to the process that ranks: its forward passes run between the calls.
_GPU_SHARE = 0.8


def main() -> None:
    """Load the model, then answer line by line."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print do it to the log, not between the replies
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    settings = json.loads(lines.get())
    model = _attempt(lambda: load(settings), replies)
    if model is None:
        return
    _reply(replies, {"ready": vllm_version()})
    while True:
        request = json.loads(lines.get())
        answers = _attempt(lambda request=request: generate(model, settings, request), replies)
        if answers is None:
            return
        _reply(replies, {"answers": answers})


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # at once, in the middle of a call too: who asked is gone, and the GPU is somebody's


def _attempt(work: Callable[[], Any], replies: TextIO) -> Any:
    """What ``work`` returns; None where it failed, which is told."""
    try:
        return work()
    except Exception as error:  # whatever it is, the process that asked must hear of it
        traceback.print_exc()
        text = " ".join(str(error).split())
        _reply(replies, {"error": f"{type(error).__name__}: {text[:400]}"})
        return None


def _reply(replies: TextIO, value: Mapping[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def vllm_version() -> str:
    """vLLM's version."""
    import vllm

    return str(vllm.__version__)


def load(settings: Mapping[str, Any]) -> Any:
    """The model in vLLM.

    The tokens are chosen by ``pocl.vllm_choice``, which speaks the first model runner's interface and must see every
    token before the next is computed.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; else most of the machine's memory
    import torch
    from vllm import LLM

    memory = {}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        memory["gpu_memory_utilization"] = _GPU_SHARE * free / total
    return LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_length"],
        skip_tokenizer_init=True,
        trust_remote_code=False,
        generation_config="vllm",  # not the model's own sampling defaults
        logits_processors=["pocl.vllm_choice:ChooseToken"],
        async_scheduling=False,
        enforce_eager=not memory,  # compiling for the CPU takes longer than it saves
        **memory,
    )


def generate(model: Any, settings: Mapping[str, Any], request: Mapping[str, Any]) -> list[list[int]]:
    """Answers as token ids, without the end-of-text token, in the order of the prompts."""
    from vllm import SamplingParams

    ends, limit = settings["eos_ids"], request["sampling"]["max_new_tokens"]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=limit,
            stop_token_ids=ends,
            ignore_eos=True,  # the ends are those that were given
            detokenize=False,
            extra_args={
                "example_id": example_id,
                "sampling": request["sampling"],
                "vocab_size": settings["vocab_size"],
            },
        )
        for example_id in request["example_ids"]
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = model.generate(prompts, params, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]


if __name__ == "__main__":
    main()
