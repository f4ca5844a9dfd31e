"""Instruction data of any form -> a processed Arrow dataset: tokens by a template, two splits, contamination.

    python tools/process_data.py --raw data/dolly/raw.jsonl --tokenizer checkpoints/gpt2 \\
        --output-dir processed_data/gpt2/dolly

--raw is JSON, CSV or Parquet (.gz of them, or a folder), or hub:owner/name; columns are found by name, or --columns.
The first --num-dev records are the dev split, the others the training split. Their order is kept, and memory does not
grow with their number.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import pyarrow as pa

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say, show_table
from pocl.common.errors import UserError
from pocl.common.files import ROOT, value_sha256, write_json
from pocl.data.dataset import FORMAT_VERSION, read_manifest
from pocl.data.encoding import Encoder
from pocl.data.processing import CHANGES, SCHEMA, TURNS_SCHEMA, Chunk, encode_stream, numbered, with_ends
from pocl.data.prompts import encode_text
from pocl.data.records import read_records
from pocl.data.sources import HUB, Source, open_source
from pocl.data.templates import Template, choose_template, saved_template
from pocl.evaluation.sets import known_sets, load_set
from pocl.models.identity import tokenizer_fingerprint
from pocl.models.loading import load_tokenizer
from tools import fetch, fetch_summaries
from tools.folders import check_place, written_whole

_SAID_EVERY = 100_000  # records
_SHOWN = 60  # tokens of a text that is shown


@dataclass(frozen=True)
class ProcessOptions:
    """What is processed, and how."""

    _argument_group_name: ClassVar[str] = "processing"
    raw: str = flag(
        "JSON (lines or an array), CSV or Parquet, a .gz of them, a folder of one kind, or hub:owner/name[:config]"
        "[@revision]"
    )
    tokenizer: str = flag("tokenizer folder or hub name: the student's")
    output_dir: str = flag("processed folder to write")
    columns: list[str] | None = flag(
        "which column is what, such as instruction=question output=answer, prompt=text output=label or "
        "messages=dialogue [default: found by their names]",
        None,
    )
    split: str = flag("split of a data set of the hub, or of a folder that datasets saved", "train")
    template: str | None = flag(
        "form of the prompts: alpaca, chat (the tokenizer's chat template), plain, or a Jinja file [default: the "
        "tokenizer's own; alpaca if it has none]",
        None,
    )
    system: str | None = flag("system prompt of records that have none [default: none]", None)
    thinking: bool = flag("give the template enable_thinking, for answers that hold thoughts", False)
    turns: Literal["all", "last", "first"] = flag("which answers of a conversation become examples", "all")
    num_dev: int = flag("first records that become the dev split [records]", 1000, at_least=0)
    max_prompt_length: int = flag(
        "drop examples with a longer prompt; a conversation loses its oldest turns first [tokens]", 256, above=0
    )
    num_workers: int | None = flag("processes that tokenise [processes; default: one a core]", None, above=0)
    data_root: str = flag("folder of the evaluation sets that the contamination report compares with", "data")


def main() -> None:
    """Read, tokenise, split, write, report."""
    quiet_libraries()
    (what,) = parse([ProcessOptions], "Process an instruction set for training.")
    output_dir = Path(what.output_dir)
    if not what.raw.startswith(HUB) and not Path(what.raw).exists():
        raise UserError(f"{what.raw} does not exist; {how_to_bring(Path(what.raw))}")
    check_place(output_dir, "processed data", "manifest.json")
    tokenizer = load_tokenizer(what.tokenizer)
    source = open_source(what.raw, what.split)
    records = read_records(source, what.columns)
    first = next(records)
    template = template_of(what, tokenizer, conversations="messages" in first)
    encoder = Encoder(tokenizer, template, turns=what.turns, max_prompt_length=what.max_prompt_length)
    say(f"the template is {template}; an answer ends with {encoder.end}")
    prompts, workers = Prompts(Path(what.data_root), encoder), what.num_workers or os.cpu_count() or 1
    with written_whole(output_dir) as temporary:
        made = Splits(temporary, what.num_dev, with_turns="messages" in first, prompts=prompts)
        made.write(encode_stream(chain([first], records), encoder, num_workers=workers))
        check_something_is_left(what, made)
        template = with_ends(template, tokenizer, made.ends)
        manifest = make_manifest(what, source, tokenizer, template, made)
        contamination = prompts.report()
        write_json(temporary / "contamination.json", contamination)
        write_json(temporary / "manifest.json", manifest)
        caches = output_dir / "teacher-cache"
        if caches.is_dir() and read_manifest(output_dir)["fingerprint"] == manifest["fingerprint"]:
            caches.rename(temporary / caches.name)  # they are of the same texts, and may be in use
    show_example(tokenizer, made.example)
    summarise(made, manifest, contamination, output_dir)


def template_of(what: ProcessOptions, tokenizer: Any, *, conversations: bool) -> Template:
    """The template that is asked for, or that the tokenizer's folder was trained with, or has."""
    trained = saved_template(what.tokenizer)
    asked = what.template is not None or what.system is not None or what.thinking
    if trained and not asked:
        return trained
    template = choose_template(
        tokenizer, what.template, system=what.system, thinking=what.thinking, conversations=conversations
    )
    if trained and trained != template:
        raise UserError(
            f"--template is {template}, but {what.tokenizer} was trained with {trained}; leave --template, --system "
            f"and --thinking out, or give another --tokenizer"
        )
    if template.jinja is None and tokenizer.chat_template:
        say(f"{what.tokenizer} has a chat template, which is not used: prompts are in the form {template.name}")
    plain = encode_text(tokenizer, "a")
    around = tokenizer.convert_ids_to_tokens([token for token in tokenizer.encode("a") if token not in plain])
    if around and template.jinja is None:
        say(f"{what.tokenizer} puts {' and '.join(around)} around a text, which is left out: prompts have none")
    return template


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


class Prompts:
    """Which prompts stand in two places: examples are looked at as they pass, and only what coincides is kept."""

    def __init__(self, data_root: Path, encoder: Encoder) -> None:
        sets = {name: load_set(data_root, name, encoder=encoder) for name in known_sets(data_root)}
        self.places = {
            name: ids_by_prompt((one.id, one.prompt) for one in examples) for name, examples in sets.items()
        }
        self.splits: dict[str, dict[str, list[int]]] = {"dev": {}, "train": {}}
        self._wanted = {prompt for prompts in self.places.values() for prompt in prompts}

    def look(self, split: str, examples: pa.RecordBatch) -> None:
        """Take note of the prompts of a split that may stand elsewhere; all of dev comes before train."""
        for example_id, prompt in zip(examples["id"].to_pylist(), examples["prompt"].to_pylist(), strict=True):
            if split == "dev" or prompt in self._wanted or prompt in self.splits["dev"]:
                self.splits[split].setdefault(prompt, []).append(example_id)

    def report(self) -> dict[str, Any]:
        """{"dev in train": [{"prompt", "dev": ids, "train": ids}, ...], ...}; nothing is dropped.

        Evaluation sets are compared with both splits.
        """
        places = self.splits | self.places
        pairs = [("dev", "train"), *((name, split) for name in self.places for split in ("train", "dev"))]
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


class Splits:
    """The two splits as they are written, and what is counted meanwhile."""

    def __init__(self, folder: Path, num_dev: int, *, with_turns: bool, prompts: Prompts) -> None:
        self.folder, self.num_dev, self.with_turns, self.prompts = folder, num_dev, with_turns, prompts
        self.num_records = self.num_examples = 0
        self.changed: Counter[str] = Counter()
        self.ends: set[int] = set()
        self.example: dict[str, Any] | None = None  # the first
        self.lengths: dict[str, list[np.ndarray]] = {"dev": [], "train": []}  # [2, N] of prompts and responses

    def __len__(self) -> int:
        return sum(self.count(split) for split in self.lengths)

    def count(self, split: str) -> int:
        """How many examples a split has."""
        return sum(lengths.shape[1] for lengths in self.lengths[split])

    def write(self, chunks: Iterable[Chunk]) -> None:
        """Write the examples of the first ``num_dev`` records to dev/, the others to train/."""
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(arrow_file(self.folder / name, self.with_turns)) for name in self.lengths
            }
            for batch, records in numbered(self.counted(chunks)):
                border = int(np.searchsorted(records, self.num_dev))
                for split, part in (("dev", batch[:border]), ("train", batch[border:])):
                    files[split].write_batch(part)
                    self.prompts.look(split, part)
                    names = ("num_prompt_tokens", "num_response_tokens")
                    self.lengths[split].append(np.stack([part[name].to_numpy() for name in names]))
                if self.example is None and len(batch):
                    self.example = batch[:1].to_pylist()[0]

    def counted(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same chunks, counted as they pass."""
        for chunk in chunks:
            before, self.num_records = self.num_records, self.num_records + chunk.num_records
            self.num_examples += chunk.num_examples
            self.changed += chunk.changed
            self.ends |= chunk.ends
            if before // _SAID_EVERY < self.num_records // _SAID_EVERY:
                say(f"{self.num_records:,} records")
            yield chunk


@contextmanager
def arrow_file(folder: Path, with_turns: bool) -> Iterator[pa.RecordBatchStreamWriter]:
    """A folder as ``datasets`` saves one, whose only file is written as its batches come."""
    schema = TURNS_SCHEMA if with_turns else SCHEMA
    empty = datasets.Dataset(pa.Table.from_batches([], schema=schema), fingerprint=os.urandom(8).hex())
    empty.save_to_disk(str(folder), num_shards=1)
    (path,) = folder.glob("*.arrow")
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        described = reader.schema  # with what datasets says of the columns
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, described) as writer:
        yield writer


def check_something_is_left(what: ProcessOptions, made: Splits) -> None:
    """Raise UserError if nothing is left to train on."""
    if made.num_records <= what.num_dev:
        raise UserError(
            f"{what.raw} has {made.num_records} records, --num-dev takes {what.num_dev}: none is left to train on; "
            f"lower --num-dev"
        )
    if not made.count("train"):
        raise UserError(f"no record of {what.raw} has a prompt of at most {what.max_prompt_length} tokens")


def make_manifest(
    what: ProcessOptions, source: Source, tokenizer: Any, template: Template, made: Splits
) -> dict[str, Any]:
    """What manifest.json says: how the folder was made, what it holds, and its fingerprint."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "raw": what.raw,
        "raw_sha256": source.sha256(),
        "tokenizer": what.tokenizer,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompt_templates_sha256": template.sha256,
        "num_dev": what.num_dev,
        "max_prompt_length": what.max_prompt_length,
        "examples": {name: made.count(name) for name in made.lengths},
        "dropped_long_prompts": made.num_examples - len(made),
    }
    # The same texts and tokens, wherever they came from, are the same data; those that an earlier version of this
    # tool made of the same texts are, where no text needed anything.
    named = ("raw", "tokenizer")
    done: dict[str, Any] = {name: count for name, count in made.changed.items() if count and name != "not_reproduced"}
    asked = {"columns": what.columns, "turns": None if what.turns == "all" else what.turns}
    done |= {name: value for name, value in asked.items() if value}
    made_of = {k: v for k, v in manifest.items() if k not in named} | done
    texts = {name: made.changed[name] for name in CHANGES if made.changed[name] or name != "cut_turns"}
    manifest |= {"template": asdict(template), "columns": what.columns, "turns": what.turns, "texts": texts}
    return manifest | {"fingerprint": value_sha256(made_of)}


def show_example(tokenizer: Any, example: Mapping[str, Any] | None) -> None:
    """Show an example as text and as tokens; what is trained stands between brackets."""
    if example is None:
        return
    prompt, response = example["prompt_ids"], example["response_ids"]
    before, behind = "… " * (len(prompt) > _SHOWN), " …" * (len(response) > _SHOWN)
    prompt, response = prompt[-_SHOWN:], response[:_SHOWN]

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def tokens(ids: list[int]) -> str:
        return " ".join(map(str, tokenizer.convert_ids_to_tokens(ids)))

    say(f"the first example; what is trained stands in ⟦⟧:\n{before}{text(prompt)}⟦{text(response)}{behind}⟧")
    say(f"its tokens: {before}{tokens(prompt)} ⟦ {tokens(response)}{behind} ⟧")


def summarise(made: Splits, manifest: Mapping[str, Any], contamination: Any, output_dir: Path) -> None:
    """Print what was made, what was dropped, what coincides."""
    rows = []
    for name, parts in made.lengths.items():
        for what, lengths in zip(("prompt", "response"), np.concatenate(parts, axis=1), strict=True):
            mean, longest = (lengths.mean(), lengths.max()) if len(lengths) else (0.0, 0)
            rows.append([f"{name}: {what} tokens", len(lengths), f"{mean:.1f}", longest])
    show_table(str(output_dir), ["split", "examples", "mean", "longest"], rows)
    limit = manifest["max_prompt_length"]
    say(f"dropped {manifest['dropped_long_prompts']} record(s) with a prompt of more than {limit} tokens")
    for name, done in CHANGES.items():
        if manifest["texts"].get(name):
            say(f"{manifest['texts'][name]} record(s) {done}")
    for pair, found in contamination.items():
        say(f"contamination: {len(found)} distinct prompt(s) of {pair}")
    say(f"(nothing was dropped for it; {output_dir / 'contamination.json'} names them)")


if __name__ == "__main__":
    run_main(main)
