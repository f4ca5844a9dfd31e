"""Which generator answers: the built-in loop, or vLLM in a process of its own.

vLLM pins its own torch and transformers, so it may live in another environment: POCL_VLLM_PYTHON names its Python;
without it `.venv-vllm` beside the project is tried, then this Python. Every rank starts one worker on its own device,
which loads the model from its folder and gives all memory back when it is closed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl import distributed
from pocl.console import say
from pocl.errors import RankStopped, UserError
from pocl.generation import BuiltIn, Generator, even_blocks
from pocl.lora import adapter_chain
from pocl.models import end_ids
from pocl.options import Backend
from pocl.rundir import ROOT
from pocl.sampling import Sampling

PYTHON_VARIABLE = "POCL_VLLM_PYTHON"
EXAMPLES_PER_CALL = 2048  # vLLM fills its batch from them as answers end; a crash loses one call's answers
# What a launcher tells its ranks; vLLM would join them.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK")
_LAUNCHER_VARIABLES += ("CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONHOME", "VIRTUAL_ENV")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ROLE_", "DS_")


@contextmanager
def open_generator(
    backend: Backend,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_path: str,
    max_length: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Generator]:
    """The generator that ``backend`` asks for, for as long as the block runs. Every rank must come here.

    ``model_path`` is where ``model`` was loaded from, ``max_length`` the longest prompt and answer together [tokens],
    ``batch_size`` the built-in loop's. ``auto`` takes vLLM on a GPU, where it is installed and loads the model, and
    says so where an installed one cannot.
    Raises UserError where vLLM was asked for and cannot be had.
    """
    if backend == "builtin" or (backend == "auto" and device.type != "cuda"):
        yield BuiltIn(model.to(device), tokenizer, batch_size)
        return
    settings = {
        "model": model_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": max_length,
        "vocab_size": len(tokenizer),
        "eos_ids": end_ids(model, tokenizer),
    }
    worker, missing = _start(settings, device)
    try:
        # One rank without vLLM leaves all without: they share the work out alike.
        found = distributed.gather_by_id({distributed.rank(): missing})
        missing = next((one for one in found.values() if one), None)
        if worker is not None and missing is None:
            say(f"{worker.name} answers ({worker.python})")
            yield worker
            return
    finally:
        if worker is not None:
            worker.close()
    if missing and backend == "vllm":
        raise UserError(f"--generation-backend vllm: {missing.why}")
    if missing and missing.failed:
        say(f"the built-in loop answers: {missing.why}")
    yield BuiltIn(model.to(device), tokenizer, batch_size)


class _Missing(NamedTuple):
    """Why a rank has no vLLM, and whether it was there and failed."""

    why: str
    failed: bool = False


def _start(settings: Mapping[str, Any], device: torch.device) -> tuple["VllmWorker | None", _Missing | None]:
    """A worker that has loaded the model, or why there is none."""
    path, python = settings["model"], vllm_python()
    if not has_vllm(python):
        return None, _Missing(
            f"{python} has no vLLM; bash install.sh --vllm makes an environment for it, "
            f"{PYTHON_VARIABLE}=/path/to/venv/bin/python names another"
        )
    if adapter_chain(path)[1] or not (Path(path) / "config.json").is_file():
        return None, _Missing(f"vLLM reads a whole model from its folder; {path} is an adapter or no model folder")
    torch.cuda.empty_cache()  # vLLM takes a share of what is free
    worker = VllmWorker(python, settings, worker_environment(os.environ, device))
    try:
        worker.wait_until_ready()
    except RankStopped as error:
        worker.close()
        return None, _Missing(str(error), failed=True)
    return worker, None


def vllm_python() -> str:
    """The Python that is to run vLLM, whether or not it can."""
    own = ROOT / ".venv-vllm" / "bin" / "python"
    return os.environ.get(PYTHON_VARIABLE) or (str(own) if own.is_file() else sys.executable)


def has_vllm(python: str) -> bool:
    """Whether this Python runs and finds vLLM (which is not imported: that takes long)."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def worker_environment(environment: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """The environment of a worker: this rank's device alone, nothing of the launcher, no hub and no reports."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    shown = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = device.index or 0
    mine = shown[number] if shown else str(number)
    kept["CUDA_VISIBLE_DEVICES"] = mine if device.type == "cuda" else ""
    # Only the project's root: the environment's packages are its own. Safe path: nothing of the folder we stand in.
    return kept | {
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


class VllmWorker:
    """A Generator: one vLLM process that has loaded one model. ``pocl.vllm_worker`` is its other side."""

    def __init__(self, python: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.python, self.name = python, "vllm"
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  close() ends it
        self._process = subprocess.Popen(
            [python, "-m", "pocl.vllm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            text=True,
            encoding="utf-8",
        )
        self._settings = settings

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded.  Raises RankStopped where it cannot be."""
        self.name = f"vllm {self._ask(self._settings)['ready']}"

    def blocks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Large blocks of neighbours in length, about equal, and as many for each rank."""
        return even_blocks(lengths, EXAMPLES_PER_CALL)

    def __call__(
        self, prompts: Sequence[list[int]], example_ids: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One answer per prompt.  Raises RankStopped where vLLM fails."""
        if sampling.max_new_tokens == 0:
            return [[] for _ in prompts]
        request = {
            "prompts": [[int(token) for token in prompt] for prompt in prompts],
            "example_ids": [int(example_id) for example_id in example_ids],
            "sampling": asdict(sampling),
        }
        return self._ask(request)["answers"]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what it did not read any more
                pipe.close()
        try:
            self._process.wait(timeout=10)  # it ends by itself when its input does
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RankStopped(f"vLLM ({self.python}) ended with status {self._process.wait()}: {self._last_lines()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RankStopped(f"vLLM ({self.python}) stopped: {reply['error']}")
        return reply

    def _last_lines(self, count: int = 3) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return " / ".join(lines[-count:]) or "it said nothing"
