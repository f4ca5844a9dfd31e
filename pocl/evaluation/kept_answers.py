"""eval/: the answers of a model by set and seed, what they come from, and summary.json.

<set>/<seed>.jsonl holds one record per prompt, <set>/origin.json says what the answers come from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocl.common.files import read_json, write_json
from pocl.common.lock import locked_folder

ORIGIN = "origin.json"  # of a set: what its answers come from, written before the first of them
GIVEN = "answers.jsonl"  # of a set: the scores of --answers


def what_is_there(folder: Path, name: str) -> tuple[dict[str, Any], dict[int, Path], bool]:
    """(whose answers to a set a folder holds, seed -> file, whether they were given with --answers).

    Files that an earlier version left beside a summary that does not name them are nobody's.
    """
    place, summary = folder / name, read_summary(folder).get(name, {})
    files = seed_files(place)
    if (place / ORIGIN).is_file():
        return read_json(place / ORIGIN), files, False
    if summary:
        files = {seed: path for seed, path in files.items() if str(seed) in summary["rouge_l"]["seeds"]}
    return summary, files, (place / GIVEN).is_file() and "protocol" not in summary


def seed_files(place: Path) -> dict[int, Path]:
    """Seed -> the file of its answers."""
    return {int(path.stem): path for path in sorted(place.glob("*.jsonl")) if path.stem.isdecimal()}


def changed_options(earlier: Mapping[str, Any], origin: Mapping[str, Any]) -> list[str]:
    """What differs between the options that made two sets of answers, beside the model, as flags with both values."""
    before, now = flags_of(earlier), flags_of(origin)
    changed = [
        f"{flag} was {before.get(flag)}, is {value}" for flag, value in now.items() if before.get(flag) != value
    ]
    if earlier.get("tokenizer") != origin["tokenizer"]:
        changed.append("another --tokenizer")
    if earlier.get("set") != origin["set"] and earlier.get("examples") == origin["examples"]:
        changed.append("other prompts or references in --data-root")
    return changed


def flags_of(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that made answers, with their values, from what summary.json says of them."""
    protocol = dict(origin.get("protocol", {}))
    flags = {"--num-examples": origin.get("examples"), "--dtype": origin.get("dtype")}
    flags["--max-length"] = protocol.pop("max_new_tokens", 0) + protocol.get("max_prompt_length", 0)
    names = {"temperature": "sampling_temperature", "generator": "generation_backend"}
    return flags | {f"--{names.get(key, key).replace('_', '-')}": value for key, value in protocol.items()}


def remove_answers(folder: Path, name: str) -> None:
    """Remove the answers to a set and its scores; cut off, it leaves nothing that is taken for a result."""
    for path in seed_files(folder / name).values():
        path.unlink()
    with locked_folder(folder):
        write_json(folder / "summary.json", {key: value for key, value in read_summary(folder).items() if key != name})


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a folder: the scores of each set; empty where there is none."""
    path = folder / "summary.json"
    return read_json(path) if path.is_file() else {}


def write_summary(output_dir: Path, name: str, scores: Mapping[str, Any]) -> None:
    """Put one set's scores into summary.json, beside those of other sets, which others may be writing now."""
    with locked_folder(output_dir):
        write_json(output_dir / "summary.json", read_summary(output_dir) | {name: scores})
