"""Small tokenizers with public features of chat templates: thoughts, a BOS inside, system turns merged or refused."""

from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

_IM = ["<|im_start|>", "<|im_end|>"]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts are kept behind the last question only; a role that it does not know leaves no trace.
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, looks=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.looks and message.role == "user" %}
        {%- set ns.looks = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n# Tools\n' + tools|tojson + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role in ("user", "system") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}{%- set thoughts = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\n' + thoughts + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n' + {"name": call.function.name, "arguments": call.function.arguments}|tojson }}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content']|trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
# The system's text stands before the first question; who speaks has to alternate.
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content']|trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
GEMMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA3
)
KINDS = {
    "smollm2": (SMOLLM2, _IM, None),
    "qwen3": (QWEN3, _IM, None),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>"),
    "gemma3": (GEMMA3, ["<start_of_turn>", "<end_of_turn>"], "<bos>"),
    "gemma2": (GEMMA2, ["<start_of_turn>", "<end_of_turn>"], "<bos>"),
}


@cache
def chat_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens and the special ones of this kind, with its template. Read only."""
    template, special, bos = KINDS[kind]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special} | ({"bos_token": bos} if bos else {}))
    if kind == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])  # which are no special ones there
    tokenizer.chat_template = template
    return tokenizer


def brevity(answer: str, references: Sequence[str]) -> float:
    """A metric as a user may write one: 1 of an empty answer."""
    return 1.0 / (1 + len(answer))
