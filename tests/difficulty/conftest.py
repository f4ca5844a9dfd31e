"""A tiny pair with its data. Read only."""

from pathlib import Path

import pytest

import train
from pocl.data.dataset import Split, load_split
from pocl.models.student import Student
from tests.runs import MAX_LENGTH, Folders, call, make_folders, train_arguments


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("difficulty"), "gpt2")


@pytest.fixture(scope="session")
def split(gpt2: Folders) -> Split:
    return load_split(gpt2.data, "train", max_length=MAX_LENGTH)


@pytest.fixture(scope="session")
def student(gpt2: Folders) -> Student:
    return Student.load(str(gpt2.student))


@pytest.fixture(scope="session")
def probed(gpt2: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run whose student never changes, with three examples of each quarter followed; what it said."""
    folder = tmp_path_factory.mktemp("probed")
    frozen = ["--lr", 1e-30, "--min-lr", 0, "--num-dev", 0]
    result = call(train, train_arguments(gpt2, folder, "--bucket-examples", 3, *frozen))
    assert result.status == 0, result.output
    return folder / "tfkl" / "seed10", result.output
