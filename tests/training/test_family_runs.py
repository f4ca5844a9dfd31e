"""Hybrid, recurrent, mixed and multimodal models are trained, answer, and are read again."""

import pytest
import torch

import train
from pocl.models.states import some_logits
from pocl.models.student import Student
from tests.models.tiny_families import tiny_family
from tests.runs import call, make_folders, train_arguments
from tests.tiny import save_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "mamba2", "gemma3", "llama4"])
def test_a_run_ends_with_a_student_that_answers(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    place, tokenizer = tmp_path_factory.mktemp(family), tiny_tokenizer()
    folders = make_folders(place / "data", "gpt2")
    model = tiny_family(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    whole = save_model(model, tokenizer, place / "model")
    short = ["--num-train", 16, "--num-stages", 2, "--num-dev", 2]
    result = call(train, train_arguments(folders, place / "run", *short, "--model", whole, "--teacher", whole))
    assert result.status == 0, result.output
    best = next((place / "run").rglob("best"))
    assert torch.isfinite(some_logits(Student.load(str(best)).model)).all()
    assert not torch.equal(some_logits(Student.load(str(best)).model), some_logits(model))
