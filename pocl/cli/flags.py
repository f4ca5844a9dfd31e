"""From frozen dataclasses to command-line flags: one field, one flag, one help line with its unit."""

import argparse
import dataclasses
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn

from transformers import HfArgumentParser

from pocl.common.errors import UserError, closest


def flag(help_text: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that becomes one command-line flag; without a default it is required."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, and defaults only where there is one to say."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        spelling = action.option_strings[-1]  # the hyphened one
        if action.nargs in (0, "?"):
            return spelling
        value = "|".join(map(str, action.choices)) if action.choices else action.dest.split("_")[-1].upper()
        return f"{spelling} {value}" + (" ..." if action.nargs in ("+", "*") else "")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.required else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """HfArgumentParser whose complaints are UserErrors of one line, with one spelling of each flag."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # the --no-x of a switch that is on
                # Its own default would be shown as the switch's; that of the switch itself is the one that counts.
                action.help, action.default = f"turns --{action.dest.replace('_', '-')} off", argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        for action in self._actions:
            if len(action.option_strings) > 1:
                message = message.replace("/".join(action.option_strings), action.option_strings[-1])
        raise UserError(re.sub(r"\s+", " ", message))


def parse(dataclass_types: Sequence[type], description: str, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse flags into one object per dataclass.

    No abbreviations; of a flag given twice the last wins; an unknown flag raises UserError with the closest one.
    """
    parser = _Parser(
        list(dataclass_types),
        description=description,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    # The launchers' own flag, in case somebody starts an older one.
    argv = [argument for argument in argv if not re.fullmatch(r"--local[_-]rank=\d+", argument)]
    *objects, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flags = [action.option_strings[-1] for action in parser._actions if action.option_strings]
        raise UserError(f"unknown argument {unknown[0]!r}{closest(unknown[0], flags)} (--help lists them all)")
    return tuple(objects)
