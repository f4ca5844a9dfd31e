"""Prompts and tokens are the published ones; batches hold each example once; bad input is told by file and line."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pocl.common.errors import UserError
from pocl.common.files import read_json, read_jsonl, write_json, write_jsonl
from pocl.data.batch import IGNORE, Batch, collate
from pocl.data.blocks import READING_TOKENS, blocks_by_length, blocks_to_read
from pocl.data.dataset import FORMAT_VERSION, Split, load_split, read_manifest
from pocl.data.micro_batches import check_shares
from pocl.data.prompts import make_prompt, tokenise
from pocl.data.sources import check_record, read_instructions
from pocl.models.identity import check_tokenizer, tokenizer_fingerprint
from tests.tiny import tiny_tokenizer

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


# The prompt template


@pytest.mark.parametrize(
    ("name", "count"), [("dolly", 500), ("self-inst", 242), ("vicuna", 80), ("sinst/11_", 1694), ("uinst/11_", 1050)]
)
def test_prompts_are_the_published_ones(shared_data: Path, name: str, count: int) -> None:
    records = read_jsonl(shared_data / name / "valid.jsonl")
    assert len(records) == count
    for record in records:
        assert make_prompt(record["instruction"], record.get("input", "")) == record["prompt"]


def test_braces_survive_in_the_prompt() -> None:
    prompt = make_prompt("Print {input} and {instruction} {0} {}", "a {input} {instruction} }{")
    assert "### Instruction:\nPrint {input} and {instruction} {0} {}\n\n### Input:\n" in prompt
    assert prompt.endswith("### Input:\na {input} {instruction} }{\n\n### Response:\n")


def test_a_prompt_without_input_has_no_input_section() -> None:
    assert make_prompt("Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n"
    )


# Tokens


def test_a_response_ends_with_the_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = tokenise(tokenizer, make_prompt("Say hi."), "Hi.")
    assert response[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in prompt + response[:-1]
    assert tokenizer.decode(prompt) == make_prompt("Say hi.") and tokenizer.decode(response[:-1]) == "Hi."


def test_the_fingerprint_of_a_tokenizer_tells_tokenizers_apart(
    tokenizer: PreTrainedTokenizerBase, gpt2_dir: Path
) -> None:
    assert tokenizer_fingerprint(tiny_tokenizer()) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tiny_tokenizer(599)) != tokenizer_fingerprint(tokenizer)


# Batches


def test_labels_are_the_next_tokens_of_the_response() -> None:
    batch = collate([7, 8], [[1, 2, 3], [4]], [[5, 6, 0], [9, 0]], max_length=16)
    assert batch.example_ids.tolist() == [7, 8]
    assert batch.input_ids.tolist()[0] == [1, 2, 3, 5, 6]
    assert batch.input_ids.tolist()[1][:2] == [4, 9]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    # The end-of-text (0) is a target; padding, whatever its id, is none.
    assert batch.labels.tolist() == [[-100, -100, 5, 6, 0], [9, 0, -100, -100, -100]]
    assert batch.num_response_tokens == 5


def test_a_sequence_is_cut_at_max_length() -> None:
    batch = collate([0, 1, 2], [[1, 2, 3]] * 3, [[4, 5, 6, 7, 0], [4, 5, 0], [4, 0]], max_length=6)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 0]]
    assert batch.labels.tolist() == [[-100, -100, 4, 5, 6], [-100, -100, 4, 5, 0], [-100, -100, 4, 0, -100]]


def test_an_end_of_text_inside_a_response_is_a_target_too() -> None:
    batch = collate([0], [[1, 0]], [[5, 0, 6, 0]], max_length=16)
    assert batch.labels.tolist() == [[-100, 5, 0, 6, 0]]


@pytest.mark.parametrize("seed", range(30))
def test_batches_are_what_a_naive_loop_makes(seed: int) -> None:
    rng = random.Random(seed)
    max_length = rng.randrange(8, 20)
    prompts = [rng.choices(range(9), k=rng.randrange(1, max_length)) for _ in range(6)]
    responses = [[*rng.choices(range(9), k=rng.randrange(0, 20)), 0] for _ in range(6)]
    batch = collate(range(6), prompts, responses, max_length=max_length)
    width = max(min(len(p) + len(r), max_length) for p, r in zip(prompts, responses, strict=True)) - 1
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (6, width)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        sequence = (prompt + response)[:max_length]
        for t in range(width):
            is_real, is_response = t + 1 < len(sequence), len(prompt) <= t + 1 < len(sequence)
            assert batch.attention_mask[row, t] == is_real
            assert batch.labels[row, t] == (sequence[t + 1] if is_response else IGNORE)
            assert not is_real or batch.input_ids[row, t] == sequence[t]


def table(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> datasets.Dataset:
    """A split as tools/process_data.py writes it, as far as training reads it."""
    return datasets.Dataset.from_dict(
        {
            "id": [100 + i for i in range(len(prompts))],
            "prompt_ids": list(prompts),
            "response_ids": list(responses),
            "num_prompt_tokens": [len(prompt) for prompt in prompts],
            "num_response_tokens": [len(response) for response in responses],
        }
    )


def test_a_split_counts_the_tokens_that_its_batches_hold() -> None:
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, 0], [8] * 20 + [0], [9, 9, 9, 0]]
    split = Split(table(prompts, responses), max_length=8)
    assert len(split) == 3
    assert split.ids.tolist() == [100, 101, 102]
    assert split.lengths.tolist() == [4, 7, 5]  # one less than the tokens: the last is only a label
    assert split.num_labels.tolist() == [2, 7, 4]
    for position in range(3):
        batch = split.batch([position])
        assert batch.input_ids.shape == (1, split.lengths[position])
        assert batch.num_response_tokens == split.num_labels[position]
    both: Batch = split.batch(np.array([2, 0]))
    assert both.example_ids.tolist() == [102, 100]
    assert both.input_ids.tolist()[0] == [5, 6, 9, 9, 9]


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 60, size=count)


def test_a_global_batch_that_the_ranks_cannot_share_is_refused() -> None:
    check_shares(64, 4)
    with pytest.raises(UserError, match="`global_batch_size` 10 cannot be split evenly over 4 ranks"):
        check_shares(10, 4)


@pytest.mark.parametrize(("count", "size"), [(1, 4), (8, 4), (9, 4), (30, 7), (5, 100)])
def test_blocks_hold_every_position_once_longest_first(count: int, size: int) -> None:
    lengths = lengths_of(count)
    blocks = blocks_by_length(lengths, size)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(count))
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1) and 0 < len(blocks[-1]) <= size
    assert np.concatenate([lengths[block] for block in blocks]).tolist() == sorted(lengths.tolist(), reverse=True)


def test_blocks_of_equal_lengths_keep_their_order() -> None:
    assert [block.tolist() for block in blocks_by_length(np.array([3, 3, 5, 3]), 2)] == [[2, 0], [1, 3]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_to_read_hold_as_many_tokens_as_the_device_reads_together(device: str) -> None:
    lengths = np.concatenate([lengths_of(300), [READING_TOKENS[device] + 1]])
    blocks = blocks_to_read(lengths, torch.device(device))
    assert sorted(np.concatenate(blocks).tolist()) == list(range(301))
    assert blocks[0].tolist() == [300]  # longer than the budget, and alone
    sizes = [len(block) * int(lengths[block].max()) for block in blocks[1:]]
    assert max(sizes) <= READING_TOKENS[device]
    for block, after in zip(blocks[1:], blocks[2:], strict=False):
        assert (len(block) + 1) * int(lengths[block].max()) > READING_TOKENS[device]  # no room for one more
        assert lengths[block].min() >= lengths[after].max()


# Processed folders


MANIFEST = {
    "format_version": FORMAT_VERSION,
    "fingerprint": "f",
    "tokenizer": "mine",
    "tokenizer_fingerprint": "t",
    "max_prompt_length": 4,
}


def processed(folder: Path, *, prompt_length: int = 3, **changes: Any) -> Path:
    """A processed folder with a train split of two examples."""
    table([[1] * prompt_length, [2]], [[3, 0], [4, 0]]).save_to_disk(str(folder / "train"))
    write_json(folder / "manifest.json", MANIFEST | changes)
    return folder


def test_a_processed_split_is_read(tmp_path: Path) -> None:
    split = load_split(processed(tmp_path), "train", max_length=8)
    assert split.ids.tolist() == [100, 101]
    assert load_split(tmp_path, "train", max_length=8, num_examples=1).ids.tolist() == [100]


def test_a_folder_that_was_not_processed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json\); run tools/process_data.py first"):
        load_split(tmp_path, "train", max_length=8)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no split 'dev'; run tools/process_data.py again"):
        load_split(processed(tmp_path), "dev", max_length=8)


@pytest.mark.parametrize("text", ['{"format_version": 0}', "{}", "[]", "null"])
def test_a_manifest_of_another_version_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"this code reads format {FORMAT_VERSION}"):
        read_manifest(tmp_path)


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused(tmp_path: Path) -> None:
    folder = processed(tmp_path, prompt_length=8)
    assert len(load_split(folder, "train", max_length=9)) == 2
    with pytest.raises(UserError, match="example 100 of .* has a prompt of 8 tokens, which leaves no room"):
        load_split(folder, "train", max_length=8)


def test_data_of_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", MANIFEST | {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)})
    check_tokenizer(tmp_path, tokenizer, "the-student")
    with pytest.raises(UserError, match="tokenised with 'mine'.*run tools/process_data.py --tokenizer the-student"):
        check_tokenizer(tmp_path, tiny_tokenizer(590), "the-student")


# Bad input


def line(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != key}).encode()


BAD_LINES = {
    "malformed": (b'{"instruction": "a"', "no valid JSON"),
    "trailing": (line() + b" x", "no valid JSON"),
    "blank": (b"", "a blank line"),
    "white": (b"  \t", "a blank line"),
    "latin-1": ('{"instruction": "café"}'.encode("latin-1"), "no UTF-8"),
    "utf-16": (line().decode().encode("utf-16"), "no UTF-8"),
    "byte order mark behind the start": (b"\xef\xbb\xbf" + line(), "no valid JSON"),
    "list": (b"[1, 2]", "a list; each line wants one JSON object"),
    "string": (b'"text"', "a string; each line wants one JSON object"),
    "null": (b"null", "null; each line wants one JSON object"),
    "number": (b"3", "a number; each line wants one JSON object"),
    "endless number": (b'{"instruction": ' + b"1" * 5000 + b"}", "raw.jsonl:3"),
    "deep": (b'{"a":' * 100_000, "no valid JSON"),
    "no instruction": (without("instruction"), "no field 'instruction'"),
    "no output": (without("output"), "no field 'output'"),
    "empty instruction": (line(instruction=""), "'instruction' is empty"),
    "empty output": (line(output=""), "'output' is empty"),
    "white output": (line(output=" \n\u3000"), "'output' is empty"),
    "number output": (line(output=3), "'output' is a number; it must be a string"),
    "list output": (line(output=["3"]), "'output' is a list; it must be a string"),
    "null input": (line(input=None), "'input' is null; it must be a string"),
    "lone surrogate": (line(output="\ud83d"), "'output' holds a lone surrogate"),
}


@pytest.mark.parametrize(("bad", "complaint"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, bad: bytes, complaint: str) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"\n".join([line(), line(), bad, line()]) + b"\n")
    with pytest.raises(UserError, match=complaint) as caught:
        read_instructions(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_at_the_start_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n" + line(output="4"))
    assert read_instructions(path) == [GOOD, GOOD | {"output": "4"}]
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match="raw.jsonl is empty"):
        read_instructions(path)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n \n", b"\n\t"])
def test_blank_lines_at_the_end_are_passed_over(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(line() + b"\n" + line() + end)
    assert read_instructions(path) == [GOOD, GOOD]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_named_with_what_makes_lines_of_it(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=indent))
    with pytest.raises(UserError, match=r"raw.json:1: a list; each line wants one JSON object: jq -c '.\[\]'"):
        read_instructions(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.jsonl does not exist"):
        read_instructions(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="is no file"):
        read_instructions(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="raw.jsonl is empty"):
        read_instructions(tmp_path / "raw.jsonl")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_good_lines_are_read_whatever_ends_them(tmp_path: Path, end: bytes) -> None:
    records = [
        GOOD,
        GOOD | {"output": "line\u2028separator \x85 \x0c \U0001f600"},
        {"instruction": "a", "output": "b"},
    ]
    path = tmp_path / "raw.jsonl"
    text = (end or b"\n").join(json.dumps(record, ensure_ascii=False).encode() for record in records) + end
    path.write_bytes(text)
    assert read_instructions(path) == records


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = [GOOD, {"instruction": "naïve 北京\u2028\n", "output": "\U0001f600"}]
    write_jsonl(tmp_path / "new" / "a.jsonl", records)
    assert read_jsonl(tmp_path / "new" / "a.jsonl") == records
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]  # no temporary file stays


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"\n", b"[" * 100_000, b"1" * 5000])
def test_a_malformed_json_file_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match="manifest.json"):
        read_json(path)


def test_a_record_without_input_is_a_record() -> None:
    check_record({"instruction": "a", "output": "b"}, "here:1")
    check_record({"instruction": "a", "input": "", "output": "b", "category": 3}, "here:1")


def spoil(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them changed, taken out, doubled or put in."""
    spoilt = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(spoilt) + 1)
        action = rng.randrange(4)
        if action == 0:
            spoilt[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del spoilt[place : place + rng.randrange(1, 9)]
        elif action == 2:
            spoilt[place:place] = spoilt[max(0, place - 12) : place]
        else:
            spoilt[place:place] = rng.choice(
                [b"\n", b"\\u", b"\\ud800", b'"', b"{", b"\xf0\x9f", b"\x00", b"NaN", b"9" * 50]
            )
    return bytes(spoilt)


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_give_records_or_a_user_error(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "raw.jsonl"
    whole = (
        b"\n".join([line(), line(output="naïve 北京"), json.dumps(GOOD | {"input": "\U0001f600"}).encode()]) + b"\n"
    )
    outcomes = set()
    for i in range(400):
        path.write_bytes(rng.randbytes(rng.randrange(60)) if i % 4 == 0 else spoil(whole, rng))
        try:
            records = read_instructions(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
        else:
            for record in records:
                make_prompt(record["instruction"], record.get("input", "")).encode()
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_values_of_response_tokens_are_summed_by_example() -> None:
    batch = collate([7, 8, 9], [[1, 2, 3], [4], [5, 6]], [[5, 6, 0], [9], [1, 2]], max_length=5)
    assert batch.num_labels.tolist() == [3 - 1, 1, 2]
    for laid_out in (batch, batch.packed()):
        sums = laid_out.sum_by_example(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
        assert sums.dtype == torch.float64 and sums.tolist() == [3.0, 4.0, 24.0]
        assert laid_out.response_labels().tolist() == [5, 6, 9, 1, 2]


def test_an_empty_response_leaves_nothing_to_learn() -> None:
    batch = collate([1, 2], [[4, 5], [6]], [[], [7]], max_length=8)
    assert batch.num_labels.tolist() == [0, 1] and batch.labels.tolist() == [[-100], [7]]
