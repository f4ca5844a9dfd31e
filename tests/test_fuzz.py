"""Damaged files: whatever was done to one, its reader reads it or refuses it with one line that names it.

Each reader gets hundreds of mutants of a real file, the same ones every time: bytes flipped, cut, doubled, inserted;
values of the JSON in it replaced by others, dropped, renamed.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import extract_tb
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocl.cli.build import answer_length
from pocl.cli.checks import parse_train
from pocl.common.errors import UserError
from pocl.common.files import read_jsonl, write_json, write_jsonl
from pocl.common.resumable_pass import ResumablePass
from pocl.curriculum.stages import baby_step
from pocl.data.dataset import read_manifest
from pocl.data.sources import read_instructions
from pocl.evaluation.sets import load_set
from pocl.models.identity import check_tokenizer
from pocl.models.lora import adapter_chain
from pocl.training.checkpoints import Checkpoints
from pocl.training.deepspeed_config import check_precision, zero_stage
from pocl.training.position import Position
from pocl.training.run_folder import Origin, RunFolder
from pocl.training.statefile import load_state, save_state
from tests.runs import Folders, call, train_arguments
from tests.tiny import ROOT, tiny_tokenizer
from tools import process_data
from tools.reporting.data import Entry
from train import run_options

NUM_MUTANTS = 600  # of each file

# Mutants.

STRANGE_BYTES = [
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"\n", b"\r", b"\n\n", b"\x0c"),
    *(b'"', b"\\", b"\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"-", b"1e999"),
    *(b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000),
]
STRANGE_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "1", "x", "\0", "\ud800", "a\ud800b", "\u2028", "\ufeff", "line\nline", "\r", "é" * 3000, "../..", "/"),
    *([], [[]], [None], [1, 2, 3], [-1, "x"], {}, {"": ""}, {"a": {"b": {}}}, {"\ud800": 1}),
]
DEEP = "@deep@"  # stands for a value of many levels, which json.dumps cannot write


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few flips, cuts, doublings and insertions."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        first, length = chance.randrange(len(data) + 1), chance.choice((1, 2, 10, 100))
        part = data[first : first + length]
        kind = chance.randrange(5)
        if kind == 0:
            data = data[:first] + bytes(byte ^ (1 << chance.randrange(8)) for byte in part[:1]) + data[first + 1 :]
        elif kind == 1:
            data = data[:first]
        elif kind == 2:
            data = data[:first] + data[first + length :]
        elif kind == 3:
            data = data[:first] + part + data[first:]
        else:
            data = data[:first] + chance.choice(STRANGE_BYTES) + data[first:]
    return data


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def change_value(text: str, chance: random.Random) -> bytes:
    """One or two values replaced, dropped or renamed, or the whole of it replaced."""
    box = [json.loads(text)]
    for _ in range(chance.choice((1, 1, 2))):
        container, key = chance.choice(list(places(box)))
        kind = chance.randrange(6)
        if kind == 0 and len(container) > 1:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[chance.choice(("x", "", "\ud800", f"{key} ", key.upper()))] = container.pop(key)
        elif kind == 2:
            container[key] = DEEP
        elif kind == 3:
            container[key] = [container[key]] if chance.random() < 0.5 else {"x": container[key]}
        else:
            container[key] = json.loads(json.dumps(chance.choice(STRANGE_VALUES)))
    written = json.dumps(box[0], ensure_ascii=chance.random() < 0.7, indent=chance.choice((None, 2)))
    levels = chance.choice((50, 300, 700, 850, 900, 950, 2000, 100_000))
    opening, closing = chance.choice((("[", "]"), ('{"x":', "}")))
    deep = opening * levels + "1" + closing * levels
    return written.replace(f'"{DEEP}"', deep).encode("utf-8", "surrogatepass")


def mutants(data: bytes, *, seed: int, lines: bool = False, number: int = NUM_MUTANTS) -> Iterator[bytes]:
    """The mutants of a file; with ``lines`` it is JSONL, and values are changed in one of its lines."""
    chance = random.Random(seed)
    yield b""
    for _ in range(number - 1):
        if chance.random() < 0.4:
            yield change_bytes(data, chance)
        elif not lines:
            yield change_value(data.decode(), chance)
        else:
            rows = data.splitlines(keepends=True)
            row = chance.randrange(len(rows))
            rows[row] = change_value(rows[row].decode(), chance).replace(b"\n", b" ") + b"\n"
            yield b"".join(rows)


def try_all(path: Path, tries: Iterator[bytes], read: Callable[[], object], *names: object) -> tuple[int, int]:
    """Read each mutant in the file's place -> (how many were read, how many were refused).

    A refusal is a UserError of one line that names the file, or one of ``names``. Anything else fails the test, which
    shows the shortest mutant of each kind.
    """
    wanted, num_read, num_refused = [str(path), *map(str, names)], 0, 0
    found: dict[str, tuple[bytes, Exception]] = {}

    def note(kind: str, data: bytes, error: Exception) -> None:
        if kind not in found or len(data) < len(found[kind][0]):
            found[kind] = data, error

    for data in tries:
        path.write_bytes(data)
        try:
            read()
            num_read += 1
        except UserError as error:
            num_refused += 1
            if not any(name in str(error) for name in wanted):
                note("a message without the file", data, error)
            if "\n" in str(error) or "\r" in str(error):
                note("a message of several lines", data, error)
        except Exception as error:
            ours = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
            place = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"
            note(f"{type(error).__name__} at {place}", data, error)
    lines = [f"{kind}: {str(error)[:300]!r}\n    {data[:300]!r}" for kind, (data, error) in sorted(found.items())]
    assert not lines, f"{len(found)} kind(s):\n" + "\n".join(lines)
    return num_read, num_refused


def sample(num_lines: int) -> bytes:
    """The first lines of the instruction set that ships with the project."""
    return b"".join((ROOT / "data" / "sample" / "raw.jsonl").read_bytes().splitlines(keepends=True)[:num_lines])


# Instruction sets and evaluation sets.


def test_jsonl_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    num_read, num_refused = try_all(path, mutants(sample(3), seed=1, lines=True), lambda: read_jsonl(path))
    assert num_read > 50 and num_refused > 50


def test_raw_records_are_read_or_refused_and_what_is_read_can_be_processed(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    kept: list[dict[str, Any]] = []
    tries = mutants(sample(2), seed=2, lines=True, number=1500)
    num_read, num_refused = try_all(path, tries, lambda: kept.extend(read_instructions(path)))
    assert num_read > 50 and num_refused > 50
    kept += [{"instruction": "Say yes.", "output": "Yes.", "category": value} for value in STRANGE_VALUES]
    # Whether the deepest of them can be read depends on how deep the caller stands.
    lines = [line for line in map(json.dumps, kept) if line.count("[") + line.count("{") < 400]
    path.write_text("".join(f"{line}\n" for line in lines))
    arguments = ["--raw", path, "--tokenizer", folders.student, "--output-dir", tmp_path / "out", "--num-dev", 5]
    result = call(process_data, [*arguments, "--num-workers", 1, "--data-root", folders.data_root])
    assert result.status == 0, result.output


def test_evaluation_sets_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd" / "valid.jsonl"
    path.parent.mkdir()
    asked = b'{"prompt": "Say yes.", "output": ["Yes.", "Yes!"]}\n' + sample(2)

    def read() -> None:
        for example in load_set(tmp_path, "odd"):
            for text in (example.prompt, *example.references):
                text.encode("utf-8")  # a tokenizer refuses a lone surrogate, and no file takes it

    num_read, num_refused = try_all(path, mutants(asked, seed=3, lines=True), read)
    assert num_read > 50 and num_refused > 50


# Configurations.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deepspeed_configurations_are_read_or_refused(tmp_path: Path, dtype: str) -> None:
    path, device = tmp_path / "zero.json", torch.device("cpu")
    data = (ROOT / "scripts" / "deepspeed" / "zero2.json").read_bytes()

    def read() -> None:
        stage = zero_stage(check_precision(path, dtype, device))
        assert type(stage) is int and 0 <= stage <= 3, f"stage {stage!r} was let through"

    num_read, num_refused = try_all(path, mutants(data, seed=4), read)
    assert num_read > 20 and num_refused > 50


def test_processed_manifests_are_read_or_refused(folders: Folders, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "manifest.json", tiny_tokenizer()
    arguments = [*train_arguments(folders, tmp_path / "out"), "--data-dir", str(tmp_path)]
    config = parse_train(arguments)

    def read() -> None:
        check_tokenizer(tmp_path, tokenizer, "student")
        read_manifest(tmp_path)
        assert answer_length(config) in range(1, config.data.max_length + 1)

    data = (folders.data / "manifest.json").read_bytes()
    # What the values say of the data, and not how the file looks, is told by the folder, or by the flag.
    try_all(path, mutants(data, seed=5), read, tmp_path, "--max-length")


def test_adapter_configurations_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "gpt2",
        "r": 8,
        "revision": None,
        "target_modules": ["a"],
    }
    write_json(path, config)
    (path.parent / "adapter_model.safetensors").touch()
    try_all(path, mutants(path.read_bytes(), seed=6), lambda: adapter_chain(str(path.parent)), path.parent)


# A run's folder.


@pytest.fixture
def run(folders: Folders, tmp_path: Path) -> SimpleNamespace:
    """A run that stopped at step 4: its folder ``dir``, and the ``options`` and ``fingerprints`` it was begun with."""
    config = parse_train(train_arguments(folders, tmp_path / "out"))
    run = RunFolder(tmp_path / "out" / "tfkl" / "seed10")
    fingerprints = {"student": "a" * 64, "data": "b" * 64, "teacher": "c" * 64}
    stages = baby_step(48, epochs=1, temperature=[1], kd_ratio=[0.7])
    run.start(Origin(run_options(config), fingerprints), stages)
    tag = run.checkpoints / "step-4"
    state = {"optimizer": {}, "random": {"torch": torch.get_rng_state()}, "own": {}}
    save_state(tag / "rank-0.safetensors", state)
    save_state(tag / "weights.safetensors", {"weight": torch.zeros(2, 3)})
    position = {**Position(stage=1, step=4, samples=32, best_score=12.5).__dict__}
    files = {path.name: path.stat().st_size for path in sorted(tag.iterdir())}
    write_json(run.checkpoints / "last.json", {"tag": tag.name, "position": position, "world_size": 1, "files": files})
    return SimpleNamespace(dir=run, options=run_options(config), fingerprints=fingerprints)


METRICS = [{"stage": 0, "epoch": 0, "step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4, 5)]


def test_a_runs_options_are_read_or_refused(run: SimpleNamespace) -> None:
    def read() -> None:
        run.dir.check_options(run.options, 1)
        run.dir.check_fingerprints(run.fingerprints)

    read()
    _, num_refused = try_all(
        run.dir.config, mutants(run.dir.config.read_bytes(), seed=7, number=900), read, run.dir.path
    )
    assert num_refused > 300


def test_a_runs_last_checkpoint_is_read_or_refused(run: SimpleNamespace) -> None:
    engine = SimpleNamespace(load=lambda weights, optimizer: None)
    student = SimpleNamespace(tokenizer=None, template=None, end_ids=[0])
    checkpoints = Checkpoints(run.dir, engine, student)  # type: ignore[arg-type]
    run.dir.best.mkdir(exist_ok=True)

    def read() -> None:
        write_jsonl(run.dir.metrics, METRICS)
        run.dir.check_options(run.options, 1)
        checkpoints.resume()

    read()
    assert len(run.dir.read_metrics()) == 4
    path = run.dir.checkpoints / "last.json"
    try_all(path, mutants(path.read_bytes(), seed=8), read, run.dir.path)


@pytest.mark.parametrize("name", ["rank-0", "weights"])
def test_a_checkpoints_state_is_read_or_refused(run: SimpleNamespace, name: str) -> None:
    path = run.dir.checkpoints / "step-4" / f"{name}.safetensors"
    data, chance = path.read_bytes(), random.Random(9)
    head = 8 + int.from_bytes(data[:8], "little")
    tries = [change_bytes(data, chance) for _ in range(200)]
    tries += [change_bytes(data[:head], chance) + data[head:] for _ in range(200)]
    for _ in range(200):  # a header that is in order, and says something else
        changed = change_value(data[8:head].decode(), chance)
        tries.append(len(changed).to_bytes(8, "little") + changed + data[head:])
        skeleton = json.loads(data[8:head])
        skeleton["__metadata__"]["state"] = change_value(skeleton["__metadata__"]["state"], chance).decode(
            "utf-8", "replace"
        )
        changed = json.dumps(skeleton).encode()
        tries.append(len(changed).to_bytes(8, "little") + changed + data[head:])
    try_all(path, iter(tries), lambda: load_state(path))


def test_a_runs_metrics_are_read_or_refused(run: SimpleNamespace) -> None:
    write_jsonl(run.dir.metrics, METRICS)
    data = run.dir.metrics.read_bytes()

    def read() -> None:
        run.dir.read_metrics()
        run.dir.truncate_metrics(4)

    try_all(run.dir.metrics, mutants(data, seed=10, lines=True, number=300), read)


@pytest.mark.parametrize(
    "odd", ["\0", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\ufeff"], ids=ascii
)
def test_answers_of_any_text_are_read_again(tmp_path: Path, odd: str) -> None:
    records = [{"id": number, "answer": f"a{odd}b{odd}"} for number in range(3)]
    with ResumablePass(tmp_path, {"model": odd}) as parts:
        parts.append(records)
    assert list(ResumablePass(tmp_path, {"model": odd}).records.values()) == records


def test_a_runs_stages_are_read_or_refused(run: SimpleNamespace) -> None:
    path = run.dir.path / "stages.json"
    data = path.read_bytes()
    assert [stage.pool.stop for stage in Entry("run", run.dir, None).stages] == [12, 24, 36, 48]

    def read() -> None:
        assert all(isinstance(stage.pool, range) for stage in Entry("run", run.dir, None).stages)

    try_all(path, mutants(data, seed=11), read)


def test_a_state_may_be_larger_than_the_header_of_its_file(tmp_path: Path) -> None:
    state = {"buffer": [[i, "x" * 1000] for i in range(110_000)], "state": torch.arange(3)}
    save_state(tmp_path / "s", state)
    found = load_state(tmp_path / "s")
    assert found["buffer"] == state["buffer"] and found["state"].tolist() == [0, 1, 2]
