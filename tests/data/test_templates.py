"""A conversation is rendered and trained as its model's template has it, or refused with a line that says why."""

import json
from pathlib import Path
from typing import Any

import pytest

import pocl
from pocl.common.errors import UserError
from pocl.data.templates import ALPACA, Template, saved_template
from tests.chat import chat_tokenizer
from tests.tiny import END_OF_TEXT, tiny_tokenizer


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


TWO_TURNS = [says("user", "Hi"), says("assistant", "Hello!"), says("user", "And you?"), says("assistant", "Fine.")]
SYSTEM = [says("system", "Be brief."), *TWO_TURNS]


def marked(kind: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """Each example's text by its tokens, with what is trained in brackets."""
    tokenizer = chat_tokenizer(kind)
    source = {"messages": messages} | ({"tools": options.pop("tools")} if "tools" in options else {})
    split = pocl.encode(pocl.load_records([source]), tokenizer, **options)
    rows = [split.table[i] for i in range(len(split))]
    return [f"{tokenizer.decode(row['prompt_ids'])}[{tokenizer.decode(row['response_ids'])}]" for row in rows]


RENDERED = {
    "smollm2": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[Hello!<|im_end|>]",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n[Fine.<|im_end|>]",
    ],
    "qwen3": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[Hello!<|im_end|>]",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "[Fine.<|im_end|>]",
    ],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "[Hello!<|eot_id|>]",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello!<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[Fine.<|eot_id|>]",
    ],
    "gemma3": [
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n[Hello!<end_of_turn>]",
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nAnd you?<end_of_turn>\n<start_of_turn>model\n[Fine.<end_of_turn>]",
    ],
}


@pytest.mark.parametrize("kind", RENDERED)
def test_each_answer_of_a_conversation_is_an_example_behind_what_the_template_asks_with(kind: str) -> None:
    assert marked(kind, SYSTEM) == RENDERED[kind]
    assert marked(kind, TWO_TURNS, template=with_system(kind)) == RENDERED[kind]
    assert marked(kind, SYSTEM, turns="last") == RENDERED[kind][1:]
    assert marked(kind, SYSTEM, turns="first") == RENDERED[kind][:1]


def with_system(kind: str) -> Template:
    return Template("chat", chat_tokenizer(kind).chat_template, system="Be brief.")


@pytest.mark.parametrize("kind", RENDERED)
def test_prompt_and_response_are_the_tokens_of_the_whole_conversation(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    row = pocl.encode(pocl.load_records([{"messages": TWO_TURNS}]), tokenizer, turns="last").table[0]
    found = row["prompt_ids"] + row["response_ids"]
    whole = tokenizer.apply_chat_template(TWO_TURNS, enable_thinking=False, return_dict=False)
    # Qwen's writes empty thoughts before the last answer whether or not they are asked for.
    assert found == whole[: len(found)]
    assert tokenizer.decode(whole[len(found) :]).strip() == ""  # the line break behind the end is never written


def test_a_template_that_refuses_a_system_prompt_is_heard() -> None:
    assert marked("gemma2", TWO_TURNS) == marked("gemma3", TWO_TURNS)
    with pytest.raises(UserError, match="record 1: the template chat refuses .*System role not supported"):
        marked("gemma2", SYSTEM)


THOUGHT = [says("user", "2+2?"), says("assistant", "<think>\nTwo and two.\n</think>\n\n4")]
MORE = [*THOUGHT, says("user", "3+3?"), says("assistant", "<think>\nThree.\n</think>\n\n6")]


def test_thoughts_are_trained_where_they_are_asked_for_and_left_out_of_later_prompts() -> None:
    thinking = Template("chat", chat_tokenizer("qwen3").chat_template, thinking=True)
    first, second = marked("qwen3", MORE, template=thinking)
    assert first == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[<think>\nTwo and two.\n</think>\n\n4<|im_end|>]"
    )
    assert second == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\nThree.\n</think>\n\n6<|im_end|>]"
    )


def test_thoughts_that_are_not_asked_for_are_refused_with_both_texts() -> None:
    with pytest.raises(UserError) as caught:
        marked("qwen3", THOUGHT)
    for words in (
        "record 1: ",
        "writes the texts before an answer otherwise",
        r"<think>\n\n</think>",
        r"<think>\nTwo",
    ):
        assert words in str(caught.value)
    assert "give `thinking`" in str(caught.value) and "\n" not in str(caught.value)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


def test_a_tool_call_is_a_target_and_a_tools_text_is_none() -> None:
    messages = [says("user", "2?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    messages += [says("tool", "two"), says("assistant", "It is 2.")]
    call, answer = marked("qwen3", messages, tools=TOOLS)
    assert call.startswith("<|im_start|>system\n# Tools\n[{") and call.endswith(
        '[<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>]'
    )
    assert answer.endswith(
        "<|im_start|>user\n<tool_response>\ntwo\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[It is 2.<|im_end|>]"
    )


@pytest.mark.parametrize("kind", ["smollm2", "gemma3"])
def test_the_name_of_a_special_token_in_a_conversation_is_text(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>" if kind == "smollm2" else "<end_of_turn>")
    name = tokenizer.convert_ids_to_tokens(end)
    messages = [says("user", f"What is {name}?"), says("assistant", f"It{name} is{name}a mark.")]
    (example,) = marked(kind, messages)
    (plain,) = marked(kind, [says("user", "What is ?"), says("assistant", "It isa mark.")])
    assert example.replace(name, "") == plain.replace(name, "")
    row = pocl.encode(pocl.load_records([{"messages": messages}]), tokenizer).table[0]
    assert row["response_ids"].count(end) == 1 and row["response_ids"][-1] == end
    assert row["response"] == f"It{name} is{name}a mark." and row["prompt"].count(name) == (
        3 if kind == "smollm2" else 2
    )


def test_an_answer_that_begins_with_a_line_break_has_the_prompt_that_is_asked() -> None:
    (example,) = marked("smollm2", [says("user", "Hi"), says("assistant", "\n\n  Hello")])
    assert example.endswith("<|im_start|>assistant\n[\n\n  Hello<|im_end|>]")


def test_the_oldest_turns_are_left_out_whole_where_a_conversation_is_too_long() -> None:
    tokenizer = chat_tokenizer("smollm2")
    long = [says("system", "Be brief.")]
    for i in range(6):
        long += [says("user", f"Question {i} {'x ' * 20}"), says("assistant", f"Answer {i}")]
    whole = pocl.encode(pocl.load_records([{"messages": long}]), tokenizer, max_prompt_length=10_000).table
    limit = whole[2]["num_prompt_tokens"]  # three questions
    cut = pocl.encode(pocl.load_records([{"messages": long}]), tokenizer, max_prompt_length=limit).table
    assert len(cut) == 6 and max(cut["num_prompt_tokens"]) <= limit
    assert [row["prompt"] for row in cut][:3] == [row["prompt"] for row in whole][:3]
    for i in (3, 4, 5):
        questions = [line.split()[1] for line in cut[i]["prompt"].split("\n") if line.startswith("Question")]
        assert questions == [str(number) for number in range(i - 2, i + 1)]
        assert cut[i]["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion")
    assert cut["turn"][:] == [1, 2, 3, 4, 5, 6] and cut["record"][:] == [0] * 6


def test_ids_count_answers_and_records_keep_their_own() -> None:
    rows = [
        {"id": "a", "category": "x", "messages": TWO_TURNS},
        {"id": "b", "category": "y", "messages": TWO_TURNS[:2]},
    ]
    split = pocl.encode(pocl.load_records(rows), chat_tokenizer("llama3"))
    names = ("id", "record_id", "turn", "category", "record")
    assert [tuple(row[name] for name in names) for row in split.table] == [
        (0, "a", 1, "x", 0),
        (1, "a", 2, "x", 0),
        (2, "b", 1, "y", 1),
    ]
    assert split.template.ends == ("<|eot_id|>",)


def test_text_templates_say_one_instruction_and_end_with_the_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    for template, prompt in (("plain", "Add.\n\n1 2\n\n"), (None, pocl.encode(pocl.load_records(rows), tokenizer))):
        found = pocl.encode(pocl.load_records(rows), tokenizer, template=template).table[0]
        assert found["prompt"] == (prompt if isinstance(prompt, str) else prompt.table[0]["prompt"])
        assert tokenizer.decode(found["response_ids"]) == f"3{END_OF_TEXT}"
    (one,) = pocl.encode(pocl.load_records([{"messages": TWO_TURNS[:2]}]), tokenizer, template="plain").table
    assert (one["prompt"], one["response"]) == ("Hi\n\n", "Hello!")
    with pytest.raises(UserError, match="`turns` first"):
        pocl.encode(pocl.load_records([{"messages": TWO_TURNS}]), tokenizer, template="alpaca")
    with pytest.raises(UserError, match="alpaca has no place for a system prompt"):
        pocl.encode(pocl.load_records(rows), tokenizer, template=Template(system="Be brief."))


BAD = {
    "a role that the template does not know": ("qwen3", [says("critic", "Bad."), *TWO_TURNS], "the role 'critic'"),
    "two users in a row": (
        "gemma3",
        [TWO_TURNS[0], *TWO_TURNS[2:]],
        r"\(user user\): Conversation roles must alternate",
    ),
    "no answer": ("qwen3", TWO_TURNS[:1], "no turn of the assistant"),
    "an empty answer": ("llama3", [TWO_TURNS[0], says("assistant", " \n")], "turn 1 of the assistant is empty"),
    "parts": ("llama3", [says("user", [{"type": "image"}])], "message 1 has parts that are no text"),
    "no role": ("llama3", [{"content": "Hi"}], "message 1 has no role"),
    "no text": ("llama3", [says("user", 3)], "message 1: its content is a number"),
    "a message that is none": ("llama3", ["Hi"], "message 1 is a string"),
    "a string": ("llama3", "Hi there", "is a string that is no JSON list"),
    "nothing": ("llama3", [], "is an empty list"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_conversation_is_refused_in_one_line(what: str) -> None:
    kind, messages, complaint = BAD[what]
    with pytest.raises(UserError, match=complaint) as caught:
        marked(kind, messages)  # type: ignore[arg-type]
    assert str(caught.value).startswith("record 1: ") and "\n" not in str(caught.value)


def test_messages_may_be_a_json_string_or_parts_of_text() -> None:
    parts = [says("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), *TWO_TURNS[1:]]
    for messages in (json.dumps(TWO_TURNS), parts):
        assert marked("smollm2", messages) == marked("smollm2", TWO_TURNS)  # type: ignore[arg-type]


def test_a_template_comes_from_a_file_or_is_refused(tmp_path: Path) -> None:
    path, tokenizer, records = tmp_path / "mine.jinja", tiny_tokenizer(), [{"messages": TWO_TURNS[:2]}]
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    split = pocl.encode(pocl.load_records(records), tokenizer, template=str(path))
    assert split.table[0]["prompt"] == "user: Hi\n"
    assert tokenizer.decode(split.table[0]["response_ids"]) == f"assistant: Hello!\n{END_OF_TEXT}"
    broken = ["{% for %}", "{{ messages.nothing.at.all }}", "{{ raise_exception('never') }}"]
    for text in broken:
        path.write_text(text)
        with pytest.raises(UserError, match="the template mine.jinja refuses this conversation"):
            pocl.encode(pocl.load_records(records), tokenizer, template=str(path))
    for name, complaint in (("alpca", "did you mean 'alpaca'"), ("chat", "the tokenizer has no chat_template")):
        with pytest.raises(UserError, match=complaint):
            pocl.encode(pocl.load_records(records), tokenizer, template=name)
    with pytest.raises(UserError, match="these are conversations, and the tokenizer has no chat template"):
        pocl.encode(pocl.load_records(records), tokenizer)


def test_a_template_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    for template in (ALPACA, Template("chat", "{{ x }}", system="S", thinking=True, ends=("<a>", "<b>"))):
        template.save(tmp_path)
        found = saved_template(tmp_path)
        assert found == template and found.ends == template.ends
    assert saved_template(tmp_path / "nowhere") is None
