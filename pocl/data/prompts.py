"""The prompt that stands before every response, and its tokens."""

from transformers import PreTrainedTokenizerBase

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


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, response tokens with the end-of-text token).

    Prompt and response are encoded together, as the published tokens are, and cut behind the prompt's own length.
    """
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    full_ids = tokenizer.encode(prompt + response, add_special_tokens=False) + [tokenizer.eos_token_id]
    return full_ids[: len(prompt_ids)], full_ids[len(prompt_ids) :]
