"""Rows to records of one form, whatever their columns are called: instructions, prompts or conversations.

A record has its ``place``, its ``category`` and either ``instruction``, ``input`` and ``output``, or ``prompt`` and
``output``, or ``messages`` and perhaps ``tools``; and ``system`` where the source says one. In an evaluation set
``output`` is a list of references.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pocl.common.console import say
from pocl.common.errors import UserError, closest
from pocl.common.files import json_kind
from pocl.data.sources import Row, Source, check_record, check_text, open_source

Record = dict[str, Any]
Columns = dict[str, str]  # field of a record -> column of the source

# What people call their columns. A source that can be read in two of these ways is refused.
READINGS: tuple[Columns, ...] = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "input": "context", "output": "response"},  # Dolly's own
    {"prompt": "prompt", "output": "completion"},
    {"instruction": "question", "output": "answer"},
    {"messages": "messages"},  # OpenAI's
    {"messages": "conversations"},  # ShareGPT's
)
# An evaluation set may say the whole prompt, which is taken as it stands.
EVALUATION_SET = {name: name for name in ("instruction", "input", "prompt", "output", "system", "category", "id")}
FIELDS = ("instruction", "input", "output", "prompt", "messages", "tools", "system", "category", "id")
_OPTIONAL = ("input", "tools", "system", "category", "id")

# ShareGPT's names of those who speak; any other is taken as it is.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_SPEAKERS |= {"observation": "tool", "function_response": "tool", "function_call": "assistant"}
_PARTS_OF_MESSAGE = ("tool_calls", "reasoning_content", "name", "tool_call_id")


def load_records(
    source: Any, columns: Mapping[str, str] | Sequence[str] | None = None, *, split: str = "train"
) -> list[Record]:
    """All records of a source (``open_source``), with columns found by their names or given (``choose_columns``)."""
    return list(read_records(open_source(source, split), columns))


def read_records(
    source: Source, columns: Mapping[str, str] | Sequence[str] | None = None, *, evaluation: bool = False
) -> Iterator[Record]:
    """The records of a source one by one, checked; says which columns are read where that is not as in Alpaca.

    Raises UserError for columns that cannot be told apart or are missing, and with its place for a bad record.
    """
    chosen: Columns | None = None
    for place, row in source.rows():
        if chosen is None:
            chosen = choose_columns(row, columns, source.name, evaluation=evaluation)
            if any(field != column for field, column in chosen.items()):
                say(f"{source.name}: " + ", ".join(f"{field} is {column!r}" for field, column in chosen.items()))
        if evaluation and source.has_cells:
            row = _with_lists(row, chosen.get("output"))
        yield _record(row, chosen, place, evaluation)
    if chosen is None:
        raise UserError(f"{source.name} holds no record")


def choose_columns(
    row: Row, given: Mapping[str, str] | Sequence[str] | None, name: str, *, evaluation: bool = False
) -> Columns:
    """Which column of a source is which field of a record, by the ``columns`` given or by their names in ``row``.

    ``given`` is a mapping or a list like ``["instruction=question", "output=answer"]``.  Raises UserError for a field
    that there is not, a column that is not there, one that is named twice, and two possible readings.
    """
    there = ", ".join(row)
    if given:
        return _given(row, given, f"{name} has the columns {there}")
    if evaluation and "output" in row and ("prompt" in row or "instruction" in row):
        return EVALUATION_SET
    found = [way for way in READINGS if all(way[field] in row for field in way if field not in _OPTIONAL)]
    if not found and "instruction" in row:
        found = [READINGS[0]]  # of which something is missing, as is said of the record
    if not found:
        wanted = "; ".join(" and ".join(way.values()) for way in READINGS)
        raise UserError(
            f"{name}: its columns ({there}) are none of: {wanted}; name them: `columns` instruction=COLUMN "
            f"output=COLUMN, or messages=COLUMN"
        )
    both = {"input", "context"} <= row.keys() and "instruction" in found[0]
    if len(found) > 1 or both:
        ways = " or ".join(" and ".join(way[field] for field in way if field not in _OPTIONAL) for way in found)
        ways = "input or context" if len(found) == 1 else ways
        raise UserError(f"{name} can be read in two ways, by {ways}; say which: `columns` instruction=… output=…")
    chosen = dict(found[0])
    if "input" in chosen and "context" in row:
        chosen["input"] = "context"
    return chosen | {field: field for field in ("tools", "system", "category", "id") if field in row}


def _given(row: Row, given: Mapping[str, str] | Sequence[str], what: str) -> Columns:
    pairs = list(given.items()) if isinstance(given, Mapping) else [_pair(one) for one in given]
    fields, columns = [field for field, _ in pairs], [column for _, column in pairs]
    for field, column in pairs:
        if field not in FIELDS:
            raise UserError(f"`columns`: no field {field!r}{closest(field, FIELDS)} (fields: {', '.join(FIELDS)})")
        if fields.count(field) > 1 or columns.count(column) > 1:
            twice = f"{field} is named" if fields.count(field) > 1 else f"column {column!r} is read"
            raise UserError(f"`columns`: {twice} twice; name each field and each column once")
        if column not in row and field not in _OPTIONAL:
            raise UserError(f"`columns`: no column {column!r}{closest(column, row)}; {what}")
    chosen = dict(pairs)
    whole = "messages" in chosen or ("output" in chosen and ("instruction" in chosen) != ("prompt" in chosen))
    if not whole or ("messages" in chosen and "output" in chosen):
        raise UserError(f"`columns` wants instruction and output, prompt and output, or messages alone; {what}")
    return chosen | {field: field for field in ("category", "id") if field in row and field not in chosen}


def _pair(text: str) -> tuple[str, str]:
    field, mark, column = text.partition("=")
    if not mark or not field or not column:
        raise UserError(f"`columns` holds {text!r}; each wants to be FIELD=COLUMN, such as instruction=question")
    return field, column


def _record(row: Row, columns: Columns, place: str, evaluation: bool) -> Record:
    record: Record = {field: row[column] for field, column in columns.items() if column in row}
    record["category"] = _label(record.get("category", ""))
    if "id" in record:
        record["id"] = _label(record["id"])
    if evaluation and "output" in columns:
        record["output"] = _references(record.get("output"), f"{place}: {columns['output']!r}")
        _check_prompt(record, columns, place)
    elif "messages" in columns:
        if "messages" not in record:
            raise UserError(f"{place}: no field {columns['messages']!r}, which holds the conversation")
        record["messages"] = _messages(record["messages"], f"{place}: {columns['messages']!r}")
        record["tools"] = _tools(record.get("tools"), place)
    elif "prompt" in columns:
        names = columns | {"instruction": columns["prompt"]}
        check_record({("instruction" if key == "prompt" else key): record[key] for key in record}, place, names)
    else:
        check_record(record, place, columns)
    if "system" in record:
        check_text(record["system"], f"{place}: {columns.get('system', 'system')!r}", empty=True)
    return record | {"place": place}


def _check_prompt(record: Record, columns: Columns, place: str) -> None:
    """Raise UserError unless a record of an evaluation set asks something."""
    if record.get("prompt") is not None:
        check_text(record["prompt"], f"{place}: {columns['prompt']!r}")
        return
    record.pop("prompt", None)
    if not isinstance(record.get("instruction"), str) or not record["instruction"].strip():
        raise UserError(f"{place}: neither 'prompt' nor 'instruction' is a non-empty string")
    for name in ("instruction", "input"):
        check_text(record.get(name, ""), f"{place}: {columns[name]!r}", empty=True)


def _label(value: Any) -> str:
    """A label of any kind; Arrow takes no lone surrogate."""
    return str(value).encode("utf-8", "replace").decode()


def _references(value: Any, what: str) -> list[str]:
    references = [value] if isinstance(value, str) else value
    if not isinstance(references, list) or not references or not all(isinstance(one, str) for one in references):
        raise UserError(f"{what} must be a reference answer or a list of them")
    return [check_text(one, what, empty=True) for one in references]


def _with_lists(row: Row, column: str | None) -> Row:
    """A row of cells in which references that are written as a JSON list are one."""
    found = _parsed(row[column]) if column and column in row else None
    return dict(row) | ({column: found} if column and isinstance(found, list) and found else {})


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _messages(value: Any, what: str) -> list[Record]:
    """A conversation as OpenAI's messages: ``role``, ``content`` and what else templates read.

    A JSON string, as a cell of a table holds it, is parsed; ShareGPT's ``from`` and ``value`` are renamed.
    """
    found = _parsed(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        kind = "a string that is no JSON list" if isinstance(value, str) else json_kind(value)
        kind = "an empty list" if found == [] else kind
        raise UserError(f'{what} is {kind}; it wants a list like [{{"role": "user", "content": "…"}}, …]')
    return [_message(one, f"{what}, message {number}") for number, one in enumerate(found, start=1)]


def _message(value: Any, what: str) -> Record:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is {json_kind(value)}; it wants an object with role and content")
    shared = "from" in value and "role" not in value
    role = value.get("from" if shared else "role")
    if not isinstance(role, str) or not role:
        raise UserError(f"{what} has no role; it wants an object with role and content")
    message: Record = {"role": _SPEAKERS.get(role, role) if shared else role}
    message |= {part: value[part] for part in _PARTS_OF_MESSAGE if value.get(part)}
    content = value.get("value" if shared else "content")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part if isinstance(part, Mapping) and part.get("type") == "text" else {} for part in content]
        texts = [part.get("text") for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{what} has parts that are no text; a language model reads text alone")
        content = "".join(map(str, texts))
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, what) for call in message["tool_calls"]]
        content = content or ""
    return message | {"content": check_text(content, f"{what}: its content", empty=True)}


def _tool_call(call: Any, what: str) -> Record:
    """A call with its arguments as an object, which is how templates read them; OpenAI's are a JSON string."""
    inner = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise UserError(f"{what} has a tool call without a function's name")
    arguments = inner.get("arguments", {})
    parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
    return dict(call) | {"function": dict(inner) | {"arguments": arguments if parsed is None else parsed}}


def _tools(value: Any, place: str) -> list[Any] | None:
    tools = _parsed(value) if isinstance(value, str) else value
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place}: 'tools' is {json_kind(value)}; it wants a list of functions' descriptions")
    return tools or None
