"""Options from a file stand for flags, under those of the command line; a mistake in one is named."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import train
from pocl.cli.checks import parse_train
from pocl.cli.evaluate_options import EvaluateOptions, GenerationOptions
from pocl.cli.flags import parse
from pocl.cli.process import in_flags
from pocl.common.errors import UserError

BASE = ["--model", "student", "--teacher", "teacher", "--data-dir", "data", "--output-dir", "out"]


def written(folder: Path, text: str, name: str = "run.yaml") -> list[str]:
    """--config with a file of this text."""
    (folder / name).write_text(text, encoding="utf-8")
    return ["--config", str(folder / name)]


def complaint(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse_train([*BASE, *arguments])
    assert "\n" not in str(caught.value)
    return in_flags(str(caught.value))


def test_a_file_stands_for_the_flags_that_it_names(tmp_path: Path) -> None:
    text = """
    lr: 5e-4                      # YAML 1.1 would read a text here
    packing: on                   # and a boolean there
    curriculum: {num-stages: 2, restart_optimizer: false}
    loss:
      kd_ratio: [0.5, 0.9]
      type: trkl
    teacher_cache: null
    """
    flags = ["--lr", "5e-4", "--packing", "on", "--num-stages", "2", "--no-restart-optimizer", "--kd-ratio", "0.5"]
    assert parse_train([*BASE, *written(tmp_path, text)]) == parse_train([*BASE, *flags, "0.9", "--type", "trkl"])


def test_a_flag_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    config = written(tmp_path, "lr: 1\nkd_ratio: [0.1, 0.2]\nmodel: other\n")
    for arguments in ([*config, *BASE, "--lr", "2"], [*BASE, "--lr", "2", *config]):
        found = parse_train([*arguments, "--kd-ratio", "0.5"])
        assert (found.models.model, found.optimiser.lr, found.loss.kd_ratio) == ("student", 2, [0.5] * 4)


def test_of_two_files_the_second_wins(tmp_path: Path) -> None:
    both = [*written(tmp_path, "lr: 1\nseed: 3\n", "a.yaml"), *written(tmp_path, '{"lr": 2}', "b.json")]
    found = parse_train([*BASE, *both]).optimiser
    assert (found.lr, found.seed) == (2, 3)


def test_what_is_printed_gives_the_same_options_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*BASE, "--type", "tjsd", "--rerank", "off", "--lora-rank", "4", "--min-lr", "1e-9", "--run-name", "a: b"]
    with pytest.raises(SystemExit) as stopped:
        parse_train([*asked, "--print-config"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and yaml.safe_load(text)["optimiser"]["min_lr"] == 1e-9
    assert parse_train(written(tmp_path, text)) == parse_train(asked)


def test_only_rank_0_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_train([*BASE, "--print-config"])
    assert capsys.readouterr().out == ""


def test_every_program_takes_one(tmp_path: Path) -> None:
    config = written(tmp_path, "evaluation: {sets: [dolly, vicuna], model: m}\ngeneration: {top_p: 0.9}\n")
    options, generation = parse([EvaluateOptions, GenerationOptions], "", [*config, "--sets", "sinst"])
    assert (options.sets, options.model, generation.top_p) == (["sinst"], "m", 0.9)


def test_the_config_of_a_run_is_one(tmp_path: Path) -> None:
    begun = parse_train([*BASE, "--type", "sfkl", "--kd-ratio", "0.9", "--lora-rank", "2"])
    saved = {"options": train.run_options(begun), "fingerprints": {}, "world_size": 2}
    config = written(tmp_path, json.dumps(saved), "config.json")
    again = parse_train([*config, "--output-dir", "elsewhere"])
    assert again.run.output_dir == "elsewhere"
    assert dataclasses.replace(again, run=begun.run) == begun


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1\n", "unknown option 'learning_rate'"),
        ("kd_rato: 1\n", "unknown option 'kd_rato'; did you mean 'kd_ratio'?"),
        ("optimiser: {l_r: 1}\n", "unknown option 'optimiser.l_r'; did you mean 'lr'?"),
        ("optimizer: {lr: 1}\n", "unknown option 'optimizer'; did you mean 'optimiser'?"),
        ("data: {lr: 1}\n", "'lr' stands under 'data'; it belongs under 'optimiser'"),
        ("lr: 1\noptimiser: {lr: 2}\n", "gives 'lr' twice"),
        ("lr: [1, 2]\n", "'lr' is ['1', '2']; it must be one value"),
        ("kd_ratio: []\n", "'kd_ratio' is []; it must be one value or a list of them"),
        ("seed: {a: 1}\n", "'seed' is {'a': '1'}; it must be one value"),
        ("lr: fast\n", "argument --lr: invalid float value: 'fast'"),
        ("lr: -1\n", "--lr is -1.0; it must be above 0"),
        ("- lr\n", "holds no options"),
        ("lr: [1\n", "line 2 is neither YAML nor JSON"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    assert words in complaint(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"cannot read --config {tmp_path}/x.yaml: No such file" in complaint(["--config", f"{tmp_path}/x.yaml"])
    assert "argument --config: expected one argument" in complaint(["--config"])
