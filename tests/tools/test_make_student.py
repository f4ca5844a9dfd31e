"""make_student.py: a cut student computes what its layers compute in the whole, and is read again before success."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pocl.models.loading import load_config, load_model
from pocl.models.states import some_logits
from pocl.models.tuning import layer_stack
from tests.models.tiny_families import tiny_family
from tests.runs import Result, call
from tests.tiny import save_model
from tools import make_student


def cut(family: str, layers: list[int], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Result:
    """The tool on a tiny model of this family, in ``folder``/whole, to ``folder``/student."""
    model = tiny_family(family, vocab_size=len(tokenizer), eos_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    save_model(model, tokenizer, folder / "whole")
    arguments = ["--model", folder / "whole", "--output-dir", folder / "student", "--layers", *layers]
    return call(make_student, arguments)


@pytest.mark.parametrize(
    ("family", "setting", "kept"),
    [
        ("smollm3", "no_rope_layers", [1, 1, 0]),
        ("gpt_neo", "attention_layers", ["global", "global", "local"]),
        ("qwen3_5_text", "layer_types", ["linear_attention", "linear_attention", "full_attention"]),
        ("llama4_text", "no_rope_layers", [1, 1, 0]),
        ("gemma3", "layer_types", ["sliding_attention"] * 3),
        ("laguna", "mlp_layer_types", ["dense", "sparse", "sparse"]),
        ("deepseek_v3", "first_k_dense_replace", 1),
    ],
)
def test_settings_per_layer_are_cut_with_the_layers(
    family: str, setting: str, kept: object, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Against the larger model's own layers, run by hand (smollm#130)."""
    assert cut(family, [0, 2, 3], tmp_path, tokenizer).status == 0
    config = load_config(str(tmp_path / "student")).get_text_config()
    assert (getattr(config, setting), config.num_hidden_layers) == (kept, 3)
    whole, student = (load_model(str(tmp_path / name)) for name in ("whole", "student"))
    # A layer's class says what it does by its own attributes: without layer 1, the larger model is the student.
    tupled = family == "gpt_neo"
    layer_stack(whole)[1].forward = lambda states, *_, **__: (states, None) if tupled else states
    torch.testing.assert_close(some_logits(student), some_logits(whole), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "why"), [("gemma3n_text", "is invalid for input of size"), ("diffllama", "read again, its logits are")]
)
def test_what_cannot_be_cut_is_refused_and_leaves_nothing(
    family: str, why: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    result = cut(family, [0, 3], tmp_path, tokenizer)
    assert result.status == 2
    assert f"this {family} cannot be cut to the layers 0 3: " in result.last_line and why in result.last_line
    assert "give other --layers" in result.last_line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
