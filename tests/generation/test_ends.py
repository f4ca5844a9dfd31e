"""One rule says which tokens end an answer, wherever one is generated."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import evaluate
import train
from pocl.generation.decoding import Decoder
from pocl.training.batches import BatchCutter, GlobalBatch, Texts
from tests.runs import MAX_LENGTH, MAX_PROMPT, Folders, call, make_folders, train_arguments
from tools import generate_seqkd

END, OWN_ENDS = 0, range(100, 600, 2)  # the tokenizer's, and those of generation_config.json


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair whose student's generation_config.json names further end tokens."""
    folders = make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folders.student)
    model.generation_config.eos_token_id = [END, *OWN_ENDS]
    model.save_pretrained(folders.student)
    return folders


ON_POLICY = ("--on-policy", "mixed", "--mixed-alpha", 1, "--num-stages", 1, "--num-train", 16)


@pytest.mark.parametrize("what", ["ranking and dev", "on-policy text", "evaluation", "SeqKD"])
def test_the_tokenizers_and_the_models_own_end_tokens_end_an_answer(
    folders: Folders, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    init = Decoder.__init__

    def watched(self: Decoder, *arguments: Any) -> None:
        init(self, *arguments)
        seen.append(self.eos_ids)

    monkeypatch.setattr(Decoder, "__init__", watched)
    model, length = ["--model", folders.student, "--output-dir", tmp_path / "out"], ["--max-length", MAX_LENGTH]
    sets = ["--data-root", folders.data_root, "--sets", "short", "--seeds", 1, "--max-prompt-length", MAX_PROMPT]
    program, arguments = {
        "ranking and dev": (train, train_arguments(folders, tmp_path, "--num-stages", 1)),
        "on-policy text": (train, train_arguments(folders, tmp_path, *ON_POLICY, "--difficulty", "length")),
        "evaluation": (evaluate, [*model, *length, *sets]),
        "SeqKD": (generate_seqkd, [*model, *length, "--data-dir", folders.data]),
    }[what]
    result = call(program, arguments)
    assert result.status == 0, result.output
    assert seen and all(ends == [END, *OWN_ENDS] for ends in seen)


def test_on_policy_text_stops_before_the_models_own_end_token_and_ends_with_the_tokenizers(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts_seen: list[list[int]] = []
    cut = BatchCutter.cut

    def watched(self: BatchCutter, texts: Texts, step: int) -> GlobalBatch:
        texts_seen.extend(text for text in texts.responses if text is not None)
        return cut(self, texts, step)

    monkeypatch.setattr(BatchCutter, "cut", watched)
    command = train_arguments(folders, tmp_path, *ON_POLICY, "--difficulty", "length", "--num-dev", 0)
    result = call(train, command)
    assert result.status == 0, result.output
    longest = MAX_LENGTH - MAX_PROMPT
    assert len(texts_seen) == 16 and sum(len(text) < longest for text in texts_seen) > 8
    for text in texts_seen:
        assert not {*OWN_ENDS} & {*text}
        assert text.count(END) == (len(text) < longest or text[-1] == END) and END not in text[:-1]
