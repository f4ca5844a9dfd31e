"""The scripts' commands: whole, parsed by the real parsers, with the paper's settings; and install.sh's refusals."""

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from pocl.cli import checks as configuration
from pocl.cli.evaluate_options import EvaluateOptions, GenerationOptions
from pocl.cli.flags import parse
from pocl.losses.divergences import LOSSES
from tests.runs import Result, call
from tests.tiny import ROOT
from tools import reproduce
from tools.generate_seqkd import SeqKDOptions
from tools.process_data import ProcessOptions
from tools.rows import main_rows

SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*/*/*.sh"))
NAMES = [str(path.relative_to(ROOT / "scripts")) for path in SCRIPTS]
METHODS = ROOT / "scripts" / "methods.sh"
SOURCED = [ROOT / "scripts" / "common.sh", METHODS, *sorted((ROOT / "scripts").glob("*/env.sh"))]
FAMILIES = ("gpt2", "opt", "qwen2", "smollm2", "qwen3", "llama3", "gemma3")
TRAINING = [name for name in NAMES if name.split("/")[1] in ("sft", "kd", "pocl")]
MODELS = {"STUDENT", "TEACHER", "TEACHER_BASE", "TOKENIZER", "DATA", "DTYPE", "MODEL"}
PLACES = {"NUM_GPUS", "HOSTFILE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS"}
PLACES |= {"NNODES", "NODE_RANK", "MASTER_ADDR", "LAUNCHER"}
READ = MODELS | PLACES | {"DRY_RUN", "MATCHED", "ROW", "VIRTUAL_ENV"}  # from the environment
INSTALL = ROOT / "install.sh"


@dataclass(frozen=True)
class Command:
    """A printed command, taken apart."""

    words: list[str]

    @property
    def program(self) -> str:
        return next(word for word in self.words if word.endswith(".py"))

    @property
    def launcher(self) -> list[str]:
        return self.words[: self.words.index(self.program)]

    @property
    def arguments(self) -> list[str]:
        return self.words[self.words.index(self.program) + 1 :]


def run(
    script: str | Path, *arguments: object, cwd: Path, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script by its name under scripts/ (or its path), as on a machine without a GPU.

    ``path`` comes first in PATH, and then GPUs are looked for.
    """
    clean = {name: value for name, value in os.environ.items() if name not in READ}
    clean |= {"PATH": f"{path}:{clean['PATH']}"} if path else {"CUDA_VISIBLE_DEVICES": ""}
    script = script if isinstance(script, Path) else ROOT / "scripts" / script
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def printed(
    script: str | Path, *arguments: object, cwd: Path | None = None, path: Path | None = None, **environment: str
) -> Command:
    """The one line that DRY_RUN=1 prints; asked for once where it does not matter from which folder."""
    if cwd is None:
        return _printed_anywhere(script, arguments, tuple(environment.items()))
    result = run(script, *arguments, cwd=cwd, path=path, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return Command(shlex.split(line))


@functools.cache
def _printed_anywhere(
    script: str | Path, arguments: tuple[object, ...], environment: tuple[tuple[str, str], ...]
) -> Command:
    return printed(script, *arguments, cwd=ROOT, **dict(environment))


def trained(
    script: str | Path, *arguments: object, cwd: Path | None = None, path: Path | None = None, **environment: str
) -> configuration.TrainConfig:
    """The configuration that a script's train.py would get."""
    command = printed(script, *arguments, cwd=cwd, path=path, **environment)
    assert command.program == str(ROOT / "train.py")
    return configuration.parse_train(command.arguments)


def fake(folder: Path, name: str, text: str) -> Path:
    """A folder for PATH that holds one small program."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)
    return folder


# A python that notes what it is to run, and with which environment, where that is tools/reproduce.py.
NOTING = """
[[ $1 != */tools/reproduce.py ]] || { printf '%s\\0' "$@" >"$NOTED" && env -0 >"$NOTED.environment"; }
"""


def planned(script: str | Path, *arguments: object, cwd: Path, **environment: str) -> Result:
    """A script that plans a table, with tools/reproduce.py in this process, which takes seconds less than one more.

    The output is the script's own where it starts no table.
    """
    with tempfile.TemporaryDirectory() as folder:
        noted, programs = Path(folder) / "noted", fake(Path(folder) / "bin", "python3", NOTING)
        environment = {"NOTED": str(noted), "VIRTUAL_ENV": folder, "CUDA_VISIBLE_DEVICES": "", **environment}
        done = run(script, *arguments, cwd=cwd, path=programs, **environment)
        if done.returncode or not noted.is_file():
            return Result(done.returncode, done.stdout + done.stderr)
        program, *words = noted.read_text().split("\0")[:-1]
        settings = noted.with_name("noted.environment").read_text().split("\0")[:-1]
    assert program == reproduce.__file__
    with mock.patch.dict(os.environ, dict(s.split("=", 1) for s in settings), clear=True), contextlib.chdir(cwd):
        return call(reproduce, words)


@pytest.fixture
def four_gpus(tmp_path: Path) -> Path:
    """A folder whose nvidia-smi lists four GPUs."""
    return fake(tmp_path / "bin", "nvidia-smi", r"printf 'GPU %d: Fake (UUID: GPU-%d)\n' 0 0 1 1 2 2 3 3")


# Every script.


@pytest.mark.parametrize("name", NAMES)
def test_script_prints_a_command_that_its_program_accepts(name: str, tmp_path: Path) -> None:
    spaced = tmp_path / "a folder"
    spaced.mkdir()
    command = printed(name, cwd=spaced)
    options = {
        "evaluate.py": [EvaluateOptions, GenerationOptions],
        "tools/generate_seqkd.py": [SeqKDOptions],
        "tools/process_data.py": [ProcessOptions],
    }
    if command.program == str(ROOT / "train.py"):
        configuration.parse_train(command.arguments)
    else:
        parse(options[str(Path(command.program).relative_to(ROOT))], "", command.arguments)
    assert list(spaced.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_method(family: str) -> None:
    wanted = {"tools/process_data.sh", "sft/base.sh", "sft/teacher.sh", "kd/train.sh", "pocl/train.sh"}
    wanted |= {"seqkd/generate.sh", "seqkd/train.sh", "gkd/train.sh", "selective/train.sh", "eval/run_eval.sh"}
    assert wanted <= {name.partition("/")[2] for name in NAMES if name.startswith(family)}


@pytest.mark.parametrize("path", [*SCRIPTS, *SOURCED, INSTALL], ids=str)
def test_script_is_strict_and_parses(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 119
    if path not in SOURCED:
        assert text.startswith("#!/usr/bin/env bash\n")
        assert os.access(path, os.X_OK)
    first = next(line for line in text.splitlines() if line and not line.startswith("#"))
    # What is sourced first is strict.
    strict = first == "set -euo pipefail" or re.fullmatch(r'source ".*/(common|methods)\.sh"', first)
    assert path.name == "env.sh" or strict


@pytest.mark.parametrize("method", sorted({name.partition("/")[2] for name in NAMES}))
def test_families_differ_in_env_sh_alone(method: str) -> None:
    assert len({(ROOT / "scripts" / family / method).read_text() for family in FAMILIES}) == 1


@pytest.mark.parametrize("path", [*SCRIPTS, *SOURCED], ids=str)
def test_scripts_name_no_other_place(path: Path) -> None:
    assert not re.search(r"(?<![\w$}./])/(home|tmp|root|work|mnt|data)\b", path.read_text())


# The published settings: what the table says, by hand.
#   (global batch, lr, epochs a stage, stages, curriculum, type)

PUBLISHED = {
    "gpt2/sft/base.sh": (32, 5e-4, 20, 1, "whole-pool", "sft"),
    "gpt2/sft/teacher.sh": (8, 5e-5, 10, 1, "whole-pool", "sft"),
    "gpt2/kd/train.sh": (8, 5e-4, 20, 1, "whole-pool", "fkl"),
    "gpt2/pocl/train.sh": (64, 1e-4, 8, 4, "baby-step", "tfkl"),
    "opt/sft/base.sh": (128, 5e-5, 20, 1, "whole-pool", "sft"),
    "opt/sft/teacher.sh": (16, 5e-5, 10, 1, "whole-pool", "sft"),
    "opt/kd/train.sh": (32, 5e-5, 20, 1, "whole-pool", "fkl"),
    "opt/pocl/train.sh": (64, 1e-4, 8, 4, "baby-step", "tfkl"),
}


def settings(config: configuration.TrainConfig) -> tuple[int, float, int, int, str, str]:
    return (
        config.optimiser.global_batch_size,
        config.optimiser.lr,
        config.curriculum.epochs,
        config.curriculum.num_stages,
        config.curriculum.curriculum,
        config.loss.type,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    assert settings(trained(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", TRAINING)
def test_what_all_published_runs_share(name: str) -> None:
    config = trained(name)
    optimiser = config.optimiser
    assert (optimiser.weight_decay, optimiser.clip_grad, optimiser.min_lr, optimiser.seed) == (0.01, 1.0, 1e-7, 10)
    assert config.data.max_length == 512
    assert (config.data.num_train, config.data.num_dev) == (None, None)
    assert config.curriculum.restart_optimizer
    generation = config.generation
    assert (generation.sampling_temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert generation.no_repeat_ngram == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_pocl_ramps_as_published_and_our_own_families_scale_uniformly(family: str) -> None:
    config = trained(f"{family}/pocl/train.sh")
    assert configuration.stage_temperatures(config) == (1.0, 1.33, 1.67, 2.0)
    assert configuration.stage_kd_ratios(config) == (0.7, 0.8, 0.9, 1.0)
    assert config.loss.loss_scaling == ("published" if family in ("gpt2", "opt") else "uniform")
    assert settings(config)[2:] == (8, 4, "baby-step", "tfkl")


@pytest.mark.parametrize("family", FAMILIES)
def test_kd_has_no_temperature_and_no_cross_entropy(family: str) -> None:
    config = trained(f"{family}/kd/train.sh")
    assert configuration.stage_temperatures(config) == (1.0,)
    assert configuration.stage_kd_ratios(config) == (1.0,)


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd", "tvd", "sfkl", "srkl"])
def test_both_series_take_every_divergence(divergence: str) -> None:
    assert divergence in LOSSES
    assert trained("gpt2/kd/train.sh", "--type", divergence).loss.type == divergence
    assert trained("gpt2/pocl/train.sh", "--type", f"t{divergence}").loss.type == f"t{divergence}"


@pytest.mark.parametrize("family", FAMILIES)
def test_matched_kd_has_the_batch_rate_and_updates_of_pocl(family: str) -> None:
    matched = trained(f"{family}/kd/train.sh", MATCHED="1")
    pocl = trained(f"{family}/pocl/train.sh")
    assert matched.optimiser.lr == pocl.optimiser.lr
    assert matched.optimiser.global_batch_size == pocl.optimiser.global_batch_size == 64
    # Dolly: 11,435 examples are 178 steps of 64; POCL's pools make 44, 89, 133 and 178 an epoch.
    assert abs(178 * matched.curriculum.epochs - 8 * (44 + 89 + 133 + 178)) < 178
    plain = trained(f"{family}/kd/train.sh")
    assert matched.run.output_dir != plain.run.output_dir
    assert (matched.loss, matched.curriculum.num_stages) == (plain.loss, 1)
    assert family not in ("gpt2", "opt") or settings(matched)[:3] == (64, 1e-4, 20)  # the paper's


def test_opt_recomputes_activations_and_gpt2_does_not() -> None:
    for method in ("kd", "pocl"):
        assert trained(f"opt/{method}/train.sh").models.gradient_checkpointing
        assert not trained(f"gpt2/{method}/train.sh").models.gradient_checkpointing


@pytest.mark.parametrize("family", FAMILIES)
def test_processing_is_the_papers(family: str) -> None:
    command = printed(f"{family}/tools/process_data.sh")
    (what,) = parse([ProcessOptions], "", command.arguments)
    assert (what.num_dev, what.max_prompt_length) == (1000, 256)
    assert what.raw == str(ROOT / "data" / "dolly" / "raw.jsonl")
    assert what.output_dir == trained(f"{family}/pocl/train.sh").data.data_dir
    # The others have their own template, which is chosen where none is asked for.
    assert what.template == ("alpaca" if family in ("gpt2", "opt") else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_the_papers(family: str) -> None:
    command = printed(f"{family}/eval/run_eval.sh")
    what, generation = parse([EvaluateOptions, GenerationOptions], "", command.arguments)
    assert what.model == str(ROOT / "results" / family / "pocl" / "tfkl" / "seed10" / "best")
    assert what.sets == ["dolly", "self-inst", "vicuna", "sinst", "uinst"]
    assert what.seeds == [10, 20, 30, 40, 50]
    assert (what.max_length, what.max_prompt_length, what.num_examples) == (512, 256, None)
    assert (generation.sampling_temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert generation.no_repeat_ngram == 6
    assert what.data_root == str(ROOT / "data")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_data_is_evaluated_on_itself_and_says_its_number_of_dev_records(family: str) -> None:
    asked = printed(f"{family}/eval/run_eval.sh", DATA="sample").arguments
    assert parse([EvaluateOptions, GenerationOptions], "", asked)[0].sets == ["sample"]
    for flags, num_dev in (([], 60), (["--num-dev", "8"], 8)):
        command = printed(f"{family}/tools/process_data.sh", *flags, DATA="sample")
        (what,) = parse([ProcessOptions], "", command.arguments)
        assert (what.raw, what.num_dev) == (str(ROOT / "data" / "sample" / "raw.jsonl"), num_dev)


# Models and places.


def test_gpt2_models_stand_where_fetch_puts_them() -> None:
    from tools.fetch import MODELS

    checkpoints = ROOT / "checkpoints"
    pocl = trained("gpt2/pocl/train.sh").models
    assert pocl.model == str(checkpoints / MODELS["gpt2"].path)
    assert pocl.teacher == str(checkpoints / MODELS["teacher-gpt2-1.5B"].path)
    starts = {"gpt2/sft/teacher.sh": "gpt2-xl", "opt/sft/base.sh": "opt-350m", "opt/sft/teacher.sh": "opt-2.7b"}
    starts |= {"qwen2/sft/base.sh": "Qwen2-0.5B", "qwen2/sft/teacher.sh": "Qwen2-1.5B"}
    starts |= {"qwen3/sft/base.sh": "Qwen3-0.6B", "llama3/sft/teacher.sh": "Llama-3.2-3B-Instruct"}
    starts |= {"gemma3/sft/base.sh": "gemma-3-270m-it", "gemma3/sft/teacher.sh": "gemma-3-1b-it"}
    starts |= {"smollm2/sft/base.sh": "SmolLM2-135M", "smollm2/sft/teacher.sh": "SmolLM2-360M"}
    for script, name in starts.items():
        assert trained(script).models.model == str(checkpoints / MODELS[name].path)


@pytest.mark.parametrize("family", ["opt", "qwen2", "smollm2"])
def test_distillation_takes_the_teacher_that_sft_leaves(family: str) -> None:
    sft = trained(f"{family}/sft/teacher.sh")
    left = Path(sft.run.output_dir) / sft.loss.type / f"seed{sft.optimiser.seed}" / "best"
    for method in ("kd", "pocl"):
        assert trained(f"{family}/{method}/train.sh").models.teacher == str(left)


def test_models_come_from_the_environment() -> None:
    models = trained("gpt2/pocl/train.sh", STUDENT="my student", TEACHER="t").models
    assert (models.model, models.teacher) == ("my student", "t")
    evaluated = printed("gpt2/eval/run_eval.sh", MODEL="runs/best").arguments
    assert parse([EvaluateOptions, GenerationOptions], "", evaluated)[0].model == "runs/best"


def test_no_two_methods_share_a_results_folder() -> None:
    folders = [trained(name).run.output_dir for name in TRAINING]
    folders += [trained(f"{family}/kd/train.sh", MATCHED="1").run.output_dir for family in FAMILIES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", NAMES)
def test_base_path_moves_every_folder(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base path"
    base.mkdir()
    command = printed(name, "base path", cwd=tmp_path)
    paths = [word for word in command.arguments if word.startswith("/")]
    assert len(paths) >= 2
    assert all(word.startswith(f"{base}/") for word in paths)
    assert command.program.startswith(f"{ROOT}/")


def test_base_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    result = run("gpt2/pocl/train.sh", "nowhere", cwd=tmp_path, DRY_RUN="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["error: nowhere is no folder; the first argument is the base path or a flag"]


def test_scripts_run_through_a_symbolic_link(tmp_path: Path) -> None:
    link = tmp_path / "train"
    link.symlink_to(ROOT / "scripts" / "gpt2" / "pocl" / "train.sh")
    assert printed(link, cwd=tmp_path).program == str(ROOT / "train.py")


def from_elsewhere(script: str, folder: Path) -> Path:
    """A script's path as it is seen from a folder elsewhere, by which that folder calls it."""
    folder.mkdir(parents=True)
    return Path(os.path.relpath(ROOT / "scripts" / script, folder))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_by_a_relative_path_from_another_folder(name: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "here"
    assert printed(from_elsewhere(name, elsewhere), cwd=elsewhere).arguments == printed(name).arguments


@pytest.mark.parametrize(
    "name", ["quickstart.sh", "tiny_table.sh", *(f"{family}/reproduce.sh" for family in FAMILIES)]
)
def test_a_whole_experiment_runs_by_a_relative_path_from_another_folder(name: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "here"
    arguments = {"quickstart.sh": [], "tiny_table.sh": ["my table"]}.get(name, [tmp_path])
    shown = planned(from_elsewhere(name, elsewhere), *arguments, cwd=elsewhere, DRY_RUN="1").output
    assert ("train.py" if name == "quickstart.sh" else "/sft/base.sh") in shown
    # A table's folder is one from where it was asked for; a dry run makes nothing in it.
    assert [path.name for path in elsewhere.rglob("*")] == (["my table", "data"] if name == "tiny_table.sh" else [])
    if name == "tiny_table.sh":
        assert shlex.quote(str(elsewhere / "my table")) in shown


def test_the_quickstarts_help_is_shown_from_another_folder(tmp_path: Path) -> None:
    result = run(from_elsewhere("quickstart.sh", tmp_path / "here"), "--help", cwd=tmp_path / "here")
    assert result.returncode == 0 and "from a clean clone to a table" in result.stdout, result.stderr


# Flags.


@pytest.mark.parametrize("name", [name for name in TRAINING if "sft" not in name])
def test_the_last_mention_of_a_flag_wins(name: str) -> None:
    flags = ["--type", "trkl", "--lr", "3e-4", "--temperature", "1.5", "--kd-ratio", "0.5", "--epochs", "1"]
    config = trained(name, *flags, "--model", "here/student", "--output-dir", "out")
    assert (config.loss.type, config.optimiser.lr, config.curriculum.epochs) == ("trkl", 3e-4, 1)
    assert set(configuration.stage_temperatures(config)) == {1.5}
    assert set(configuration.stage_kd_ratios(config)) == {0.5}
    assert (config.models.model, config.run.output_dir) == ("here/student", "out")


def test_flags_follow_a_base_path(tmp_path: Path) -> None:
    assert trained("gpt2/pocl/train.sh", tmp_path, "--lr", "3e-4", cwd=tmp_path).optimiser.lr == 3e-4


@pytest.mark.parametrize("value", ["two words", "it's", 'a "b"', "$HOME", "*", "a\\b", "", "x;y"])
def test_a_value_of_any_spelling_passes_through(value: str) -> None:
    assert printed("gpt2/pocl/train.sh", "--run-name", value).arguments[-2:] == ["--run-name", value]


# Where it runs.


def test_one_rank_on_the_cpu() -> None:
    launcher = printed("gpt2/pocl/train.sh").launcher
    assert launcher[:2] == ["env", "DS_ACCELERATOR=cpu"]
    settings = [word for word in launcher[1:] if "=" in word]
    names = [setting.split("=")[0] for setting in settings[1:]]
    assert names == ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"]
    command = launcher[1 + len(settings) :]
    assert Path(command[0]).name == "deepspeed"
    assert command[1:3] == ["--num_accelerators", "1"]
    assert "--no_local_rank" in launcher
    port = int(launcher[launcher.index("--master_port") + 1])
    assert 20000 <= port < 32768


def test_ranks_on_the_cpu_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    launcher = printed("gpt2/pocl/train.sh", NUM_GPUS="2", MASTER_PORT="23456").launcher
    assert f"OMP_NUM_THREADS={max(1, cores // 2)}" in launcher
    assert launcher[launcher.index("--num_accelerators") + 1] == "2"
    assert launcher[launcher.index("--master_port") + 1] == "23456"
    launcher = printed("gpt2/pocl/train.sh", NUM_GPUS="2", OMP_NUM_THREADS="3").launcher
    assert not any(word.startswith("OMP_NUM_THREADS") for word in launcher)


def test_all_gpus_and_bf16_where_there_are_gpus(four_gpus: Path, tmp_path: Path) -> None:
    command = printed("gpt2/pocl/train.sh", cwd=tmp_path, path=four_gpus)
    assert command.launcher[1:3] == ["--num_gpus", "4"]
    assert "DS_ACCELERATOR=cpu" not in command.words
    assert configuration.parse_train(command.arguments).models.dtype == "bf16"
    assert trained("gpt2/pocl/train.sh", cwd=tmp_path, path=four_gpus, DTYPE="fp16").models.dtype == "fp16"
    assert trained("gpt2/pocl/train.sh", cwd=tmp_path).models.dtype == "fp32"


def test_visible_devices_are_the_ones_used(four_gpus: Path, tmp_path: Path) -> None:
    def ranks(**environment: str) -> list[str]:
        return printed("gpt2/eval/run_eval.sh", cwd=tmp_path, path=four_gpus, **environment).launcher[1:3]

    assert ranks(CUDA_VISIBLE_DEVICES="3,1") == ["--include", "localhost:3,1"]
    assert ranks(CUDA_VISIBLE_DEVICES="2,3", NUM_GPUS="1") == ["--include", "localhost:2"]
    assert ranks(NUM_GPUS="2") == ["--num_gpus", "2"]


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": ""}, {"DS_ACCELERATOR": "cpu"}])
def test_gpus_can_be_left_alone(environment: dict[str, str], four_gpus: Path, tmp_path: Path) -> None:
    launcher = printed("gpt2/pocl/train.sh", cwd=tmp_path, path=four_gpus, **environment).launcher
    assert "--num_accelerators" in launcher


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NUM_GPUS": "5"}, "error: NUM_GPUS=5, but 4 GPU(s) are visible here"),
        ({"NUM_GPUS": "0"}, "error: NUM_GPUS=0: it must be a whole number above 0"),
        ({"NUM_GPUS": "all"}, "error: NUM_GPUS=all: it must be a whole number above 0"),
        (
            {"CUDA_VISIBLE_DEVICES": "GPU-0"},
            "error: CUDA_VISIBLE_DEVICES=GPU-0: DeepSpeed's launcher wants numbers, such as 0,1",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(
    environment: dict[str, str], message: str, four_gpus: Path, tmp_path: Path
) -> None:
    result = run("gpt2/pocl/train.sh", cwd=tmp_path, path=four_gpus, DRY_RUN="1", **environment)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (2, "", message)


def test_several_nodes_take_a_hostfile(four_gpus: Path, tmp_path: Path) -> None:
    launcher = printed("gpt2/pocl/train.sh", cwd=tmp_path, path=four_gpus, HOSTFILE="my hosts").launcher
    assert launcher[1:3] == ["--hostfile", "my hosts"]
    assert "--num_gpus" not in launcher
    launcher = printed("gpt2/pocl/train.sh", cwd=tmp_path, HOSTFILE="hosts", NUM_GPUS="8").launcher
    assert launcher[1:5] == ["--hostfile", "hosts", "--num_gpus", "8"]


@pytest.mark.parametrize("folder", ["venv", "project/.venv"])
def test_programs_get_their_arguments_whole(folder: str, tmp_path: Path) -> None:
    """A launcher that shows its arguments, in the active environment or in the project's own."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    (tmp_path / folder).mkdir(parents=True)
    programs = fake(tmp_path / folder / "bin", "deepspeed", 'printf "%s\\n" "$DS_ACCELERATOR" "$@"')
    script, path, environment = project / "scripts" / "gpt2" / "pocl" / "train.sh", None, {}
    if folder == "venv":
        path, environment = programs, {"VIRTUAL_ENV": str(tmp_path / folder), "CUDA_VISIBLE_DEVICES": ""}
    result = run(script, "--run-name", "two words", cwd=tmp_path, path=path, **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "cpu"
    assert str(project / "train.py") in lines
    assert lines[-2:] == ["--run-name", "two words"]


def test_a_bad_flag_is_one_line_behind_the_launcher(tmp_path: Path) -> None:
    """The real launcher and the real program."""
    result = run("gpt2/pocl/train.sh", "--tpye", "trkl", cwd=tmp_path)
    assert result.returncode == 2
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith("error: unknown argument '--tpye'; did you mean '--type'?")


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (256 - 9, "error: a rank was ended by signal 9, as the system does where memory has run out\n"),
        (256 - 11, "error: a rank was ended by signal 11\n"),
        (1, ""),
        (7, ""),
        (143, ""),
        (255, ""),
    ],
)
def test_a_script_fails_as_its_program_does_and_tells_of_a_rank_that_was_killed(
    status: int, told: str, tmp_path: Path
) -> None:
    programs = fake(tmp_path / "bin", "deepspeed", f"exit {status}")
    result = run("gpt2/pocl/train.sh", cwd=tmp_path, path=programs, VIRTUAL_ENV=str(tmp_path))
    assert (result.returncode, result.stderr) == (status, told)


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "80 80", "99999999999999999999"])
def test_a_port_that_is_none_is_refused(port: str, tmp_path: Path) -> None:
    for more in ({}, {"LAUNCHER": "torchrun", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}):
        result = run("gpt2/pocl/train.sh", cwd=tmp_path, MASTER_PORT=port, DRY_RUN="1", **more)
        told = f"error: MASTER_PORT={port}: it must be a whole number from 1 to 65535\n"
        assert (result.returncode, result.stdout, result.stderr) == (2, "", told)


@pytest.mark.parametrize("family", FAMILIES)
def test_matched_is_1_or_0_and_nothing_else(family: str, tmp_path: Path) -> None:
    result = run(f"{family}/kd/train.sh", cwd=tmp_path, MATCHED="yes", DRY_RUN="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: MATCHED=yes: it must be 1 or 0\n"
    for value, folder in (("", "kd"), ("0", "kd"), ("1", "kd-matched")):
        config = trained(f"{family}/kd/train.sh", cwd=tmp_path, MATCHED=value)
        assert config.run.output_dir == str(ROOT / "results" / family / folder)


def test_a_missing_launcher_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "env"
    empty.mkdir()
    result = run("gpt2/pocl/train.sh", cwd=tmp_path, VIRTUAL_ENV=str(empty), PATH="/usr/bin:/bin")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: no deepspeed in this environment; run: bash install.sh"]


@pytest.mark.parametrize("script", ["gpt2/reproduce.sh", "gpt2/tools/process_data.sh"])
def test_packages_that_are_not_installed_are_told(tmp_path: Path, script: str) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    # -S: without what is installed beside it.
    (bare / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (bare / "python3").chmod(0o755)
    result = run(script, cwd=tmp_path, VIRTUAL_ENV=str(tmp_path), PATH=f"{bare}:/usr/bin:/bin")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: {bare}/python3 lacks the packages of this project; run: bash install.sh"
    ]


# install.sh: refusals and the quick second run; a whole installation takes minutes and is no test's business.


def install_in(
    folder: Path, *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a copy of install.sh in a folder of its own."""
    folder.mkdir(exist_ok=True)
    for name in ("install.sh", "pyproject.toml", "requirements.txt", "requirements-dev.txt", "requirements-vllm.txt"):
        shutil.copy(ROOT / name, folder / name)
    return run(folder / "install.sh", *arguments, cwd=folder.parent, path=path, **environment)


@pytest.mark.parametrize("version", ["3.8", "3.10", "3.14", "2.7"])
def test_install_refuses_another_python(version: str, tmp_path: Path) -> None:
    programs = fake(tmp_path / "bin", "python3", f"echo {version}.1")
    result = install_in(tmp_path / "project", path=programs)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and version in line and "PYTHON=" in line
    assert not (tmp_path / "project" / ".venv").exists()


def test_install_says_that_python_is_missing(tmp_path: Path) -> None:
    result = install_in(tmp_path / "project", PYTHON="no-such-python")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no-such-python")


def test_install_refuses_an_unknown_argument(tmp_path: Path) -> None:
    result = install_in(tmp_path / "project", "--devel")
    assert result.returncode == 2
    assert "--devel" in result.stderr


def test_install_does_not_empty_what_a_link_leads_to(tmp_path: Path) -> None:
    theirs, project = tmp_path / "theirs", tmp_path / "project"
    (theirs / "lib").mkdir(parents=True)
    project.mkdir()
    (project / ".venv").symlink_to(theirs)
    result = install_in(project)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: {project}/.venv is a link to {theirs}; remove it, the environment is made here"
    ]
    assert (theirs / "lib").is_dir()


def test_a_hostfile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = run("gpt2/pocl/train.sh", cwd=tmp_path, HOSTFILE="none.txt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["error: HOSTFILE=none.txt: there is no such file"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--num-train"], "--num-train wants a value"),
        (["--updates", "2", "--layers"], "--layers wants a value"),
        (["--num"], "unknown flag --num (--help lists them)"),
        (["--template", "mine"], "--template is alpaca or chat"),
        (["more"], "unknown flag more (--help lists them)"),
    ],
    ids=str,
)
def test_what_the_quickstart_is_told_wrong_is_one_line(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = run("quickstart.sh", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {told}\n")


def quickstart_in(project: Path) -> Path:
    """A folder with what the quickstart reads of the project."""
    for name in ("install.sh", "scripts/quickstart.sh", "scripts/common.sh", "data/sample/valid.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    return project


def test_a_dry_quickstart_deletes_nothing_and_does_not_say_that_it_is_done(tmp_path: Path) -> None:
    project = quickstart_in(tmp_path / "project")
    kept = project / "results" / "quickstart" / "kept"
    kept.mkdir(parents=True)
    result = planned(project / "scripts" / "quickstart.sh", "--fresh", cwd=tmp_path, DRY_RUN="1")
    assert result.status == 0, result.output
    assert kept.is_dir() and "train.py" in result.output and "Done in" not in result.output


def test_the_quickstart_asks_what_is_there_and_makes_a_student_of_its_own_for_other_layers(tmp_path: Path) -> None:
    project = quickstart_in(tmp_path / "project")
    for name in ("before", "warmup", "pocl", "teacher"):
        summary = project / "results" / "quickstart" / "eval" / name / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")

    def commands(program: str, *flags: str) -> list[list[str]]:
        """The arguments that the quickstart gives a program, wherever it calls it."""
        result = planned(project / "scripts" / "quickstart.sh", *flags, cwd=tmp_path, DRY_RUN="1")
        assert result.status == 0, result.output
        lines = [shlex.split(line) for line in result.output.splitlines() if program in line]
        return [line[next(i for i, word in enumerate(line) if word.endswith(program)) + 1 :] for line in lines]

    def value(arguments: list[str], flag: str) -> str:
        return arguments[arguments.index(flag) + 1]

    for template, folder in (("alpaca", "quickstart"), ("chat", "quickstart-chat")):
        (processing,) = commands("process_data.py", "--template", template)
        assert value(processing, "--template") == template
        assert value(processing, "--output-dir") == f"processed_data/{folder}/sample"
        assert value(processing, "--tokenizer") == "checkpoints/quickstart/smollm2-135m"
    (usual,) = commands("make_student.py")
    first = value(usual, "--output-dir")
    place = f"results/quickstart/eval/{Path(first).name}-60"
    asked = [value(command, "--output-dir") for command in commands("evaluate.py")]
    ways = ("sft", "kld", "pocl-tfkl", "steady-tfkl")
    assert asked == [f"{place}/{name}" for name in ("before", "warmup", *ways, "teacher")]
    others = [
        value(command, "--output-dir") for command in commands("evaluate.py", "--type", "tjsd", "--num-eval", "9")
    ]
    assert not set(others) & set(asked)  # evaluate.py does not write over other answers
    (project / first).mkdir(parents=True)
    (project / first / "config.json").write_text("{}")
    assert commands("make_student.py") == []  # it is there
    (other,) = commands("make_student.py", "--layers", "0 5")
    assert other[other.index("--layers") :][:3] == ["--layers", "0", "5"]
    second = value(other, "--output-dir")
    assert second != first
    assert value(commands("evaluate.py", "--layers", "0 5")[0], "--model") == second


# An interpreter that notes what it is asked: `-m venv` makes a folder with itself in it, `-m pip install` may fail.
PYTHON = r"""
case "$*" in
    *sys.version_info*) echo 3.12.4 ;;
    "-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *"pip install"*) echo "$*" >>"$NOTES" && exit "${PIP_STATUS:-0}" ;;
esac
"""


def test_install_works_once_and_after_a_failure_again(tmp_path: Path) -> None:
    programs, notes, project = fake(tmp_path / "bin", "python3", PYTHON), tmp_path / "notes", tmp_path / "project"
    notes.touch()

    def installed(*arguments: str, **environment: str) -> tuple[int, int]:
        before = len(notes.read_text().splitlines())
        result = install_in(project, *arguments, path=programs, NOTES=str(notes), **environment)
        return result.returncode, len(notes.read_text().splitlines()) - before

    assert installed(PIP_STATUS="1") == (1, 1)
    assert installed() == (0, 2)  # the requirements, then the project
    assert notes.read_text().splitlines()[-1].endswith(f"--no-deps --no-build-isolation --editable {project}")
    assert installed() == (0, 0)
    assert installed("--dev") == (0, 1)
    assert installed("--dev") == (0, 0)
    assert installed() == (0, 0)
    shutil.rmtree(project / ".venv")
    assert installed("--dev") == (0, 3)


def test_install_puts_vllm_into_an_environment_of_its_own(tmp_path: Path) -> None:
    programs, notes, project = fake(tmp_path / "bin", "python3", PYTHON), tmp_path / "notes", tmp_path / "project"
    assert install_in(project, "--vllm", path=programs, NOTES=str(notes)).returncode == 0
    assert (project / ".venv-vllm" / "bin" / "python").is_file() and not (project / ".venv").exists()
    (line,) = notes.read_text().splitlines()
    assert line.endswith("requirements-vllm.txt")
    both = install_in(project, "--vllm", "--dev", path=programs, NOTES=str(notes))
    assert both.returncode == 2 and "give it alone" in both.stderr


def test_install_follows_changed_requirements(tmp_path: Path) -> None:
    programs, notes, project = fake(tmp_path / "bin", "python3", PYTHON), tmp_path / "notes", tmp_path / "project"
    assert install_in(project, path=programs, NOTES=str(notes)).returncode == 0
    with open(project / "requirements.txt", "a") as file:
        file.write("# changed\n")
    run(project / "install.sh", cwd=tmp_path, path=programs, NOTES=str(notes))
    done = notes.read_text().splitlines()
    assert len(done) == 3 and done[0] == done[2] and done[2].endswith("requirements.txt")


# SeqKD and GKD.


def test_gkd_has_the_published_settings() -> None:
    config = trained("gpt2/gkd/train.sh")
    assert (config.loss.type, config.loss.kd_ratio, config.curriculum.num_stages) == ("jsd", [1.0], 1)
    assert (config.on_policy.on_policy, config.on_policy.mixed_alpha) == ("mixed", 0.5)
    assert config.on_policy.replay_buffer == 1000
    assert (config.optimiser.global_batch_size, config.optimiser.lr, config.curriculum.epochs) == (8, 5e-4, 20)


def test_seqkd_trains_on_what_its_first_script_writes() -> None:
    command = printed("gpt2/seqkd/generate.sh")
    (made,) = parse([SeqKDOptions], "", command.arguments)
    config = trained("gpt2/seqkd/train.sh")
    assert config.data.data_dir == made.output_dir
    assert (config.loss.type, config.models.teacher) == ("sft", None)
    assert (config.optimiser.global_batch_size, config.optimiser.lr, config.curriculum.epochs) == (8, 5e-4, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comment_of_gkd_is_the_whole_command_of_gkd_with_pocl(family: str) -> None:
    text = METHODS.read_text().replace("<family>", family)
    (words,) = re.findall(r"bash (scripts/\w+/pocl/train\.sh(?:[^\n]*\\\n#)*[^\n]*)", text)
    script, *flags = shlex.split(words.replace("\\\n#", " "))
    given = trained(ROOT / script, *flags)
    (row,) = [row for row in main_rows(matched=False) if row.name == "GKD + POCL"]
    wanted = trained(f"{family}/{row.script}", *(flag.replace("{results}", f"results/{family}") for flag in row.flags))
    assert given == wanted
    assert (given.on_policy.on_policy, given.curriculum.num_stages) == ("mixed", 4)
    assert given.run.output_dir == f"results/{family}/gkd-pocl"  # not where JSD + POCL lies


# Selective reliance.


@pytest.mark.parametrize("row", ["kd", "kd-cl-teacher", "kd-cl-student", "kd-cl-sr-teacher", "kd-cl-sr-student"])
@pytest.mark.parametrize("family", FAMILIES)
def test_selective_rows_train_at_the_familys_pocl_settings(family: str, row: str) -> None:
    selective, pocl = (
        trained(f"{family}/selective/train.sh", ROW=row),
        trained(f"{family}/pocl/train.sh"),
    )
    assert selective.optimiser == pocl.optimiser
    assert selective.loss.loss_scaling == pocl.loss.loss_scaling
    assert (selective.curriculum.num_stages, selective.curriculum.epochs) == ((1, 20) if row == "kd" else (4, 8))
    assert (set(selective.loss.temperature or ()), set(selective.loss.kd_ratio or ())) == ({2.0}, {0.5})
    assert LOSSES["tfkl"].power(selective.loss.loss_scaling) == 2  # L = (1 - r) CE + r T^2 KL either way


@pytest.mark.parametrize(("data", "ban"), [("dolly", 6), ("sample", 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ban_of_repeated_n_grams_is_the_papers_and_off_on_the_sample_set(family: str, data: str, ban: int) -> None:
    for script in ("pocl/train.sh", "kd/train.sh", "sft/base.sh"):
        assert trained(f"{family}/{script}", DATA=data).generation.no_repeat_ngram == ban
    command = printed(f"{family}/eval/run_eval.sh", DATA=data)
    _, generation = parse([EvaluateOptions, GenerationOptions], "", command.arguments)
    assert generation.no_repeat_ngram == ban


def test_the_quickstart_bans_nothing_on_the_sample_set(tmp_path: Path) -> None:
    project = quickstart_in(tmp_path / "project")
    shown = planned(project / "scripts" / "quickstart.sh", cwd=tmp_path, DRY_RUN="1").output
    lines = [line for line in shown.splitlines() if "train.py" in line or "evaluate.py" in line]
    assert len(lines) == 6 + 7 and all("--no-repeat-ngram 0 " in line for line in lines)


def test_the_quickstart_takes_gpus_where_there_are_some_and_else_the_cores(four_gpus: Path, tmp_path: Path) -> None:
    fake(four_gpus, "python3", "exit 0")

    def launched(ranks: int, **environment: str) -> tuple[str, str]:
        """What is said of the machine, and how every train.py and evaluate.py is started."""
        result = run("quickstart.sh", "--ranks", ranks, cwd=tmp_path, path=four_gpus, DRY_RUN="1", **environment)
        assert result.returncode == 0, result.stderr
        commands = [line for line in result.stdout.splitlines() if " --seed" in line]
        starts = {re.split(r" --master_port| \S+/(?:train|evaluate)\.py", command)[0] for command in commands}
        assert len(commands) == 13 and len(starts) == 1  # 6 runs, 7 evaluations
        return next(line for line in result.stdout.splitlines() if "hat follows" in line), *starts

    said, command = launched(2)
    assert "2 of 4 GPU(s)" in said and command.endswith("deepspeed --num_gpus 2")
    said, command = launched(2, CUDA_VISIBLE_DEVICES="")
    assert "ranks: 2" in said and command.endswith("--num_accelerators 2") and "OMP_NUM_THREADS=" in command
    said, command = launched(1, CUDA_VISIBLE_DEVICES="")
    assert "ranks: 1" in said and command.endswith("/python3")  # torch's threads take every core
