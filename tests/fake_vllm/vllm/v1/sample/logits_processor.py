"""The part of vLLM's logits processors that the project uses."""

from collections.abc import Callable
from typing import Any, NamedTuple


class BatchUpdate(NamedTuple):
    """How the rows of the batch changed."""

    removed: list[int]
    added: list[tuple[int, Any, list[int], list[int]]]
    moved: list[tuple[int, int, None]]


class LogitsProcessor:
    """The base class."""


def process_dict_updates(states: dict[int, Any], update: BatchUpdate | None, new_state: Callable[..., Any]) -> None:
    """Keep one state a row: new ones, ones that go, ones that move."""
    if update is None:
        return
    for row, *rest in update.added:
        states[row] = new_state(*rest)
    for row in update.removed:
        states.pop(row, None)
    for old, new, _ in update.moved:
        states[new] = states.pop(old)
