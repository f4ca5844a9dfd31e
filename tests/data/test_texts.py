"""Texts stay what they are: the border between prompt and response, special tokens' names, white space."""

import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pocl.data.dataset import load_split
from pocl.data.prompts import encode_text, make_prompt, tokenise, tokenise_exactly
from pocl.evaluation.sets import Example, tokenise_prompts
from tests.runs import call
from tests.tiny import END_OF_TEXT, ROOT, tiny_tokenizer
from tools import process_data

PROMPT = make_prompt("Say hi.")
RESPONSES = [
    "Hello there.",
    "\nHello",
    "\n\n\n  two",
    "  three",
    "\tfour",
    " ",
    ":\n",
    f"a{END_OF_TEXT}b",
    "北京 😀",
    "e\u0301",
]


def trained(bpe: Tokenizer, texts: list[str]) -> PreTrainedTokenizerFast:
    """600 tokens, among them all bytes as GPT-2 writes them."""
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Four kinds of tokenizer, by what they do at a border."""
    lines = (ROOT / "data" / "sample" / "raw.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [make_prompt(r["instruction"], r["input"]) + r["output"] for r in map(json.loads, lines)]
    texts += [":\n\nHello", ":\n\n\n", ":\nThe", ":\nIt"] * 400
    # As Qwen's and Llama 3's: signs and the line breaks behind them are one piece.
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    by_lines = Tokenizer(models.BPE())
    by_lines.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, False, use_regex=False)]
    )
    by_lines.decoder = decoders.ByteLevel()
    # As Llama 2's: a space before each text, and nothing that keeps a token from standing across lines.
    whole = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.pre_tokenizer = None
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    whole.decoder = decoders.Sequence(pieces)
    prefixed = tiny_tokenizer()
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "GPT-2's": tiny_tokenizer(),
        "Qwen's": trained(by_lines, texts),
        "Llama 2's": llama(whole, texts),
        "with a space before a text": prefixed,
    }


def llama(bpe: Tokenizer, texts: list[str]) -> PreTrainedTokenizerFast:
    """A BPE over whole texts, whose bytes are tokens."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", END_OF_TEXT], show_progress=False)
    bpe.train_from_iterator([text[-60:] for text in texts], trainer)
    state = json.loads(bpe.to_str())
    for byte in range(256):
        state["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(state["model"]["vocab"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END_OF_TEXT, bos_token="<s>"
    )


def say(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


KINDS = ["GPT-2's", "Qwen's", "Llama 2's", "with a space before a text"]


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_has_the_tokens_that_it_is_asked_with_and_both_say_the_texts(kind: str, response: str) -> None:
    tokenizer = tokenizers()[kind]
    prompt_ids, response_ids = tokenise(tokenizer, PROMPT, response)
    (asked,), _ = tokenise_prompts(tokenizer, [Example(0, PROMPT, (response,))], 999)
    assert prompt_ids == asked
    assert response_ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in prompt_ids + response_ids[:-1]
    both = prompt_ids + response_ids[:-1]
    said = say(tokenizer, both).removeprefix(" " if kind.startswith("with") else "")
    assert said == PROMPT + response


@pytest.mark.parametrize("kind", ["Qwen's", "Llama 2's"])
def test_these_tokenizers_have_tokens_across_the_border(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    apart = [tokenise_exactly(tokenizer, PROMPT, response).apart for response in ("\n\nHello", "The end")]
    assert any(apart)


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_a_special_token_is_text(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    ids = encode_text(tokenizer, f"a {END_OF_TEXT} b")
    assert tokenizer.eos_token_id not in ids
    assert say(tokenizer, ids).strip() == f"a {END_OF_TEXT} b"


def test_what_was_done_to_texts_is_counted_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    tokenizers()["Qwen's"].save_pretrained(folder)
    outputs = ["Hello.", f"one {END_OF_TEXT} two", "\n\nHello", "\n\nHello", "plain"]
    records = [{"instruction": "Say hi.", "output": output} for output in outputs]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["--raw", tmp_path / "raw.jsonl", "--tokenizer", folder, "--output-dir", tmp_path / "made"]
    result = call(process_data, [*command, "--num-dev", 1, "--data-root", tmp_path])
    assert result.status == 0, result.output
    assert "1 record(s) hold the name of a special token" in result.output
    assert "2 record(s) have a response whose first letters would have been one token" in result.output
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert manifest["texts"] == {"special_names": 1, "encoded_apart": 2, "not_reproduced": 0}
    train = load_split(tmp_path / "made", "train", max_length=512)
    assert {*train.table.column_names} == {
        *("id", "prompt", "response", "category", "prompt_ids", "response_ids"),
        *("num_prompt_tokens", "num_response_tokens"),
    }
    end = tokenizers()["Qwen's"].eos_token_id
    assert all(ids.count(end) == 1 and ids[-1] == end for ids in train.column("response_ids"))


def test_a_token_that_a_tokenizer_begins_texts_with_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "raw.jsonl").write_text('{"instruction": "Say hi.", "output": "Hi."}\n' * 3)
    command = ["--raw", tmp_path / "raw.jsonl", "--tokenizer", tmp_path / "tokenizer"]
    command += ["--output-dir", tmp_path / "made", "--num-dev", 1, "--data-root", tmp_path]
    result = call(process_data, command)
    assert result.status == 0 and "puts <s> around a text, which is left out" in result.output, result.output
