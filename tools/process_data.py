"""data/<set>/raw.jsonl -> a processed Arrow dataset: split, tokenise, drop long prompts, report contamination.

    python tools/process_data.py --raw data/dolly/raw.jsonl --tokenizer checkpoints/gpt2 \\
        --output-dir processed_data/gpt2/dolly

The first --num-dev records are the dev split, the others the training split. The order of the file is kept.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say, show_table
from pocl.common.errors import UserError
from pocl.common.files import ROOT, file_sha256, value_sha256, write_json
from pocl.data.dataset import FORMAT_VERSION, read_manifest
from pocl.data.prompts import (
    PROMPT_WITH_INPUT,
    PROMPT_WITHOUT_INPUT,
    encode_text,
    make_prompt,
    special_names,
    tokenise_exactly,
)
from pocl.data.sources import read_instructions
from pocl.evaluation.sets import SET_FOLDERS, load_set
from pocl.models.identity import tokenizer_fingerprint
from pocl.models.loading import load_tokenizer
from tools import fetch, fetch_summaries
from tools.folders import check_place, written_whole


@dataclass(frozen=True)
class ProcessOptions:
    """What is processed, and how."""

    _argument_group_name: ClassVar[str] = "processing"
    raw: str = flag("JSONL with instruction, input and output")
    tokenizer: str = flag("tokenizer folder or hub name: the student's")
    output_dir: str = flag("processed folder to write")
    num_dev: int = flag("first records of the file that become the dev split [records]", 1000, at_least=0)
    max_prompt_length: int = flag("drop records with a longer prompt [tokens]", 256, above=0)
    num_workers: int | None = flag("processes that tokenise [processes; default: one a core]", None, above=0)
    data_root: str = flag("folder of the evaluation sets that the contamination report compares with", "data")


# What may be done to the texts of a record, as manifest.json counts it and as it is said.
CHANGES = {
    "special_names": "hold the name of a special token, which stays text",
    "encoded_apart": "have a response whose first letters would have been one token with the end of the prompt: it is "
    "encoded apart, behind the prompt's own tokens",
    "not_reproduced": "have texts that their tokens do not say in full: the tokenizer leaves out or replaces letters",
}


def main() -> None:
    """Read, tokenise, split, write, report."""
    quiet_libraries()
    (what,) = parse([ProcessOptions], "Process an instruction set for training.")
    raw, output_dir = Path(what.raw), Path(what.output_dir)
    if not raw.exists():
        raise UserError(f"{raw} does not exist; {how_to_bring(raw)}")
    check_place(output_dir, "processed data", "manifest.json")
    records = read_instructions(raw)
    if len(records) <= what.num_dev:
        raise UserError(
            f"{raw} has {len(records)} records, --num-dev takes {what.num_dev}: none is left to train on; "
            f"lower --num-dev"
        )
    tokenizer = load_tokenizer(what.tokenizer)
    if getattr(tokenizer, "chat_template", None):
        say(f"{what.tokenizer} has a chat template, which is not used: prompts are in the paper's form, Alpaca's")
    plain = encode_text(tokenizer, "a")
    around = tokenizer.convert_ids_to_tokens([token for token in tokenizer.encode("a") if token not in plain])
    if around:
        say(f"{what.tokenizer} puts {' and '.join(around)} around a text, which is left out: prompts have none")
    table, changed = tokenised(records, tokenizer, what.num_workers or os.cpu_count() or 1)
    fits = [i for i, length in enumerate(table["num_prompt_tokens"]) if length <= what.max_prompt_length]
    splits = {
        "dev": table.select([i for i in fits if i < what.num_dev]),
        "train": table.select([i for i in fits if i >= what.num_dev]),
    }
    if not len(splits["train"]):
        raise UserError(f"no record of {raw} has a prompt of at most {what.max_prompt_length} tokens")
    contamination = contamination_report(splits, Path(what.data_root))
    manifest = make_manifest(what, tokenizer, splits, num_dropped=len(table) - len(fits), changed=changed)
    write_folder(output_dir, splits, manifest, contamination)
    summarise(splits, manifest, contamination, output_dir)


def how_to_bring(raw: Path) -> str:
    """What brings a raw.jsonl that is not there."""
    name, root = raw.parent.name, raw.parent.parent
    commands = {
        key: f"fetch.py data --sets {key}" for key, files in fetch.SETS.items() for file in files if "raw" in file.path
    }
    commands |= {key: f"fetch_summaries.py --set {key}" for key in fetch_summaries.SETS}
    if raw.name != "raw.jsonl" or name not in commands:
        return "data/README.md says what a line of it holds"
    where = "" if root.resolve() == ROOT / "data" else f" --data-root {root}"
    return f"bring it: python tools/{commands[name]}{where}"


def tokenised(
    records: Sequence[Mapping[str, Any]], tokenizer: Any, num_workers: int
) -> tuple[datasets.Dataset, dict[str, int]]:
    """All records in order: id, prompt and response as text and as tokens, and their lengths.

    With it, in how many of them something was done to a text (``CHANGES``).
    """
    names = special_names(tokenizer)

    def tokenise_row(row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            tokens = tokenise_exactly(tokenizer, row["prompt"], row["response"])
        except UserError as error:
            raise UserError(f"record {row['id'] + 1}: {error}") from error
        return {
            "prompt_ids": tokens.prompt,
            "response_ids": tokens.response,
            "num_prompt_tokens": len(tokens.prompt),
            "num_response_tokens": len(tokens.response),
            "special_names": any(name in row["prompt"] or name in row["response"] for name in names),
            "encoded_apart": tokens.apart,
            "not_reproduced": not tokens.exact,
        }

    table = datasets.Dataset.from_dict(
        {
            "id": list(range(len(records))),
            "prompt": [make_prompt(record["instruction"], record.get("input", "")) for record in records],
            "response": [record["output"] for record in records],
            # A label of any kind; Arrow takes no lone surrogate.
            "category": [str(record.get("category", "")).encode("utf-8", "replace").decode() for record in records],
        }
    )
    # Small sets: starting workers takes longer than the work.
    workers = min(num_workers, max(1, len(records) // 1000))
    datasets.enable_progress_bars()  # the one of them that takes a while
    table = table.map(tokenise_row, num_proc=workers if workers > 1 else None, desc="tokenising")
    datasets.disable_progress_bars()
    return table.remove_columns(list(CHANGES)), {name: sum(table[name]) for name in CHANGES}


def make_manifest(
    what: ProcessOptions,
    tokenizer: Any,
    splits: Mapping[str, datasets.Dataset],
    *,
    num_dropped: int,
    changed: Mapping[str, int],
) -> dict[str, Any]:
    """What manifest.json says: how the folder was made, what it holds, and its fingerprint."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "raw": str(Path(what.raw)),
        "raw_sha256": file_sha256(Path(what.raw)),
        "tokenizer": what.tokenizer,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompt_templates_sha256": value_sha256([PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT]),
        "num_dev": what.num_dev,
        "max_prompt_length": what.max_prompt_length,
        "examples": {name: len(split) for name, split in splits.items()},
        "dropped_long_prompts": num_dropped,
    }
    # The same texts and tokens, wherever they came from, are the same data; those that an earlier version of this
    # tool made of the same texts are, where no text needed anything.
    named = ("raw", "tokenizer")
    done = {name: count for name, count in changed.items() if count and name != "not_reproduced"}
    made_of = {k: v for k, v in manifest.items() if k not in named} | done
    return manifest | {"texts": dict(changed), "fingerprint": value_sha256(made_of)}


def contamination_report(splits: Mapping[str, datasets.Dataset], data_root: Path) -> dict[str, Any]:
    """Which prompts stand in two places: {"dev in train": [{"prompt", "dev": ids, "train": ids}, ...], ...}.

    Evaluation sets are compared with both splits. Nothing is dropped.
    """
    places = {name: ids_by_prompt(zip(split["id"], split["prompt"], strict=True)) for name, split in splits.items()}
    for name in [*SET_FOLDERS, *sorted(path.parent.name for path in data_root.glob("*/valid.jsonl"))]:
        if (data_root / SET_FOLDERS.get(name, name) / "valid.jsonl").is_file():
            examples = load_set(data_root, name)
            places[name] = ids_by_prompt((example.id, example.prompt) for example in examples)
    pairs = [("dev", "train"), *((name, split) for name in places if name not in splits for split in ("train", "dev"))]
    return {
        f"{name} in {other}": [
            {"prompt": prompt, name: ids, other: places[other][prompt]}
            for prompt, ids in places[name].items()
            if prompt in places[other]
        ]
        for name, other in pairs
    }


def ids_by_prompt(examples: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """The example ids of each distinct prompt."""
    ids: dict[str, list[int]] = {}
    for example_id, prompt in examples:
        ids.setdefault(prompt, []).append(example_id)
    return ids


def write_folder(
    output_dir: Path, splits: Mapping[str, datasets.Dataset], manifest: Mapping[str, Any], contamination: Any
) -> None:
    """Write the processed folder whole or not at all; teachers' caches of the same texts stay in it."""
    check_place(output_dir, "processed data", "manifest.json")
    with written_whole(output_dir) as temporary:
        for name, split in splits.items():
            # An empty split is written without a file unless one is asked for, and cannot be read then.
            split.flatten_indices().save_to_disk(str(temporary / name), num_shards=None if len(split) else 1)
        write_json(temporary / "contamination.json", contamination)
        write_json(temporary / "manifest.json", manifest)
        caches = output_dir / "teacher-cache"
        if caches.is_dir() and read_manifest(output_dir)["fingerprint"] == manifest["fingerprint"]:
            caches.rename(temporary / caches.name)  # they are of the same texts, and may be in use


def summarise(
    splits: Mapping[str, datasets.Dataset], manifest: Mapping[str, Any], contamination: Any, output_dir: Path
) -> None:
    """Print what was made, what was dropped, what coincides."""
    rows = []
    for name, split in splits.items():
        for column in ("num_prompt_tokens", "num_response_tokens"):
            lengths = list(split[column]) or [0]
            rows.append(
                [
                    f"{name}: {column.split('_')[1]} tokens",
                    len(split),
                    f"{sum(lengths) / len(lengths):.1f}",
                    max(lengths),
                ]
            )
    show_table(str(output_dir), ["split", "examples", "mean", "longest"], rows)
    limit = manifest["max_prompt_length"]
    say(f"dropped {manifest['dropped_long_prompts']} record(s) with a prompt of more than {limit} tokens")
    for name, done in CHANGES.items():
        if manifest["texts"][name]:
            say(f"{manifest['texts'][name]} record(s) {done}")
    for pair, found in contamination.items():
        say(f"contamination: {len(found)} distinct prompt(s) of {pair}")
    say(f"(nothing was dropped for it; {output_dir / 'contamination.json'} names them)")


if __name__ == "__main__":
    run_main(main)
