"""The prompt that stands before every response, and its tokens."""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pocl.common.errors import UserError

# Source: Alpaca, as the paper's published tokens show it.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def make_prompt(instruction: str, input_text: str = "") -> str:
    """The prompt that stands before every response."""
    # replace, not format: an instruction may hold braces.
    template = PROMPT_WITH_INPUT if input_text else PROMPT_WITHOUT_INPUT
    head, _, tail = template.partition("{instruction}")
    return head + instruction + tail.replace("{input}", input_text)


class Tokens(NamedTuple):
    """An example as tokens, and what became of its texts."""

    prompt: list[int]
    response: list[int]  # with the end-of-text token
    apart: bool  # encoded together, a token would have stood across the border
    exact: bool  # prompt and response decode to the texts


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, response tokens with the end-of-text token), as ``tokenise_exactly`` finds them."""
    return tokenise_exactly(tokenizer, prompt, response)[:2]


def tokenise_exactly(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Tokens:
    """The prompt's tokens are those that it has alone, as when it is asked; the response's go on from there.

    Prompt and response are encoded together, as the published tokens are, and cut behind the prompt. Where a token
    would stand across the border, the response is encoded apart, so that both together still say the same text.
    """
    prompt_ids, together = encode_text(tokenizer, prompt), encode_text(tokenizer, prompt + response)
    said, response_ids = decode_all(tokenizer, together), together[len(prompt_ids) :]
    apart = together[: len(prompt_ids)] != prompt_ids
    if apart:
        ways = [encode_text(tokenizer, response), *_behind_an_anchor(tokenizer, response)]
        fitting = (ids for ids in ways if decode_all(tokenizer, prompt_ids + ids) == said)
        response_ids = next(fitting, ways[0])
    exact = said == prompt + response and (not apart or decode_all(tokenizer, prompt_ids + response_ids) == said)
    return Tokens(prompt_ids, [*response_ids, tokenizer.eos_token_id], apart, exact)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, in which the name of a special token is text like any other.

    Raises UserError if the tokenizer makes a special token of it nevertheless.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    # The unknown token says that there is no token for a character; GPT-2's is its end-of-text, and never comes.
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    found = next((token for token in ids if token in special), None)
    if found is not None:
        name = tokenizer.convert_ids_to_tokens(found)
        raise UserError(f"a text holds {name!r}, which the tokenizer cannot write but as its special token; change it")
    return ids


def special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the special tokens are called."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def _behind_an_anchor(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """The tokens of a text that does not begin: some tokenizers put a space before what they are given."""
    for anchor in ("\n", ":", "."):
        before, both = encode_text(tokenizer, anchor), encode_text(tokenizer, anchor + text)
        if both[: len(before)] == before:
            yield both[len(before) :]


def decode_all(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, special ones by their names."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
