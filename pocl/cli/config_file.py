"""Options from a file, under those of the command line (``--config``), and the file that says them again."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pocl.common.errors import UserError, closest, first_line

_NOTHING = ("", "~", "null")  # how YAML writes no value


def flags_from(path: Path, groups: Mapping[str, type], recipes: Collection[str] = ()) -> list[str]:
    """The flags that a file of options stands for; they go before those of the command line, which then win.

    The file is YAML or JSON: options by their names, alone or under the name of their group, or the config.json of a
    run; where there are ``recipes``, a ``recipe``, too.  Raises UserError for a file that is none of these, and for a
    name that no option has.
    """
    lists: list[str] = []
    others: list[str] = []
    given: set[str] = set()
    values = _read(path)
    if recipes and isinstance(values.get("recipe"), str):
        others.append(f"--recipe={values.pop('recipe')}")
    for option, value in _options(path, values, groups):
        if option.name in given:
            raise UserError(f"{path} gives {option.name!r} twice")
        given.add(option.name)
        flag = f"--{option.name.replace('_', '-')}"
        if isinstance(value, list) and "list[" in str(option.type) and value:
            lists += [flag, *map(_word, value)]
        elif isinstance(value, list | dict):
            raise UserError(f"{path}: {option.name!r} is {value!r}; it must be {_wanted(option)}")
        elif value not in _NOTHING and value is not None:
            others.append(f"{flag}={_word(value)}")
    return [*lists, *others]  # a list would take a word that follows it


def as_yaml(groups: Mapping[str, Any]) -> str:
    """The options of each group as a file for ``--config``; those without a value are left out."""
    values = {
        group: {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
        for group, options in groups.items()
    }
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        # BaseLoader leaves every value the text that it is: 1e-4 and off are what a flag would take them for.
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read `config` {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        what = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"`config` {path}{line} is neither YAML nor JSON: {what}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"`config` {path} holds no options; write one a line, such as lr: 1e-4")
    if isinstance(values.get("options"), dict) and "fingerprints" in values:
        return values["options"]  # a run's config.json
    return values


def _options(
    path: Path, values: Mapping[str, Any], groups: Mapping[str, type]
) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Each option of the file, and what it says."""
    owners = {option.name: group for group, kind in groups.items() for option in dataclasses.fields(kind)}
    options = {option.name: option for kind in groups.values() for option in dataclasses.fields(kind)}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in groups and isinstance(value, dict):
            for inner, one in value.items():
                option = str(inner).replace("-", "_")
                if option not in options:
                    raise UserError(f"{path}: unknown option {f'{key}.{inner}'!r}{closest(option, options)}")
                if owners[option] != name:
                    raise UserError(f"{path}: {inner!r} stands under {key!r}; it belongs under {owners[option]!r}")
                yield options[option], one
        elif name in options:
            yield options[name], value
        else:
            known = [*options, *groups] if isinstance(value, dict) else options
            raise UserError(f"{path}: unknown option {key!r}{closest(name, known)}")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wanted(option: dataclasses.Field[Any]) -> str:
    return "one value or a list of them" if "list[" in str(option.type) else "one value"


def names_of(dataclass_types: Sequence[type] | Mapping[str, type]) -> dict[str, type]:
    """The groups by name: as they are given, or by the heading that --help has for them."""
    if isinstance(dataclass_types, Mapping):
        return dict(dataclass_types)
    headings = [getattr(kind, "_argument_group_name", kind.__name__) for kind in dataclass_types]
    return dict(zip((heading.replace("-", "_") for heading in headings), dataclass_types, strict=True))
