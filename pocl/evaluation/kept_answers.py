"""eval/: the answers of a model by set and seed, what they come from, and summary.json.

<set>/<seed>.jsonl holds one record per prompt, <set>/origin.json says what the answers come from.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import read_json, read_jsonl, read_object, write_json
from pocl.common.lock import locked_folder
from pocl.evaluation.answerer import Answerer, EvalProtocol
from pocl.evaluation.answers import Record, score_answers
from pocl.evaluation.metrics import METRICS
from pocl.evaluation.sets import TestSet

ORIGIN = "origin.json"  # of a set: what its answers come from, written before the first of them
GIVEN = "answers.jsonl"  # of a set: the scores of answers that no model of ours gave
_ORIGIN_KINDS = {"model": (str,), "tokenizer": (str,), "set": (str,), "examples": (int,)}
_ORIGIN_KINDS |= {"protocol": (dict,), "asked": (dict,)}


def kept_answers(test_set: TestSet, protocol: EvalProtocol, answerer: Answerer) -> dict[int, list[Record]]:
    """Seed -> the records that earlier evaluations of the same model, set and protocol left, on every rank.

    Those of a model that stood at the same path are removed.  Raises UserError where other options made them.
    """
    name, place, origin = test_set.name, protocol.folder / test_set.name, answerer.origin(test_set, protocol)
    there = read_object(place / ORIGIN, _ORIGIN_KINDS) if (place / ORIGIN).is_file() else {}
    earlier, files, given = distributed.broadcast((there, seed_files(place), (place / GIVEN).is_file()))
    mended = f"give another `output_dir`, or delete {place}"
    if given:
        raise UserError(f"{place} holds scores of `answers`; {mended}")
    if not files:
        return {}
    if not earlier:
        raise UserError(f"{place} holds answers of unknown origin; {mended}")
    changed = _changed_options(earlier, origin)
    if changed:
        raise UserError(f"{place} holds answers of other options ({'; '.join(changed)}); {mended}")
    if earlier["model"] != origin["model"]:
        by = f"an earlier model in {answerer.asked['model']}"
        say(f"{name}: seeds {_words(files)} were answered by {by}; they are removed ({place})")
        if distributed.is_main():
            _remove_answers(protocol.folder, name)
        return {}
    ids = [example.id for example in test_set.examples]
    read = distributed.broadcast({seed: read_jsonl(path) for seed, path in files.items() if path.is_file()})
    kept = {seed: records for seed, records in read.items() if [record.get("id") for record in records] == ids}
    kept = {seed: _with_every_metric(test_set, protocol, records) for seed, records in kept.items()}
    if kept:
        say(f"{name}: seeds {_words(kept)} are there already ({place})")
    return kept


def _with_every_metric(test_set: TestSet, protocol: EvalProtocol, records: list[Record]) -> list[Record]:
    """The records, scored anew where they are from before a metric was there."""
    if all(name in record for record in records for name in METRICS):
        return records
    return score_answers(test_set.examples, [record["answer"] for record in records], protocol.rouge_tokenizer)


def seed_files(place: Path) -> dict[int, Path]:
    """Seed -> the file of its answers."""
    return {int(path.stem): path for path in sorted(place.glob("*.jsonl")) if path.stem.isdecimal()}


def _words(seeds: Collection[int]) -> str:
    return " ".join(map(str, seeds))


def _changed_options(earlier: Mapping[str, Any], origin: Mapping[str, Any]) -> list[str]:
    """What differs between the options that made two sets of answers, as parameters with both values.

    Other weights at the same path are no other option.
    """
    before, now = _options_of(earlier), _options_of(origin)
    if earlier["model"] == origin["model"] or Path(before["model"]).resolve() == Path(now["model"]).resolve():
        before["model"] = now["model"]
    changed = [f"`{name}` was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if earlier["tokenizer"] != origin["tokenizer"]:
        changed.append("another `tokenizer`")
    if earlier["set"] != origin["set"] and earlier["examples"] == origin["examples"]:
        changed.append("other prompts or references in `data_root`")
    return changed


def _options_of(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The options that made answers, by parameter."""
    protocol: dict[str, Any] = dict(origin["protocol"])
    options = {"num_examples": origin["examples"], "dtype": origin["dtype"], "model": origin["asked"]["model"]}
    options |= {"rouge_tokenizer": "rouge", "template": "alpaca"}  # of answers from before there was a choice
    options["max_length"] = protocol.pop("max_new_tokens") + protocol["max_prompt_length"]
    names = {"temperature": "sampling_temperature", "generator": "generation_backend"}
    return options | {names.get(key, key): value for key, value in protocol.items()}


def _remove_answers(folder: Path, name: str) -> None:
    """Remove the answers to a set and its scores; cut off, it leaves nothing that is taken for a result."""
    for path in seed_files(folder / name).values():
        path.unlink()
    with locked_folder(folder):
        write_json(folder / "summary.json", {key: value for key, value in read_summary(folder).items() if key != name})


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a folder: the scores of each set; empty where there is none."""
    path = folder / "summary.json"
    return dict(read_json(path)) if path.is_file() else {}


def write_summary(folder: Path, name: str, scores: Mapping[str, Any]) -> None:
    """Put one set's scores into summary.json, beside those of other sets, which others may be writing now."""
    with locked_folder(folder):
        write_json(folder / "summary.json", read_summary(folder) | {name: scores})


def kept_cross_entropy(test_set: TestSet, protocol: EvalProtocol, answerer: Answerer) -> float | None:
    """The cross-entropy that summary.json has of this model, set and protocol, on every rank; None without one."""
    scores = read_summary(protocol.folder).get(test_set.name, {})
    origin = {key: value for key, value in answerer.origin(test_set, protocol).items() if key != "asked"}
    same = origin == {key: scores.get(key) for key in origin}
    kept: float | None = distributed.broadcast(scores.get("cross_entropy") if same else None)
    return kept


def note_cross_entropy(folder: Path, name: str, value: float) -> None:
    """Put a set's cross-entropy beside its scores in summary.json, on rank 0."""
    if not distributed.is_main():
        return
    with locked_folder(folder):
        summary = read_summary(folder)
        write_json(folder / "summary.json", summary | {name: summary[name] | {"cross_entropy": value}})


def say_what_is_older(folder: Path, names: Collection[str], model: str) -> None:
    """Name the other sets of a folder that another model answered, which a table would put side by side.

    ``model`` is the fingerprint of the one that answers ``names``.
    """
    others = read_summary(folder).items()
    older = [name for name, scores in others if name not in names and scores.get("model", model) != model]
    if older:
        say(f"{folder}: {' '.join(older)} were answered by another model; evaluate them again, too")
