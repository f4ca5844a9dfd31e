"""A tiny pair with relative positions: it reads the same padded to the left, as TRL does, and to the right."""

from pathlib import Path

import pytest

from tests.runs import Folders, make_folders


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of its folders."""
    root = tmp_path_factory.mktemp("pair")
    make_folders(root, "llama")
    return root


@pytest.fixture(scope="package")
def llama(pair: Path) -> Folders:
    """Its folders."""
    return Folders(pair / "student", pair / "teacher", pair / "processed", pair / "data")
