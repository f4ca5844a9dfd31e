"""How a record becomes the prompt that a model reads: the paper's Alpaca, a tokenizer's chat template, or a file's.

A template is part of what data and student are: it lies as a small file in a student's folder, and another is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pocl.common.errors import UserError, closest, first_line
from pocl.common.files import read_object, value_sha256, write_json
from pocl.data.prompts import PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT, make_prompt

FILE = "prompt_template.json"  # in the folder of a model that was trained with it
NAMES = ("alpaca", "chat", "plain")
_PROBE = "xq7 probe xq7"  # a text that no template holds


@dataclass(frozen=True)
class Template:
    """A prompt's form: by name, or by its Jinja text as in a tokenizer's ``chat_template``."""

    name: str = "alpaca"  # alpaca, plain, chat, or the name of a file
    jinja: str | None = None
    system: str | None = None  # said first in every conversation that has no system prompt of its own
    thinking: bool = False  # what the Jinja text is given as enable_thinking
    ends: tuple[str, ...] = field(default=(), compare=False)  # tokens that ended the responses

    @property
    def sha256(self) -> str:
        """What prompts depend on; of Alpaca alone, what it has always been."""
        if self == ALPACA:
            return value_sha256([PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT])
        return value_sha256([self.jinja or self.name, self.system, self.thinking])

    def __str__(self) -> str:
        details = [f"system {self.system[:40]!r}" if self.system else "", "thinking" if self.thinking else ""]
        details += [f"Jinja {self.sha256[:8]}" if self.jinja else ""]
        return self.name + "".join(f", {detail}" for detail in details if detail)

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends a response."""
        return int(tokenizer.convert_tokens_to_ids(self.ends[0]) if self.ends else tokenizer.eos_token_id)

    def save(self, folder: Path) -> None:
        """Write it into the folder of a model."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def of(value: Mapping[str, Any]) -> "Template":
        """From what a manifest or ``save`` has written."""
        known = {name: value[name] for name in ("name", "jinja", "system", "thinking") if name in value}
        return Template(**known, ends=tuple(value.get("ends", ())))

    def text_prompt(self, record: Mapping[str, Any]) -> str:
        """The prompt of an instruction, without a Jinja text; a ``prompt`` is taken as it stands."""
        system = record.get("system") or self.system
        if system and self.name == "alpaca":
            raise UserError(
                "the template alpaca has no place for a system prompt; give `template` chat or plain, or leave it out"
            )
        if "prompt" in record and (self.name == "alpaca" or "instruction" not in record):
            text = record["prompt"]
        elif self.name == "alpaca":
            text = make_prompt(record["instruction"], record.get("input", ""))
        else:
            text = said(record) + "\n\n"
        return f"{system}\n\n{text}" if system else text

    def render(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        asks: bool,
    ) -> str:
        """A conversation by the Jinja text; ``asks``: up to where the assistant is to answer.

        Raises UserError where the template refuses the conversation.
        """
        try:
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=self.jinja,
                add_generation_prompt=asks,
                tokenize=False,
                enable_thinking=self.thinking,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = " ".join(message["role"] for message in messages)
            raise UserError(
                f"the template {self.name} refuses this conversation ({roles}): {first_line(error)}; change the "
                f"conversation, or give another `template`"
            ) from error
        return text

    def knows(self, tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
        """Whether a message of this role leaves a trace: many templates pass over a role that they do not know."""
        if role in ("user", "assistant"):
            return True
        probe, said_before = {"role": role, "content": _PROBE}, {"role": "user", "content": "a"}
        answered = {"role": "assistant", "content": "b"}
        for messages in ([probe, said_before], [said_before, answered, probe]):
            try:
                if _PROBE in self.render(tokenizer, messages, asks=False):
                    return True
            except UserError:
                return True  # it says itself what it wants, of the conversation that there is
        return False


ALPACA = Template()


def said(record: Mapping[str, Any]) -> str:
    """What the user of an instruction record says in a conversation."""
    if "instruction" not in record:
        return str(record["prompt"])
    return "\n\n".join(filter(None, (record["instruction"], record.get("input", ""))))


def saved_template(folder: str | Path) -> Template | None:
    """The template that a model's folder says it was trained with; None where it says none."""
    path = Path(folder) / FILE
    return Template.of(read_object(path, {"name": (str,)})) if path.is_file() else None


def choose_template(
    tokenizer: PreTrainedTokenizerBase,
    asked: str | None = None,
    *,
    system: str | None = None,
    thinking: bool = False,
    conversations: bool = False,
) -> Template:
    """The template of this name or file; not ``asked``: the tokenizer's own, or alpaca where it has none.

    Raises UserError for an unknown name, a file that cannot be read, and where a template is needed and there is none:
    for ``conversations``, or if chat was asked for.
    """
    own = tokenizer.chat_template is not None
    if asked is None and conversations and not own:
        raise UserError(
            "these are conversations, and the tokenizer has no chat template; give `template` FILE.jinja, such as "
            "the chat_template.jinja of a model of the same family, or `template` plain for single turns"
        )
    name = asked or ("chat" if own else "alpaca")
    if name in ("alpaca", "plain"):
        return Template(name, system=system)
    if name == "chat":
        if not own:
            raise UserError("`template` chat: the tokenizer has no chat_template; give alpaca, plain or a Jinja file")
        try:
            return Template("chat", tokenizer.get_chat_template(), system, thinking)
        except ValueError as error:  # several, and none of them the default
            raise UserError(f"`template` chat: {first_line(error)}; give one of them as a file") from error
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"`template` {name!r} is no file and none of {', '.join(NAMES)}{closest(name, NAMES)}; a file holds a "
            f"Jinja text such as chat_template.jinja"
        )
    try:
        return Template(path.name, path.read_text(encoding="utf-8"), system, thinking)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`template` {name} cannot be read: {first_line(error)}") from error


def check_template(wanted: Template, place: str, model: str, trained: Template | None) -> None:
    """Raise UserError where a model was ``trained`` with another template than ``wanted``, that of ``place``."""
    if trained is not None and trained != wanted:
        raise UserError(
            f"{place} has the template {wanted}, but {model} was trained with {trained}; process the data with that "
            f"one, or give another model (to go on with it all the same, delete its {FILE})"
        )
