"""Records to tokens by a template: one example an answer, with the texts before it as its prompt."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from pocl.common.errors import UserError
from pocl.data.prompts import Tokens, decode_all, encode_text, special_names, tokenise_exactly
from pocl.data.templates import Template, said

Turns = Literal["all", "last", "first"]
Messages = Sequence[Mapping[str, Any]]
# Put into the name of a special token that stands in a text, so that a rendered conversation tells it from its own.
_MARK = "\ufdd0"  # no character, in Unicode's own words
_SHOWN = 60  # characters of texts in messages


class Encoded(NamedTuple):
    """One example."""

    turn: int  # which answer of the record, from 1
    prompt: str
    response: str
    tokens: Tokens
    special_names: bool  # whether a text holds the name of a special token
    cut: bool  # whether the oldest turns were left out


class Encoder:
    """A tokenizer and a template: records to examples, and to prompts that are answered."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        turns: Turns = "all",
        max_prompt_length: int | None = None,
    ) -> None:
        self.tokenizer, self.template, self.turns = tokenizer, template, turns
        self.max_prompt_length = max_prompt_length
        self._names = special_names(tokenizer)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self._names))})")
        self._known: dict[str, bool] = {}

    @cached_property
    def end(self) -> str:
        """The token with which this template ends an answer."""
        if self.template.jinja is None:
            return str(self.tokenizer.eos_token)
        text, ids, messages, _ = self._asked([{"role": "user", "content": "a"}], None, 0)
        answer = self._answer(messages, {"role": "assistant", "content": "b"}, None, (text, ids))
        return str(self.tokenizer.convert_ids_to_tokens(answer.tokens.response[-1]))

    def examples(self, record: Mapping[str, Any]) -> list[Encoded]:
        """The examples of a record: one for each answer that ``turns`` asks for.

        Raises UserError, with the record's place, for a conversation without an answer, an empty one, and one that the
        template cannot say.
        """
        try:
            if self.template.jinja is None:
                return [self._of_text(turn, one) for turn, one in self._single_turns(record)]
            return list(self._of_conversation(record))
        except UserError as error:
            raise UserError(f"{record.get('place', 'a record')}: {error}") from error

    def prompt(self, record: Mapping[str, Any]) -> tuple[str, list[int]]:
        """The prompt that is answered: of a conversation, all before its last answer.  -> text, tokens"""
        try:
            if self.template.jinja is None:
                text = self.template.text_prompt(self._single_turns(record)[-1][1])
                return text, encode_text(self.tokenizer, text)
            messages = self._conversation(record)
            last = _answers(messages)[-1:] or [len(messages)]
            before = messages[: last[0]] if "messages" in record else messages[:-1]
            text, ids, _, _ = self._asked(before, record.get("tools"), 0)
            return self._plain(text), ids
        except UserError as error:
            raise UserError(f"{record.get('place', 'a record')}: {error}") from error

    def references(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The right answers to ``prompt``, in the form in which answers are decoded."""
        if "messages" in record:
            return (self.examples(record)[-1].response,)
        return (record["output"],) if isinstance(record["output"], str) else tuple(record["output"])

    def reference_ids(self, record: Mapping[str, Any]) -> list[int]:
        """The tokens of the first right answer to ``prompt``, as it would be learnt: with the one that ends it."""
        one = record if "messages" in record else {**record, "output": self.references(record)[0]}
        return self.examples(one)[-1].tokens.response

    # Without a Jinja text: one instruction, one answer.

    def _single_turns(self, record: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
        if "messages" not in record:
            return [(1, record)]
        messages = record["messages"]
        system = [message["content"] for message in messages[:1] if message["role"] == "system"]
        rest = messages[len(system) :]
        if [message["role"] for message in rest[:2]] != ["user", "assistant"] or (
            len(rest) > 2 and self.turns != "first"
        ):
            roles = " ".join(message["role"] for message in messages)
            raise UserError(
                f"the template {self.template.name} says one instruction and its answer, and this is a conversation "
                f"({roles}); give `template` chat or a Jinja file, or `turns` first"
            )
        _check_answer(rest[1], 1)
        text = {"instruction": rest[0]["content"], "input": "", "output": rest[1]["content"]}
        return [(1, text | ({"system": system[0]} if system else {}))]

    def _of_text(self, turn: int, record: Mapping[str, Any]) -> Encoded:
        prompt, response = self.template.text_prompt(record), record["output"]
        tokens = tokenise_exactly(self.tokenizer, prompt, response)
        return Encoded(turn, prompt, response, tokens, self._holds_name(prompt + response), False)

    def _holds_name(self, text: str) -> bool:
        return bool(self._pattern.search(text))

    # With one: conversations.

    def _conversation(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages, with the system prompt and marked names of special tokens; their roles are known."""
        messages = record.get("messages")
        if messages is None:
            answer = record["output"] if isinstance(record["output"], str) else record["output"][0]
            messages = [{"role": "user", "content": said(record)}, {"role": "assistant", "content": answer}]
        system = record.get("system") or self.template.system
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        for role in {message["role"] for message in messages} - self._known.keys():
            self._known[role] = self.template.knows(self.tokenizer, role)
        unknown = next((message["role"] for message in messages if not self._known[message["role"]]), None)
        if unknown:
            raise UserError(
                f"the template {self.template.name} does not know the role {unknown!r} and would leave out its texts; "
                f"rename it or drop it, or give another `template`"
            )
        return [self._marked(dict(message)) for message in messages]

    def _of_conversation(self, record: Mapping[str, Any]) -> Iterator[Encoded]:
        messages, tools, start = self._conversation(record), record.get("tools"), 0
        answers = _answers(messages)
        if not answers:
            raise UserError("the conversation has no turn of the assistant, so there is nothing to learn; drop it")
        chosen = {"all": answers, "last": answers[-1:], "first": answers[:1]}[self.turns]
        for turn, place in enumerate(answers, start=1):
            if place in chosen:
                _check_answer(messages[place], turn)
                text, ids, kept, start = self._asked(messages[:place], tools, start)
                yield self._answer(kept, messages[place], tools, (text, ids))._replace(turn=turn, cut=start > 0)

    def _asked(
        self, messages: Messages, tools: Sequence[Any] | None, start: int
    ) -> tuple[str, list[int], Messages, int]:
        """The prompt of a conversation without as many of its oldest turns as the limit asks for.

        ``start`` is where an earlier answer of the conversation began to read.  -> text, tokens, messages, start
        """
        while True:
            system = [message for message in messages[:1] if message["role"] == "system" and start]
            kept = [*system, *messages[start:]]
            text = self.template.render(self.tokenizer, kept, tools, asks=True)
            ids = self._encode(text)
            users = [i for i in range(start, len(messages)) if messages[i]["role"] == "user"]
            if self.max_prompt_length is None or len(ids) <= self.max_prompt_length or len(users) < 2:
                return text, ids, kept, start
            start = users[1]

    def _answer(
        self,
        before: Messages,
        answer: Mapping[str, Any],
        tools: Sequence[Any] | None,
        asked: tuple[str, list[int]],
    ) -> Encoded:
        """The example of one answer behind these messages, whose prompt is ``asked``: text and tokens."""
        prompt, prompt_ids = asked
        whole = self.template.render(self.tokenizer, [*before, answer], tools, asks=False)
        if not whole.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            at = max(0, at - _SHOWN // 3)
            raise UserError(
                f"the template {self.template.name} writes the texts before an answer otherwise once it is there: "
                f"{prompt[at : at + _SHOWN]!r} when it asks, {whole[at : at + _SHOWN]!r} with the answer; a model "
                f"could not be asked as it is trained: "
                + ("drop `thinking`" if self.template.thinking else "give `thinking`")
                + ", take the thoughts out of the answers, or give another `template`"
            )
        text, end = self._without_end(whole[len(prompt) :])
        together = self._encode(prompt + text + end)
        response_ids, apart = together[len(prompt_ids) :], together[: len(prompt_ids)] != prompt_ids
        if apart:
            response_ids = self._encode(text + end)
        if not end:
            response_ids = [*response_ids, self.tokenizer.eos_token_id]
        wanted = self._plain(text) + (end or str(self.tokenizer.eos_token))
        exact = "".join(decode_all(self.tokenizer, response_ids).split()) == "".join(wanted.split())
        shown = self._plain(self._pattern.sub("", text)).strip()
        tokens = Tokens(prompt_ids, response_ids, apart, exact)
        return Encoded(1, self._plain(prompt), shown, tokens, _MARK in whole, False)

    def _without_end(self, response: str) -> tuple[str, str]:
        """What the template writes for an answer, and the token behind it that ends the turn: empty where none does.

        What it writes behind the end is left out: a model has stopped there.
        """
        names = list(self._pattern.finditer(response))
        if not names or response[names[-1].end() :].strip():
            return response, ""
        return response[: names[-1].start()], names[-1].group()

    def _marked(self, value: Any) -> Any:
        """A part of a message in which no text holds the name of a special token as it stands."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][0] + _MARK + found[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._marked(part) for key, part in value.items()}
        return [self._marked(part) for part in value] if isinstance(value, list) else value

    def _plain(self, text: str) -> str:
        return text.replace(_MARK, "")

    def _encode(self, text: str) -> list[int]:
        """The tokens of a rendered conversation: its own names of special tokens are such tokens, others are text."""
        if _MARK not in text:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
            return ids
        ids = []
        for piece in self._pattern.split(text):
            if piece in self._names:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += encode_text(self.tokenizer, self._plain(piece))
        return ids


def _answers(messages: Messages) -> list[int]:
    """Where the assistant speaks."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _check_answer(message: Mapping[str, Any], turn: int) -> None:
    if not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content"):
        raise UserError(f"turn {turn} of the assistant is empty; drop it, or the record")
