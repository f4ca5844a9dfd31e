"""Flags: all are explained, a misspelt one names its neighbour, and what cannot work together is refused at once."""

import dataclasses
import re

import pytest

import train
from pocl.cli import options
from pocl.cli.checks import parse_train
from pocl.cli.evaluate_options import EvaluateOptions, GenerationOptions
from pocl.cli.flags import flag, parse
from pocl.cli.options import train_defaults
from pocl.cli.process import in_flags, run_main
from pocl.common.errors import UserError
from tests.runs import call
from tools.generate_seqkd import SeqKDOptions
from tools.process_data import ProcessOptions

REQUIRED = ["--model", "student", "--data-dir", "data", "--output-dir", "out"]
BASE = [*REQUIRED, "--teacher", "teacher"]
GROUPS = [field.type for field in dataclasses.fields(options.TrainConfig)]
FIELDS = [field for group in (*GROUPS, EvaluateOptions) for field in dataclasses.fields(group)]


def complaint(*flags: str, base: list[str] = BASE) -> str:
    """The one line with which train.py's flags are refused."""
    with pytest.raises(UserError) as caught:
        parse_train([*base, *flags])
    assert "\n" not in str(caught.value)
    return in_flags(str(caught.value))


def test_the_defaults_are_pocl() -> None:
    config = parse_train(BASE)
    assert (config.loss.type, config.loss.temperature, config.loss.kd_ratio) == (
        "tfkl",
        pytest.approx([1, 4 / 3, 5 / 3, 2]),
        pytest.approx([0.7, 0.8, 0.9, 1]),
    )
    assert (config.curriculum.curriculum, config.curriculum.num_stages, config.curriculum.epochs) == (
        "baby-step",
        4,
        8,
    )
    assert (config.optimiser.lr, config.optimiser.min_lr, config.optimiser.weight_decay) == (1e-4, 1e-7, 0.01)
    assert (config.optimiser.global_batch_size, config.optimiser.clip_grad, config.optimiser.seed) == (64, 1.0, 10)
    assert (config.generation.sampling_temperature, config.generation.top_p, config.generation.top_k) == (1.0, 1.0, 0)
    assert (config.generation.no_repeat_ngram, config.data.max_length) == (6, 512)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_flag_has_a_help_line(field: dataclasses.Field) -> None:
    assert len(field.metadata["help"].split()) >= 3


def test_no_flag_has_two_owners() -> None:
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_options_are_frozen() -> None:
    config = parse_train(BASE)
    for part in (config, *(getattr(config, field.name) for field in dataclasses.fields(config))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--kd-rato", "--kd-ratio"),
        ("--kd-rato=0.5", "--kd-ratio"),
        ("--no-repeat-ngrams", "--no-repeat-ngram"),
        ("--gradient-checkpoint", "--gradient-checkpointing"),
        ("--num-stage", "--num-stages"),
        ("--curiculum", "--curriculum"),
    ],
)
def test_an_unknown_flag_names_the_closest(flag: str, meant: str) -> None:
    message = complaint(flag, "1")
    assert f"unknown argument {flag!r}" in message and f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("flag", ["--temp", "--batch", "--output", "--num-st", "--teach"])
def test_abbreviations_are_refused(flag: str) -> None:
    assert f"unknown argument {flag!r}" in complaint(flag, "2")


def test_a_stray_word_is_refused() -> None:
    assert "unknown argument 'stray'" in complaint("stray")


def test_the_last_mention_of_a_flag_wins() -> None:
    config = parse_train([*BASE, "--lr", "1", "--kd-ratio", "0.1", "0.2", "--lr", "2", "--kd-ratio", "0.5", "--lr=3"])
    assert config.optimiser.lr == 3.0
    assert config.loss.kd_ratio == [0.5] * 4


@pytest.mark.parametrize("flag", ["--global-batch-size", "--global_batch_size"])
def test_hyphens_and_underscores_are_the_same(flag: str) -> None:
    assert parse_train([*BASE, flag, "32"]).optimiser.global_batch_size == 32


@pytest.mark.parametrize("flags", [["--no-restart-optimizer"], ["--restart-optimizer", "false"]])
def test_a_switch_that_is_on_can_be_turned_off(flags: list[str]) -> None:
    assert parse_train(BASE).curriculum.restart_optimizer is True
    assert parse_train([*BASE, *flags]).curriculum.restart_optimizer is False


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=3"])
def test_the_launchers_own_flag_is_passed_over(flag: str) -> None:
    assert parse_train([flag, *BASE]) == parse_train(BASE)


@pytest.mark.parametrize("flag", ["--model", "--data-dir", "--output-dir"])
def test_a_required_flag_that_is_missing_is_named(flag: str) -> None:
    start = REQUIRED.index(flag)
    message = complaint("--type", "sft", base=REQUIRED[:start] + REQUIRED[start + 2 :])
    assert f"required: {flag}" in message and flag.replace("-", "_") not in message.replace(flag, "")


@pytest.mark.parametrize("flag", ["--data-dir", "--num-stages", "--global-batch-size"])
def test_a_complaint_spells_a_flag_as_the_help_does(flag: str) -> None:
    message = complaint(flag, "--lr", "1")
    assert f"argument {flag}: " in message and flag[2:].replace("-", "_") not in message
    assert f"did you mean {flag!r}?" in complaint(f"{flag[:-1]}", "1")


@pytest.mark.parametrize("options", [*GROUPS, EvaluateOptions, SeqKDOptions, ProcessOptions], ids=lambda o: o.__name__)
def test_no_help_line_says_two_defaults(options: type) -> None:
    for field in dataclasses.fields(options):
        assert "default:" not in field.metadata["help"] or field.default is None, field.name


def test_sft_needs_no_teacher_and_takes_none() -> None:
    config = parse_train([*REQUIRED, "--type", "sft"])
    assert config.models.teacher is None
    assert "--type sft uses no teacher; drop --teacher teacher" in complaint("--type", "sft")


def test_a_divergence_needs_a_teacher() -> None:
    assert "--type tfkl distils from a teacher; give --teacher" in complaint(base=REQUIRED)


def test_a_plain_type_takes_no_temperature() -> None:
    message = complaint("--type", "fkl", "--temperature", "2")
    assert "--type fkl has T = 1" in message and "use --type tfkl" in message
    assert "use --type tsrkl" in complaint("--type", "srkl", "--temperature", "1", "1.5", "1.7", "2")
    assert parse_train([*BASE, "--type", "fkl", "--temperature", "1"]).loss.type == "fkl"


def test_an_unknown_type_names_the_closest() -> None:
    assert "did you mean 'tsrkl'?" in complaint("--type", "tsrk")


def test_losses_of_training_rank_nothing_where_no_reference_is_trained_on() -> None:
    flags = ["--on-policy", "mixed", "--mixed-alpha", "1"]
    assert "--mixed-alpha 1 trains on none" in complaint("--difficulty", "snapshot", *flags)
    parse_train([*BASE, "--difficulty", "snapshot", "length", *flags])
    parse_train([*BASE, "--difficulty", "snapshot", "--on-policy", "mixed", "--mixed-alpha", "0.9"])


def test_reliance_wants_a_ranking_before_training_ends() -> None:
    flags = ["--selective-reliance", "linear", "--difficulty", "snapshot", "--temperature", "1", "--kd-ratio", "1"]
    wanted = "--difficulty snapshot has none before the only stage; give --rerank epoch"
    assert wanted in complaint(*flags, "--num-stages", "1")
    assert wanted in complaint(*flags, "--num-stages", "1", "--rerank", "epoch", "--epochs", "1")
    parse_train([*BASE, *flags, "--num-stages", "1", "--rerank", "epoch"])
    parse_train([*BASE, *flags, "--num-stages", "1", "--difficulty-file", "ranking.jsonl"])
    parse_train([*BASE, *flags])


def test_an_unknown_curriculum_names_the_closest_and_all() -> None:
    message = complaint("--curriculum", "babystep")
    assert "did you mean 'baby-step'?" in message and "one-pass" in message and "whole-pool" in message


@pytest.mark.parametrize("ratios", [["1.5"], ["-0.1"], ["0.5", "1.01"], ["nan"], ["0", "0.5", "2", "1"]])
def test_a_kd_ratio_outside_0_to_1_is_refused(ratios: list[str]) -> None:
    assert re.search("--kd-ratio holds .*; it must be at least 0 and at most 1$", complaint("--kd-ratio", *ratios))


@pytest.mark.parametrize("flag", ["kd-ratio", "temperature"])
def test_a_count_of_values_that_fits_no_stage_is_refused(flag: str) -> None:
    assert f"--{flag} has 3 values for 4 stage(s)" in complaint(f"--{flag}", "0.5", "0.6", "0.7")
    assert f"--{flag} has 2 values for 1 stage(s)" in complaint(
        f"--{flag}", "0.5", "0.6", "--num-stages", "1", f"--{'temperature' if flag == 'kd-ratio' else 'kd-ratio'}", "1"
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num-stages", "0"),
        ("--epochs", "-1"),
        ("--global-batch-size", "0"),
        ("--batch-size", "0"),
        ("--max-tokens", "0"),
        ("--max-tokens", "-1"),
        ("--eval-batch-size", "0"),
        ("--chunk-tokens", "0"),
        ("--eval-every", "0"),
        ("--log-every", "0"),
        ("--max-length", "0"),
        ("--num-train", "0"),
        ("--num-dev", "-1"),
        ("--patience", "0"),
        ("--bucket-examples", "-1"),
        ("--max-skipped-steps", "-1"),
        ("--train-last-layers", "0"),
        ("--lora-rank", "0"),
        ("--lora-alpha", "0"),
        ("--lora-alpha", "inf"),
        ("--lora-dropout", "1"),
        ("--reliance-threshold", "1.1"),
        ("--mixed-alpha", "-0.1"),
        ("--replay-buffer", "-1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "fast"),
        ("--min-lr", "-1"),
        ("--min-lr", "nan"),
        ("--clip-grad", "0"),
        ("--weight-decay", "nan"),
        ("--weight-decay", "-1"),
        ("--temperature", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--sampling-temperature", "-1"),
        ("--sampling-temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--top-p", "nan"),
        ("--top-k", "-1"),
        ("--no-repeat-ngram", "-1"),
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--dtype", "fp64"),
        ("--loss-scaling", "none"),
        ("--restart-optimizer", "maybe"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_flag(flag: str, value: str) -> None:
    assert flag in complaint(f"{flag}={value}")


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Options with every kind of bound."""

    share: float = flag("a share of the whole", 0.5, above=0, at_most=1)
    rates: list[float] | None = flag("rates of the thing", None, at_least=0)
    count: int = flag("how many of them", 1, at_least=1, below=10)
    free: float = flag("any number at all", -1.0)
    names: list[str] = flag("some of the names", ["one"], known=("one", "two"))
    chosen: list[str] | None = flag("none, or some of them", None, known=("one", "two"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--share 0", "--share is 0.0; it must be above 0 and at most 1"),
        ("--share nan", "--share is nan; it must be above 0 and at most 1"),
        ("--rates 1 inf 2", "--rates holds inf; it must be at least 0 and finite"),
        ("--count 10", "--count is 10; it must be at least 1 and below 10"),
        ("--free nan", "--free is nan; it must be finite"),
        ("--names one thre", "unknown --names 'thre' (known: one, two)"),
        ("--names on", "unknown --names 'on'; did you mean 'one'? (known: one, two)"),
    ],
)
def test_a_value_outside_its_flags_bounds_is_told_with_them(words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([Bounded], "", words.split())
    assert str(caught.value) == told


def test_a_value_on_its_bound_is_taken() -> None:
    words = "--share 1 --rates 0 0.5 --count 9 --free 0 --names two one"
    (taken,) = parse([Bounded], "", words.split())
    assert taken == Bounded(1.0, [0.0, 0.5], 9, 0.0, ["two", "one"])


def test_defaults_are_told_by_group() -> None:
    assert "model" not in train_defaults()["models"]  # it is required
    assert train_defaults()["models"]["teacher"] is None
    assert train_defaults()["curriculum"]["difficulty"] == ["student"]


@pytest.mark.parametrize(("loss", "flag"), [("sfkl", "--skew"), ("tsrkl", "--skew"), ("jsd", "--teacher-weight")])
def test_a_mixture_weight_outside_its_range_is_refused(loss: str, flag: str) -> None:
    for value in ("0", "1", "nan"):
        assert f"{flag} is " in complaint("--type", loss, flag, value)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--sets", "dolly"], "either --model FOLDER or --answers FILE"),
        (["--sets", "dolly", "--model", "m", "--answers", "a"], "either --model FOLDER or --answers FILE"),
        (["--sets", "dolly", "vicuna", "--answers", "a"], "--answers belongs to one set, .*--sets names 2"),
        (["--sets", "dolly", "--model", "m", "--num-examples", "0"], "--num-examples is 0"),
        (["--sets", "dolly", "--model", "m", "--max-prompt-length", "512"], "--max-prompt-length 512 must leave room"),
        (["--sets", "dolly", "--model", "m", "--max-prompt-length", "0"], "--max-prompt-length is 0"),
        (["--sets", "dolly", "--model", "m", "--eval-batch-size", "0"], "--eval-batch-size is 0"),
        (["--sets", "dolly", "--model", "m", "--seeds", "1", "-1"], "--seeds holds -1"),
    ],
)
def test_options_of_evaluate_that_cannot_work_are_refused(flags: list[str], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        parse([EvaluateOptions, GenerationOptions], "", flags)


def test_help_prints_every_group_and_flag() -> None:
    result = call(train, ["--help"])
    assert result.status == 0, result.output
    for group in GROUPS:
        assert f"\n{group._argument_group_name}:\n" in result.output
        for field in dataclasses.fields(group):
            assert f"--{field.name.replace('_', '-')}" in result.output
    text = " ".join(result.output.split())
    assert "--no-restart-optimizer turns --restart-optimizer off --" in text
    assert "fresh cosine at each stage (default: True)" in text


def test_a_users_mistake_is_one_line_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: parse_train([*BASE, "--type", "tfk"]))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and "did you mean 'tfkl'?" in printed.err
