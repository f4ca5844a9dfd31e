"""Whole runs of tiny models, by the scripts and the launcher, on the GPUs that are there; and vLLM."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from pocl.common.errors import UserError
from pocl.common.files import ROOT, read_lines
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import BackendSettings, choose_backend, open_generator
from pocl.models.loading import load_model, load_tokenizer
from pocl.models.student import Student
from tools.benchmarking.pairs import build_model
from tools.gpu_checking.lines import Check, Clock, NotChecked, Wrong, run_within

RUN = ("--num-stages", "2", "--epochs", "1", "--num-train", "64", "--num-dev", "0", "--max-length", "192")
RUN += ("--bucket-examples", "0", "--lr", "1e-3", "--difficulty", "length", "--temperature", "1", "2")
RUN += ("--kd-ratio", "0.7", "1", "--teacher-cache", "off")
SECONDS = 40.0  # that a run takes, its launcher included


class TinyRuns:
    """Runs of a pair of tiny models; the first one is what the others must follow."""

    def __init__(self, folder: Path, device: torch.device, clock: Clock, batch: int) -> None:
        self.folder, self.device, self.clock, self.batch = folder, device, clock, batch
        self.losses: list[float] | None = None  # of the run under ZeRO 0 in fp32

    def checks(self, stages: Sequence[int]) -> Iterator[Check]:
        """Every check of whole runs."""
        ranks = f"{torch.cuda.device_count()} GPU(s)" if self.device.type == "cuda" else "the CPU"
        for stage in stages:
            yield Check(f"ZeRO {stage} on {ranks}, fp32", partial(self.follow, stage, "fp32", 1e-3), SECONDS)
        yield Check(f"ZeRO 1 on {ranks}, bf16", partial(self.follow, 1, "bf16", 0.05), SECONDS)
        yield Check(f"ZeRO 1 on {ranks}, fp16", partial(self.follow, 1, "fp16", 0.05), SECONDS)
        yield Check("fp16 overflow stops the run with its step", self.overflow, SECONDS)
        yield Check("vLLM's greedy answers against the built-in ones", self.compare_vllm, 2 * SECONDS)

    def follow(self, stage: int, dtype: str, allowed: float) -> str:
        """A run whose losses are those of the first run."""
        self._fp16_needs_a_gpu(dtype)
        done = self._train(self.folder / "student", stage, dtype)
        if done.returncode:
            raise Wrong(_last_line(done))
        records = read_lines(self._output(stage, dtype, "student") / "tfkl" / "seed10" / "metrics.jsonl")
        losses = [record["loss"] for record in records if "loss" in record]
        if not losses:
            raise Wrong("the run ended well and has logged no step")
        if self.losses is None:
            self.losses = losses
            return f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, which the other runs must follow"
        if len(losses) != len(self.losses):
            raise Wrong(f"{len(losses)} steps, the first run took {len(self.losses)}")
        error = max(abs(a / b - 1) for a, b in zip(losses, self.losses, strict=True))
        if not error <= allowed:
            raise Wrong(f"losses up to {error:.1e} from the first run's (allowed {allowed:.0e})")
        return f"{len(losses)} steps, losses up to {error:.1e} from the first run's"

    def overflow(self) -> str:
        """A student whose activations exceed fp16 ends with one line that names the step."""
        self._fp16_needs_a_gpu("fp16")
        self._make_data()
        broken = self.folder / "overflowing"
        model = load_model(str(self.folder / "student"), "fp32")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1e6)
        model.save_pretrained(broken)
        load_tokenizer(str(self.folder / "student")).save_pretrained(broken)
        done = self._train(broken, 1, "fp16")
        if done.returncode == 0 or "step" not in _last_line(done):
            raise Wrong(f"exit status {done.returncode}: {_last_line(done)}")
        return _last_line(done)

    def compare_vllm(self) -> str:
        """What vLLM and the built-in loop make of the same prompts, greedily."""
        try:
            choose_backend("vllm", str(self.folder / "student"), self.device)
        except UserError as error:
            raise NotChecked(str(error)) from error
        student = self._wider_student()
        prompts = [student.tokenizer(text)["input_ids"] for text in ("Name a colour.", "Count to three:", "A cat is")]
        answers = []
        for backend in ("builtin", "vllm"):
            settings = BackendSettings(backend, 64, 8, self.device)  # type: ignore[arg-type]
            with open_generator(student, settings) as generator:
                answers.append(generator(prompts, range(3), Sampling(8, temperature=0.0, no_repeat_ngram=0)))
        # Random weights have near ties: the first token has to agree, the rest is told.
        firsts = [[answer[:1] for answer in one] for one in answers]
        if firsts[0] != firsts[1]:
            raise Wrong(f"first tokens {firsts[1]}, built-in {firsts[0]}")
        return f"first tokens agree; {sum(a == b for a, b in zip(*answers, strict=True))} of 3 whole answers do"

    def _wider_student(self) -> Student:
        """Random weights with heads of 64, which vLLM's kernels know, and the tiny pair's tokenizer."""
        self._make_data()
        tokenizer = load_tokenizer(str(self.folder / "student"))
        shape = GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=len(tokenizer))
        path = self.folder / "wider"
        build_model(shape, dtype="fp32", device=torch.device("cpu")).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return Student.load(str(path), dtype="fp32", device=self.device)

    def _fp16_needs_a_gpu(self, dtype: str) -> None:
        if dtype == "fp16" and self.device.type != "cuda":
            raise NotChecked("--dtype fp16 needs a GPU")

    def _make_data(self) -> None:
        """The pair and its data, once."""
        student, data = self.folder / "student", self.folder / "data"
        if not (self.folder / "teacher" / "config.json").is_file():
            self._python("tests/tiny.py", "gpt2", student, self.folder / "teacher")
        if not (data / "manifest.json").is_file():
            raw = ROOT / "data" / "sample" / "raw.jsonl"
            flags = ["--num-dev", 8, "--max-prompt-length", 160, "--num-workers", 1]
            self._python("tools/process_data.py", "--raw", raw, "--tokenizer", student, "--output-dir", data, *flags)

    def _train(self, student: Path, stage: int, dtype: str) -> subprocess.CompletedProcess[str]:
        self._make_data()
        flags: list[Any] = ["--model", student, "--teacher", self.folder / "teacher"]
        flags += ["--data-dir", self.folder / "data", "--output-dir", self._output(stage, dtype, student.name)]
        flags += ["--dtype", dtype, "--deepspeed-config", ROOT / "scripts" / "deepspeed" / f"zero{stage}.json"]
        flags += [*RUN, "--global-batch-size", self.batch]
        return self._run(["bash", ROOT / "scripts" / "gpt2" / "pocl" / "train.sh", self.folder, *flags])

    def _output(self, stage: int, dtype: str, student: str) -> Path:
        return self.folder / f"{student}-zero{stage}-{dtype}"

    def _python(self, program: str, *arguments: object) -> None:
        done = self._run([sys.executable, ROOT / program, *arguments])
        if done.returncode:
            raise Wrong(f"{program}: {_last_line(done)}")

    def _run(self, command: Sequence[object]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        if self.device.type == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        return run_within(command, self.clock.left(), environment)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["it said nothing"])[-1]
