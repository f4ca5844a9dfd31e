"""The card beside a saved student tells what the run's own files know; the hub gets the folder as it is."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import yaml
from huggingface_hub import HfApi

import evaluate
import train
from pocl.common.errors import RunStopped
from pocl.training import hub as hub_module
from pocl.training.model_card import licence_of, make_card
from pocl.training.run_folder import RunFolder
from tests.hub_stand_in import Hub, hub_stand_in
from tests.runs import Folders, Result, call, train_arguments

SHORT = ["--num-stages", 2, "--num-train", 16, "--num-dev", 2, "--difficulty", "length", "--report-to", "none"]


def card_of(folder: Path) -> tuple[dict, str]:
    """(front matter, text) of a model folder's card."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def pushed(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Hub, Result]:
    """A short run that ends on the hub; the teacher states a licence."""
    (folders.teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    output_dir = tmp_path_factory.mktemp("runs")
    with hub_stand_in() as hub:
        result = call(train, train_arguments(folders, output_dir, *SHORT, "--push-to-hub", "me/student"))
    assert result.status == 0, result.output
    return RunFolder(output_dir / "tfkl" / "seed10"), hub, result


def test_the_hub_gets_a_private_repository_with_every_file_of_best(pushed: tuple[RunFolder, Hub, Result]) -> None:
    run, hub, result = pushed
    assert [(made["name"], made["organization"]) for made in hub.created] == [("student", "me")]
    assert "private" in json.dumps(hub.created[0])
    assert hub.files == {path.name: path.read_bytes() for path in run.best.iterdir()}
    assert result.last_line == f"{run.best} is at {hub.address}/me/student"


def test_where_a_run_goes_is_none_of_its_options(pushed: tuple[RunFolder, Hub, Result]) -> None:
    options = json.loads(pushed[0].config.read_text())["options"]["run"]
    assert not {"push_to_hub", "report_to", "output_dir"} & options.keys()
    assert not (pushed[0].path / "tensorboard").exists()


def test_the_card_tells_how_the_student_was_made(pushed: tuple[RunFolder, Hub, Result], folders: Folders) -> None:
    run = pushed[0]
    front, text = card_of(run.best)
    assert front["library_name"] == "transformers" and {"pocl", "tfkl"} <= set(front["tags"])
    assert "license" not in front and "model-index" not in front  # the student's is not known; nothing is scored
    assert "# " + "/".join(folders.student.parts[-2:]) + ", distilled from " in text
    assert "the curriculum `baby-step` in 2 stages, ranked by length" in text
    # 16 examples in two pools; T from 1 to 2, r from 0.7 to 1.
    assert "| 1 | 1–8 | 1 | 1.00 | 0.70 |" in text and "| 2 | 1–16 | 1 | 2.00 | 1.00 |" in text
    ledger = json.loads((run.path / "ledger.json").read_text())
    assert f"| optimizer steps | {ledger['optimizer_steps']} |" in text and "had not ended" not in text
    assert re.search(r"\| teacher \| \S+ \| apache-2.0 \|", text)
    assert re.search(r"\| student \| \S+ \| not stated where it lies \|", text)


def test_the_card_names_no_folder_of_the_machine(pushed: tuple[RunFolder, Hub, Result], folders: Folders) -> None:
    assert str(folders.student.parent.parent) not in "".join(map(str, card_of(pushed[0].best)))


def test_the_options_on_the_card_are_a_config(pushed: tuple[RunFolder, Hub, Result], tmp_path: Path) -> None:
    from pocl.cli.checks import parse_train

    run = pushed[0]
    (text,) = re.findall(r"```yaml\n(.*?)```", card_of(run.best)[1], flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(text)
    options = train.run_options(parse_train(["--config", str(tmp_path / "run.yaml"), "--output-dir", "x"]))
    begun = json.loads(run.config.read_text())["options"]
    for place in ("model", "teacher"):
        options["models"].pop(place), begun["models"].pop(place)
    options["data"].pop("data_dir"), begun["data"].pop("data_dir")
    assert json.loads(json.dumps(options)) == begun


def test_scores_join_the_card_once_they_are_known(
    pushed: tuple[RunFolder, Hub, Result], folders: Folders, tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(pushed[0].path, tmp_path / "run")))
    arguments = ["--model", run.best, "--sets", "short", "--data-root", folders.data_root, "--seeds", 1, 2]
    result = call(evaluate, [*arguments, "--max-length", 192, "--max-prompt-length", 160, "--num-examples", 2])
    assert result.status == 0, result.output
    front, text = card_of(run.best)
    scores = json.loads((run.path / "eval" / "summary.json").read_text())["short"]["rouge_l"]
    # Of two seeds: t(0.975, 1) = 12.706, and the standard error is half their distance.
    half = 12.7062 * abs(scores["seeds"]["1"] - scores["seeds"]["2"]) / 2
    low, high = scores["mean"] - half, scores["mean"] + half
    assert f"| short | 2 | {scores['mean']:.2f} ({low:.2f} to {high:.2f}) |" in text
    (result_of_set,) = front["model-index"][0]["results"]
    assert {found["type"] for found in result_of_set["metrics"]} == {"rouge_l", "exact_match"}
    assert "## Scores" not in make_card(run, "the fingerprint of other weights")


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("no front matter\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\n- a\n---\n", None),
    ],
)
def test_a_licence_is_what_the_models_own_card_states(tmp_path: Path, text: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == licence
    assert licence_of(str(tmp_path / "nothing")) is None


def test_who_is_not_known_to_the_hub_is_told_before_the_run(folders: Folders, tmp_path: Path) -> None:
    with hub_stand_in(token="hf_wrong") as hub:
        result = call(train, train_arguments(folders, tmp_path, *SHORT, "--push-to-hub", "me/student"))
    assert result.status == 2 and not list(tmp_path.iterdir()) and not hub.created
    assert "--push-to-hub me/student: the hub does not know this account" in result.last_line
    result = call(train, train_arguments(folders, tmp_path, *SHORT, "--push-to-hub", "me//student"))
    assert result.status == 2 and "--push-to-hub 'me//student' is no name of a repository" in result.last_line


def test_a_hub_that_refuses_leaves_the_student_and_the_command(tmp_path: Path) -> None:
    refused = mock.patch.object(HfApi, "upload_folder", side_effect=ConnectionError("gone"))
    wanted = rf"complete, but could not be uploaded to me/student: gone; .*hf upload me/student {tmp_path}"
    with hub_stand_in(), refused, pytest.raises(RunStopped, match=wanted):
        hub_module.push(tmp_path, "me/student")
