"""From frozen dataclasses to command-line flags: one field, one flag, one help line with its unit, its bounds."""

import argparse
import copy
import dataclasses
import math
import operator
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import HfArgumentParser

from pocl.cli.config_file import as_yaml, flags_from, names_of
from pocl.common.console import CONSOLE
from pocl.common.errors import UserError, closest

_HOLDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def flag(
    help_text: str,
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    known: Collection[str] = (),
) -> Any:
    """A dataclass field that becomes one command-line flag; without a default it is required.

    ``parse`` refuses a number outside the bounds or not finite, and a name that is none of the ``known``; of a flag
    with several values each is looked at.
    """
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    bounds = {name: limit for name, limit in limits.items() if limit is not None}
    metadata = {"help": help_text, "bounds": bounds, "known": known}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def defaults(options: type) -> dict[str, Any]:
    """The default of each option of a class that has one."""
    found = {}
    for option in dataclasses.fields(options):
        if option.default_factory is not dataclasses.MISSING:
            found[option.name] = option.default_factory()
        elif option.default is not dataclasses.MISSING:
            found[option.name] = option.default
    return found


def _check(options: Any) -> None:
    """Raise UserError for the first value that is not what its flag takes, and for what the options' ``check`` finds.

    ``check()`` is a method that an options class may have, for what concerns its own options together.
    """
    for option in dataclasses.fields(options):
        value, name = getattr(options, option.name), f"--{option.name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float):
                _check_number(one, option.metadata["bounds"], f"{name} {'holds' if isinstance(value, list) else 'is'}")
            elif one is not None and option.metadata["known"] and one not in option.metadata["known"]:
                names = option.metadata["known"]
                raise UserError(f"unknown {name} {one!r}{closest(one, names)} (known: {', '.join(names)})")
    if hasattr(options, "check"):
        options.check()


def _check_number(number: float, bounds: dict[str, float], what: str) -> None:
    if math.isfinite(number) and all(_HOLDS[name](number, limit) for name, limit in bounds.items()):
        return
    wanted = [f"{name.replace('_', ' ')} {limit}" for name, limit in bounds.items()]
    if isinstance(number, float) and not bounds.keys() & {"below", "at_most"}:
        wanted.append("finite")
    raise UserError(f"{what} {number}; it must be {' and '.join(wanted)}")


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

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        plain = copy.copy(field)  # what a field says beside its help line is not argparse's
        plain.metadata = MappingProxyType({"help": field.metadata["help"]})
        HfArgumentParser._parse_dataclass_field(parser, plain)
        if field.type == bool | None:  # a switch that need not be said, and without a value is on
            parser._actions[-1].nargs, parser._actions[-1].const = "?", True

    def error(self, message: str) -> NoReturn:
        for action in self._actions:
            if len(action.option_strings) > 1:
                message = message.replace("/".join(action.option_strings), action.option_strings[-1])
        raise UserError(re.sub(r"\s+", " ", message))


def parse(
    dataclass_types: Sequence[type] | Mapping[str, type],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    recipes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """Parse flags into one object per dataclass, and check each by itself (``flag``).

    No abbreviations; of a flag given twice the last wins; an unknown flag raises UserError with the closest one.
    --config FILE stands for the flags that the file gives, before all others; --print-config prints such a file and
    ends the program. ``dataclass_types`` may name the groups that such a file has. Where there are ``recipes``,
    --recipe NAME stands for the flags of one, before all others and those of files.
    """
    groups = names_of(dataclass_types)
    parser = _Parser(
        list(groups.values()),
        description=description,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    _add_config_flags(parser)
    if recipes:
        _add_recipe_flag(parser, recipes)
    argv = list(sys.argv[1:] if argv is None else argv)
    # The launchers' own flag, in case somebody starts an older one.
    argv = [argument for argument in argv if not re.fullmatch(r"--local[_-]rank=\d+", argument)]
    of_files = _Parser([], add_help=False, allow_abbrev=False)
    _add_config_flags(of_files)
    asked, argv = of_files.parse_known_args(argv)
    for path in reversed(getattr(asked, "config", [])):
        argv = [*flags_from(Path(path), groups, recipes), *argv]
    argv = _with_recipe(argv, recipes) if recipes else argv
    *objects, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flags = [action.option_strings[-1] for action in parser._actions if action.option_strings]
        raise UserError(f"unknown argument {unknown[0]!r}{closest(unknown[0], flags)} (--help lists them all)")
    for options in objects:
        _check(options)
    if hasattr(asked, "print_config"):
        if os.environ.get("RANK", "0") == "0":
            CONSOLE.print(as_yaml(dict(zip(groups, objects, strict=True))), markup=False, end="")
        sys.exit(0)
    return tuple(objects)


def _with_recipe(argv: Sequence[str], recipes: Mapping[str, Sequence[str]]) -> list[str]:
    """The flags of the recipe that is named last, before the others.  Raises UserError for an unknown name."""
    of_recipe = _Parser([], add_help=False, allow_abbrev=False)
    _add_recipe_flag(of_recipe, recipes)
    asked, others = of_recipe.parse_known_args(argv)
    name = getattr(asked, "recipe", None)
    if name is None:
        return others
    if name not in recipes:
        raise UserError(f"unknown --recipe {name!r}{closest(name, recipes)} (known: {', '.join(recipes)})")
    return [*recipes[name], *others]


def _add_recipe_flag(parser: argparse.ArgumentParser, recipes: Mapping[str, Sequence[str]]) -> None:
    of_each = "; ".join(f"{name}: {' '.join(flags)}" for name, flags in recipes.items())
    parser.add_argument_group("recipe").add_argument(
        "--recipe", default=argparse.SUPPRESS, help=f"a set of options under all others, files' too. {of_each}"
    )


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        action="append",
        default=argparse.SUPPRESS,
        help="file of options, YAML or a run's config.json; flags of the command line win over it",
    )
    group.add_argument(
        "--print-config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the options as such a file, and stop",
    )
