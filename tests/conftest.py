"""What all tests share: the real data and the golden values, a tiny tokenizer, tiny models in float64."""

# ruff: noqa: E402  The environment stands before the imports that read it.

import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # what tests start runs this code, whatever is installed
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported, which several libraries do
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import GPT2TokenizerFast, PreTrainedModel, PreTrainedTokenizerBase

from tests.runs import Folders, make_folders
from tests.tiny import FAMILIES, save_model, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


# The longest first.
LONG = ["test_families.py", "test_all_rows.py", "test_combinations.py", "test_interrupt.py", "test_training.py"]
LONG += ["test_lora.py", "test_vllm.py", "test_objective.py", "test_fused.py", "test_scripts.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left with one of them at the end."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: (place.get(item.path.name, len(LONG)), "training" not in item.path.parts))


def shared(name: str) -> Path:
    """A folder beside the project that holds what is too large for it; skips the test where it is not there."""
    path = ROOT.parent / "shared" / name
    if not path.is_dir():
        pytest.skip(f"needs {path}, which is not here")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data: instruction sets, GPT-2's tokenizer, published answers and tokens."""
    return shared("data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden values of the divergences."""
    return shared("golden")


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
    """GPT-2's own tokenizer."""
    folder = shared_data / "gpt2-tokenizer"
    return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 600 tokens."""
    return tiny_tokenizer()


def shaken(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """The model in float64 with noise on every weight: fresh biases are 0 and fresh logits nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture(scope="session")
def shake() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """``shaken``, for models that a test makes itself."""
    return shaken


@pytest.fixture(scope="session")
def models(tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedModel]:
    """One tiny student of each family in float64. Read only: a test that changes one makes its own copy."""
    size = {"vocab_size": len(tokenizer), "end_id": tokenizer.eos_token_id}
    return {family: shaken(tiny_model(family, **size)) for family in FAMILIES}


@pytest.fixture(scope="session")
def teacher(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A wider, deeper llama in float64 whose vocabulary is padded by 40 entries. Read only."""
    size = {"vocab_size": len(tokenizer) + 40, "end_id": tokenizer.eos_token_id}
    return shaken(tiny_model("llama", num_layers=3, width=48, seed=1, **size), seed=1)


@pytest.fixture(scope="session")
def gpt2_dir(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt2 as a model folder. Read only."""
    model = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny gpt2 pair with its data, of this module's own."""
    return make_folders(tmp_path_factory.mktemp("folders"), "gpt2")
