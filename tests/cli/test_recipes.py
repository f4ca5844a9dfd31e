"""A recipe lies under files and flags, is what its name says, and a mistake in its name is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl.cli.checks import parse_train
from pocl.cli.recipes import RECIPES
from pocl.cli.resolve import make_schedule
from pocl.common.errors import UserError
from tests.scripts.test_scripts import trained

BASE = ["--model", "student", "--teacher", "teacher", "--data-dir", "data", "--output-dir", "out"]


def method(config: Any) -> tuple[object, ...]:
    """What a recipe decides."""
    given = config.curriculum
    stages = (given.curriculum, given.num_stages, given.epochs, given.restart_optimizer)
    return *stages, config.loss.temperature, config.loss.kd_ratio


def test_recipes_are_what_their_names_say() -> None:
    paper, steady = (method(parse_train([*BASE, "--recipe", name])) for name in ("paper", "steady"))
    assert paper == ("baby-step", 4, 8, True, [1.0, 1.33, 1.67, 2.0], [0.7, 0.8, 0.9, 1.0])
    assert steady == ("baby-step", 4, 8, False, [1.0] * 4, [0.7] * 4)


def test_steady_lets_the_rate_fall_once_where_the_papers_restarts() -> None:
    batch = ["--global-batch-size", "16"]
    paper, steady = (
        [step.lr for step in make_schedule(parse_train([*BASE, *batch, "--recipe", name]), 160)]
        for name in ("paper", "steady")
    )
    # Pools of 40, 80, 120 and 160 make 2, 5, 7 and 10 steps an epoch, of which there are 8.
    assert len(paper) == len(steady) == 8 * (2 + 5 + 7 + 10)
    assert [step for step in range(1, 192) if steady[step] > steady[step - 1]] == []
    assert [step for step in range(1, 192) if paper[step] > paper[step - 1]] == [16, 56, 112]


@pytest.mark.parametrize("order", [1, -1])
def test_flags_win_over_a_recipe_wherever_they_stand(order: int) -> None:
    parts = [["--recipe", "steady"], ["--kd-ratio", "0.5", "--num-stages", "2"]][::order]
    found = parse_train([*parts[0], *BASE, *parts[1]])
    assert method(found) == ("baby-step", 2, 8, False, [1.0] * 2, [0.5] * 2)


def test_files_win_over_a_recipe_and_may_name_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: steady\nloss: {temperature: 2}\n", encoding="utf-8")
    config = ["--config", str(tmp_path / "run.yaml"), *BASE]
    assert method(parse_train(config)) == ("baby-step", 4, 8, False, [2.0] * 4, [0.7] * 4)
    other = method(parse_train([*config, "--recipe", "paper"]))
    assert other == ("baby-step", 4, 8, True, [2.0] * 4, [0.7, 0.8, 0.9, 1])


def test_what_is_printed_holds_the_values_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train([*BASE, "--recipe", "steady", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["loss"]["kd_ratio"] == [0.7] and printed["curriculum"]["restart_optimizer"] is False
    assert "recipe" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "stedy"], "unknown --recipe 'stedy'; did you mean 'steady'? (known: paper, steady)"),
        (["--recipe"], "argument --recipe: expected one argument"),
        (["--recipe", "paper", "--type", "fkl"], "for a temperature use --type tfkl"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train([*BASE, *words])
    assert said in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_papers_script_takes_every_recipe(recipe: str) -> None:
    found = trained("gpt2/pocl/train.sh", "--recipe", recipe)
    assert method(found) == method(parse_train([*BASE, "--recipe", recipe]))


def test_the_papers_script_is_the_papers_recipe() -> None:
    assert method(trained("gpt2/pocl/train.sh")) == method(parse_train([*BASE, "--recipe", "paper"]))
