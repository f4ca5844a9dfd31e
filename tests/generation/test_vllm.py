"""vLLM answers as the built-in loop does, from a process of its own; without it everything goes on.

Most tests run the real worker on a stand-in for vLLM (tests/fake_vllm). Those that need vLLM itself run where
POCL_VLLM_PYTHON, or this Python, has it.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import evaluate
import train
from pocl.common import distributed
from pocl.common.errors import RankStopped, UserError
from pocl.data.dataset import load_split
from pocl.difficulty.measuring import ScoringSettings
from pocl.difficulty.ranker import rank
from pocl.generation import vllm_backend
from pocl.generation.decoding import BuiltIn, Generator
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import (
    Backend,
    BackendSettings,
    has_vllm,
    open_generator,
    vllm_python,
    worker_environment,
)
from pocl.models.loading import load_model
from pocl.models.student import Student
from tests.ranks import on_ranks
from tests.runs import MAX_LENGTH, Folders, call, read_jsonl, train_arguments
from tests.tiny import ROOT, save_model, tiny_model
from tools import generate_seqkd

REAL = vllm_python()  # before any test says otherwise
CPU = torch.device("cpu")
LIMIT = 24

needs_vllm = pytest.mark.skipif(not has_vllm(REAL), reason="needs vLLM: POCL_VLLM_PYTHON=/path/to/its/venv/bin/python")


def prompts(count: int = 12) -> list[list[int]]:
    """Prompts of 1 to 30 tokens, some of which repeat themselves."""
    numbers = random.Random(0)
    found = [[numbers.randrange(600) for _ in range(numbers.randint(1, 30))] for _ in range(count - 2)]
    return [*found, [44, 45] * 6, [7] * 9]


def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase, family: str, width: int) -> Path:
    """A model that pads its vocabulary, and names further end tokens in its own settings."""
    size = {"vocab_size": len(tokenizer) + 40, "end_id": tokenizer.eos_token_id}
    model = tiny_model(family, width=width, **size)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh logits are nearly flat: every greedy answer would be alike
            parameter.mul_(3.0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 110)]
    return save_model(model, tokenizer, folder)


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This Python, with the stand-in as its vLLM."""
    script = tmp_path_factory.mktemp("fake") / "python"
    packages = ROOT / "tests" / "fake_vllm"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def faked(fake_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_VLLM_PYTHON", str(fake_python))


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tokenizer, "gpt2", 32)


def opened(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend = "vllm",
    *,
    path: str = "",
    max_length: int = 30 + LIMIT,
    device: torch.device = CPU,
) -> AbstractContextManager[Generator]:
    """A generator for the model of a folder, which may say that it came from another ``path``."""
    student = Student(load_model(str(folder)), tokenizer, path or str(folder))
    return open_generator(student, BackendSettings(backend, max_length, 5, device))


def opened_on_gpu(
    patch: pytest.MonkeyPatch, folder: Path, tokenizer: PreTrainedTokenizerBase, *, path: str = ""
) -> AbstractContextManager[Generator]:
    """``opened`` with ``auto`` and a model that is told to go to the GPU, and stays here."""
    patch.setattr(PreTrainedModel, "to", lambda model, device: model)
    return opened(folder, tokenizer, "auto", path=path, device=torch.device("cuda", 0))


@pytest.fixture(scope="module")
def worker(folder: Path, fake_python: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Generator]:
    """What ``auto`` opens on a GPU: the worker on the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCL_VLLM_PYTHON", str(fake_python))
        with opened_on_gpu(patch, folder, tokenizer) as generator:
            yield generator


SAMPLINGS = [
    Sampling(LIMIT, temperature=0.0, no_repeat_ngram=0),
    Sampling(LIMIT, temperature=0.0, no_repeat_ngram=2),
    Sampling(LIMIT, temperature=0.0, no_repeat_ngram=6),
    Sampling(LIMIT, no_repeat_ngram=3, seed=3),
    Sampling(LIMIT, temperature=0.7, top_p=0.9, top_k=20),
    Sampling(1),
    Sampling(0),
]


def check_answers(generator: Generator, folder: Path, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
    """The generator's answers are the built-in loop's, token for token."""
    ids = [7 * i for i in range(len(prompts()))]
    wanted = BuiltIn(Student(load_model(str(folder)), tokenizer), 5)(prompts(), ids, sampling)
    assert generator(prompts(), ids, sampling) == wanted
    tokens = {token for answer in wanted for token in answer}
    assert tokens <= set(range(600)) - set(range(100, 110)) - {tokenizer.eos_token_id}
    if sampling.max_new_tokens == LIMIT:
        assert len({tuple(answer) for answer in wanted}) > 6  # the prompt is heard


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_answers_are_the_built_in_loops(
    worker: Generator, folder: Path, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    check_answers(worker, folder, tokenizer, sampling)


def test_an_answer_depends_on_its_prompt_and_example_only(worker: Generator) -> None:
    sampling, order = Sampling(8), [3, 0, 4, 1, 2]
    some = prompts()[:5]
    together = worker(some, range(5), sampling)
    assert worker([some[i] for i in order], order, sampling) == [together[i] for i in order]
    assert worker([some[1]] * 2, [1, 9], sampling)[0] == together[1] != worker([some[1]], [9], sampling)[0]


def test_auto_on_a_gpu_is_vllm(worker: Generator) -> None:
    assert worker.name == "vllm 0.0.fake"


def test_one_rank_without_vllm_leaves_all_without(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_backend, "VllmWorker", lambda *_: pytest.fail("a worker was started"))
    monkeypatch.setattr(distributed, "gather_by_id", lambda found: {**found, 1: "rank 1 has none"})
    with opened_on_gpu(monkeypatch, folder, tokenizer) as generator:
        assert generator.name == "builtin"
    with pytest.raises(UserError, match="rank 1 has none"), opened(folder, tokenizer):
        pass


def test_one_rank_that_cannot_load_the_model_leaves_all_without(
    folder: Path, tokenizer: PreTrainedTokenizerBase, faked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = mock.Mock()
    monkeypatch.setattr(vllm_backend, "VllmWorker", lambda *_: mine)
    theirs = itertools.cycle([None, "rank 1 cannot"])  # each is asked whether it has vLLM, then whether that loaded
    monkeypatch.setattr(distributed, "gather_by_id", lambda found: {**found, 1: next(theirs)})
    with opened_on_gpu(monkeypatch, folder, tokenizer) as generator:
        assert generator.name == "builtin"
        mine.close.assert_called_once()
    with pytest.raises(UserError, match="rank 1 cannot"), opened(folder, tokenizer):
        pass


def test_a_call_that_fails_stops_the_run(worker: Generator) -> None:
    with pytest.raises(RankStopped, match="RuntimeError: no more blocks"):
        worker([[1], [599, 599, 599]], [0, 1], Sampling(1))


@pytest.mark.parametrize(
    ("num_examples", "num_ranks", "sizes"),
    [
        (0, 1, []),
        (3, 4, [1, 1, 1]),
        (500, 4, [125] * 4),
        (2048, 1, [2048]),
        (2049, 1, [1025, 1024]),
        (11435, 4, [1430] * 7 + [1425]),
    ],
)
def test_blocks_are_large_and_equal_for_all_ranks(
    worker: Generator, monkeypatch: pytest.MonkeyPatch, num_examples: int, num_ranks: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: num_ranks)
    lengths = np.random.default_rng(0).integers(1, 300, num_examples)
    blocks = worker.blocks(lengths)
    assert [len(block) for block in blocks] == sizes
    assert sorted(i for block in blocks for i in block) == list(range(num_examples))


def test_a_worker_sees_its_rank_s_device_and_nothing_of_the_launcher() -> None:
    given = {"PATH": "/bin", "RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    given |= {"PYTHONPATH": "/other/packages", "CUDA_VISIBLE_DEVICES": "4,6"}
    seen = worker_environment(given, torch.device("cuda", 1))
    assert (seen["PATH"], seen["CUDA_VISIBLE_DEVICES"]) == ("/bin", "6")
    assert not set(seen) & {"PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    del given["CUDA_VISIBLE_DEVICES"]
    assert worker_environment(given, torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "1"
    assert worker_environment(given, CPU)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_worker_imports_this_package_and_nothing_that_is_installed_beside_it(
    folder: Path, tokenizer: PreTrainedTokenizerBase, faked: None
) -> None:
    with opened(folder, tokenizer) as worker:
        environment = Path(f"/proc/{worker._process.pid}/environ").read_text()
        (path,) = [line for line in environment.split("\0") if line.startswith("PYTHONPATH=")]
        (entry,) = [Path(place) for place in path.removeprefix("PYTHONPATH=").split(":") if "fake_vllm" not in place]
        assert [name.name for name in entry.iterdir()] == ["pocl"]
        assert (entry / "pocl").resolve() == ROOT / "pocl"
    assert not entry.exists()


def test_the_python_of_vllm_is_named_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_backend, "ROOT", tmp_path)
    monkeypatch.delenv("POCL_VLLM_PYTHON", raising=False)
    assert vllm_python() == sys.executable
    own = tmp_path / ".venv-vllm" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert vllm_python() == str(own)
    monkeypatch.setenv("POCL_VLLM_PYTHON", "/elsewhere/python")
    assert vllm_python() == "/elsewhere/python"


def test_auto_on_a_cpu_is_the_built_in_loop(
    folder: Path, tokenizer: PreTrainedTokenizerBase, faked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_backend, "say", lambda text: pytest.fail(text))
    with opened(folder, tokenizer, "auto") as generator:
        assert generator.name == "builtin" and [len(block) for block in generator.blocks(np.arange(7))] == [4, 3]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", "has no vLLM"),
        ("hub", "a-hub/name is an adapter or not a model folder"),
        ("load", "ValueError: this model is not for vLLM"),
        ("exit", "ended with status 7: chatter on standard output / fatal: out of everything"),
    ],
)
def test_auto_goes_on_without_vllm_and_vllm_does_not(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    faked: None,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    words: str,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(vllm_backend, "say", said.append)
    monkeypatch.setenv("FAKE_VLLM_FAULT", fault)
    if fault == "none":
        monkeypatch.setenv("POCL_VLLM_PYTHON", "/nowhere/python")
    path = "a-hub/name" if fault == "hub" else ""
    with opened_on_gpu(monkeypatch, folder, tokenizer, path=path) as generator:
        assert generator.name == "builtin"
    if fault in ("load", "exit"):
        assert len(said) == 1 and words in said[0] and "\n" not in said[0]
    else:  # there is nothing to mend
        assert said == []
    with pytest.raises(UserError, match=words) as caught, opened(folder, tokenizer, path=path):
        pass
    assert "`generation_backend` vllm" in str(caught.value) and "\n" not in str(caught.value)


def test_a_busy_worker_ends_when_nobody_asks_any_more_and_not_by_ctrl_c(fake_python: Path) -> None:
    process = subprocess.Popen(
        [fake_python, "-m", "pocl.generation.vllm_worker"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=worker_environment(os.environ | {"FAKE_VLLM_FAULT": "hang"}, CPU) | {"PYTHONPATH": str(ROOT)},
    )
    process.stdin.write(b"{}\n")
    process.stdin.flush()
    assert b"chatter" in process.stderr.readline()  # it is importing, for ten minutes
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    process.stderr.close()


def test_evaluate_gives_the_same_scores_on_two_ranks(folders: Folders, tmp_path: Path, faked: None) -> None:
    arguments = ["--model", folders.student, "--data-root", folders.data_root, "--sets", "short", "--seeds", 3]
    arguments += ["--max-length", MAX_LENGTH, "--max-prompt-length", 160, "--output-dir"]
    result = on_ranks("evaluate.py", [*arguments, tmp_path / "vllm", "--generation-backend", "vllm"], num_ranks=2)
    assert result.status == 0, result.output
    assert call(evaluate, [*arguments, tmp_path / "builtin"]).status == 0
    found, wanted = (read_jsonl(tmp_path / name / "short" / "3.jsonl") for name in ("vllm", "builtin"))
    assert found == wanted
    protocols = [
        json.loads((tmp_path / name / "summary.json").read_text())["short"]["protocol"] for name in ("vllm", "builtin")
    ]
    assert [protocol["generator"] for protocol in protocols] == ["vllm 0.0.fake", "builtin"]


def test_the_first_ranking_is_by_vllm_and_measures_the_same(
    folders: Folders, tmp_path: Path, faked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: list[str] = []

    def noted(student: Student, settings: BackendSettings) -> AbstractContextManager[Generator]:
        backends.append(settings.backend)
        return open_generator(student, settings)

    monkeypatch.setattr(vllm_backend, "open_generator", noted)
    extra = ["--type", "sft", "--num-train", 16, "--num-stages", 2, "--num-dev", 0, "--rerank", "stage"]
    result = call(train, train_arguments(folders, tmp_path, *extra, "--generation-backend", "vllm", teacher=False))
    assert result.status == 0, result.output
    assert backends == ["vllm", "builtin"]  # the student has been trained by then, its folder has not
    found = {record["id"]: record for record in read_jsonl(tmp_path / "sft" / "seed10" / "difficulty.jsonl")}
    ranking = rank(
        load_split(folders.data, "train", max_length=MAX_LENGTH, num_examples=16),
        Student.load(str(folders.student)),
        settings=ScoringSettings(max_new_tokens=MAX_LENGTH - 160, no_repeat_ngram=6, batch_size=5, chunk_tokens=64),
    )
    assert len(found) == 16
    for score in ranking.records:
        record = found[score["id"]]
        assert (record["answer"], record["rouge_l"]) == (score["answer"], score["rouge_l"])
        assert record["cross_entropy"] == pytest.approx(score["cross_entropy"], rel=1e-5)


def test_seqkd_writes_the_same_answers(folders: Folders, tmp_path: Path, faked: None) -> None:
    tables = []
    for backend in ("vllm", "builtin"):
        arguments = ["--model", folders.teacher, "--data-dir", folders.data, "--output-dir", tmp_path / backend]
        arguments += ["--max-length", MAX_LENGTH, "--num-train", 6, "--generation-backend", backend]
        result = call(generate_seqkd, arguments)
        assert result.status == 0, result.output
        tables.append(list(datasets.load_from_disk(str(tmp_path / backend / "train"))))
        manifest = json.loads((tmp_path / backend / "manifest.json").read_text())
        assert manifest["responses_of"]["generator"].split()[0] == backend
    assert tables[0] == tables[1]


def test_without_vllm_the_command_says_how_to_get_it(folders: Folders, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCL_VLLM_PYTHON", "/nowhere/python")
        arguments = ["--model", folders.student, "--data-root", folders.data_root, "--sets", "short"]
        result = call(evaluate, [*arguments, "--output-dir", tmp_path, "--generation-backend", "vllm"])
    assert result.status == 2
    assert "/nowhere/python has no vLLM" in result.last_line and "install.sh --vllm" in result.last_line


@needs_vllm
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_vllm_itself_answers_as_the_built_in_loop(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_VLLM_PYTHON", REAL)
    folder = make_model(tmp_path, tokenizer, family, 128)  # heads of 32: vLLM's CPU attention has no smaller ones
    with opened(folder, tokenizer) as generator:
        for sampling in SAMPLINGS:
            check_answers(generator, folder, tokenizer, sampling)


@needs_vllm
@pytest.mark.parametrize(("width", "max_length", "words"), [(128, 1025, "1024"), (64, 70, "head_dim=16")])
def test_vllm_itself_refuses_a_model_before_it_is_asked(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    max_length: int,
    words: str,
) -> None:
    monkeypatch.setenv("POCL_VLLM_PYTHON", REAL)
    odd = make_model(tmp_path, tokenizer, "gpt2", width)
    with pytest.raises(UserError, match=words), opened(odd, tokenizer, max_length=max_length):
        pass


@pytest.mark.usefixtures("faked")
def test_no_token_is_chosen_from_logits_that_are_not_finite(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = make_model(tmp_path, tokenizer, "gpt2", 32)
    model = load_model(str(folder))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"not finite \(NaN or infinite\) in float32"), opened(folder, tokenizer):
        pass
