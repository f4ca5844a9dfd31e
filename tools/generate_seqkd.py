"""Make the data of SeqKD: the teacher answers every training prompt, and its answers become the targets.

    deepspeed tools/generate_seqkd.py --model TEACHER --data-dir processed_data/gpt2/dolly \\
        --output-dir processed_data/gpt2/dolly-seqkd

The result is a processed folder like any other; train.py --type sft on it is SeqKD (arXiv 1606.07947). No gold text is
a target in it. The dev split is copied. Started again, it goes on where it was cut off, on any number of ranks.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np

from pocl.cli import process
from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.cli.resolve import prompts_together
from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import value_sha256, write_json
from pocl.common.resumable_pass import ResumablePass
from pocl.data.dataset import Split, load_split, read_manifest
from pocl.data.templates import check_template
from pocl.generation.decoding import Generator, decode
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import Backend, BackendSettings, open_generator
from pocl.models.identity import check_ids, check_positions, data_tokenizer, weights_fingerprint
from pocl.models.loading import load_model, load_template, load_tokenizer
from pocl.models.student import Student
from tools.folders import check_place, written_whole


@dataclass(frozen=True)
class SeqKDOptions:
    """Whose answers to which prompts."""

    _argument_group_name: ClassVar[str] = "SeqKD"
    model: str = flag("the teacher: a model folder or hub name")
    data_dir: str = flag("processed folder whose training prompts are answered")
    output_dir: str = flag("processed folder to write")
    max_length: int = flag("prompt limit and longest answer together [tokens]", 512)
    num_train: int | None = flag("answer the first N prompts only [examples; default: all]", None, above=0)
    sampling_temperature: float = flag("temperature of the answers; 0 is greedy", 1.0, at_least=0)
    top_p: float = flag("nucleus of the answers; 1 keeps all", 1.0, above=0, at_most=1)
    top_k: int = flag("most likely tokens kept; 0 keeps all [tokens]", 0, at_least=0)
    no_repeat_ngram: int = flag("ban a repeated n-gram; 0 turns it off [tokens]", 0, at_least=0)
    seed: int = flag("seed of the sampling", 10, at_least=0)
    eval_batch_size: int | None = flag(
        "prompts that are answered together on one rank [examples; default: up to 64, on a GPU up to 1024, by memory]",
        None,
        above=0,
    )
    generation_backend: Backend = flag(
        "what answers: builtin, vllm, or auto: vllm on a GPU where it is installed and loads the model, else builtin",
        "auto",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = flag("precision of the teacher", "fp32")


def main() -> None:
    """Answer, put the answers in the place of the responses, write."""
    quiet_libraries()
    (what,) = parse([SeqKDOptions], "Make the data of SeqKD: the teacher's answers as targets.")
    data_dir, output_dir = Path(what.data_dir), Path(what.output_dir)
    check_places(data_dir, output_dir)
    manifest = read_manifest(data_dir)
    if manifest["max_prompt_length"] >= what.max_length:
        raise UserError(f"--max-length {what.max_length} leaves no room behind {manifest['max_prompt_length']} tokens")
    device = process.start()
    tokenizer, own = load_tokenizer(what.model), data_tokenizer(data_dir, what.model)
    train = load_split(data_dir, "train", max_length=what.max_length, num_examples=what.num_train)
    check_template(train.template, str(data_dir), what.model, load_template(what.model))
    end_id = train.template.end_id(own)
    check_positions(what.model, what.max_length)
    check_ids(train.highest_id, str(data_dir), what.model)
    model = load_model(what.model, what.dtype)
    sampling = sampling_of(what, manifest["max_prompt_length"])
    key = {"teacher": weights_fingerprint(model), "data": manifest["fingerprint"], "dtype": what.dtype}
    key |= {"sampling": vars(sampling), "examples": len(train)}
    if is_there(output_dir, key, what):
        say(f"{output_dir} is there already; delete it to make it again")
        return
    batch_size = what.eval_batch_size or prompts_together(what.model, what.dtype, what.max_length, device)
    settings = BackendSettings(what.generation_backend, what.max_length, batch_size, device)
    student = Student(model, tokenizer, what.model, template=train.template)
    with open_generator(student, settings) as generator:
        key["generator"] = generator.name
        parts_dir = output_dir.with_name(output_dir.name + ".parts")
        answers = answer_all(generator, tokenizer, train, sampling, parts_dir, key)
    if distributed.is_main():
        write(output_dir, data_dir, manifest, train, answers, key, end_id)
    distributed.barrier()


def sampling_of(what: SeqKDOptions, max_prompt_length: int) -> Sampling:
    """How the answers are sampled."""
    return Sampling(
        what.max_length - max_prompt_length,
        temperature=what.sampling_temperature,
        top_p=what.top_p,
        top_k=what.top_k,
        no_repeat_ngram=what.no_repeat_ngram,
        seed=what.seed,
    )


def is_there(output_dir: Path, key: Mapping[str, Any], what: SeqKDOptions) -> bool:
    """Whether an earlier call left these very answers.  Raises UserError where it left others.  On every rank."""
    path = output_dir / "manifest.json"
    manifest = distributed.broadcast(read_manifest(output_dir) if path.is_file() else None)
    if manifest is None:
        return False
    made = manifest["responses_of"]  # check_places has seen that it is there
    before = spelled(made, manifest["max_prompt_length"])
    now = spelled(key, what.max_length - key["sampling"]["max_new_tokens"])
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if made["data"] != key["data"]:
        changed.append("other data in --data-dir")
    # The same weights in another precision have another fingerprint.
    if made["teacher"] != key["teacher"] and made["dtype"] == key["dtype"]:
        changed.append("another teacher in --model")
    backend = str(made.get("generator")).split()[0]
    if what.generation_backend not in ("auto", backend):
        changed.append(f"--generation-backend was {backend}, is {what.generation_backend}")
    if changed:
        raise UserError(
            f"{output_dir} holds answers that were made otherwise ({'; '.join(changed)}); give another --output-dir, "
            f"or delete the folder"
        )
    return True


def spelled(key: Mapping[str, Any], max_prompt_length: int) -> dict[str, Any]:
    """What answers depend on beside the teacher and the data: flag -> value."""
    options = dict(key["sampling"]) | {"dtype": key["dtype"], "num_train": key["examples"]}
    options["max_length"] = options.pop("max_new_tokens") + max_prompt_length
    options["sampling_temperature"] = options.pop("temperature")
    return {f"--{name.replace('_', '-')}": value for name, value in options.items()}


def check_places(data_dir: Path, output_dir: Path) -> None:
    """Raise UserError where --output-dir is the folder of the prompts, or holds something else than answers."""
    if output_dir.resolve() == data_dir.resolve():
        raise UserError(
            f"--output-dir is --data-dir ({data_dir}), whose references would be lost; give another folder"
        )
    check_place(output_dir, "processed data", "manifest.json")
    if (output_dir / "manifest.json").is_file() and "responses_of" not in read_manifest(output_dir):
        raise UserError(f"{output_dir} holds data that no teacher answered; give another --output-dir")


def answer_all(
    generator: Generator,
    tokenizer: Any,
    train: Split,
    sampling: Sampling,
    parts_dir: Path,
    key: Mapping[str, Any],
) -> dict[int, dict[str, Any]]:
    """{"id", "ids", "text"} of every training prompt by its id, on every rank; ids without the token that ended it."""
    blocks = generator.blocks(train.prompt_lengths)

    def answer(block: np.ndarray) -> list[dict[str, Any]]:
        rows = train.table[[int(i) for i in block]]
        tokens = generator(rows["prompt_ids"], rows["id"], sampling)
        texts = decode(tokenizer, tokens)
        return [{"id": i, "ids": ids, "text": text} for i, ids, text in zip(rows["id"], tokens, texts, strict=True)]

    with ResumablePass(parts_dir, key) as parts:
        return parts.fill(blocks, train.ids, answer, title="answering")


def write(
    output_dir: Path,
    data_dir: Path,
    manifest: Mapping[str, Any],
    train: Split,
    answers: Mapping[int, Mapping[str, Any]],
    key: Mapping[str, Any],
    end_id: int,
) -> None:
    """Write the processed folder whole or not at all, and delete the parts.

    An answer that was cut at its longest gets no end: the student must not learn to stop there.
    """
    longest = key["sampling"]["max_new_tokens"]

    def replace_response(row: Mapping[str, Any]) -> dict[str, Any]:
        answer = answers[row["id"]]
        ids = list(answer["ids"]) + ([end_id] if len(answer["ids"]) < longest else [])
        return {"response": answer["text"], "response_ids": ids, "num_response_tokens": len(ids)}

    with written_whole(output_dir) as temporary:
        # In memory: else the tables of both steps stay behind as cache-*.arrow in --data-dir.
        answered = train.table.map(replace_response, keep_in_memory=True).flatten_indices(keep_in_memory=True)
        answered.save_to_disk(str(temporary / "train"))
        dev = datasets.load_from_disk(str(data_dir / "dev"))
        dev.save_to_disk(str(temporary / "dev"), num_shards=None if len(dev) else 1)
        changed = dict(manifest) | {"responses_of": dict(key), "fingerprint": value_sha256([manifest, key])}
        changed["examples"] = dict(manifest["examples"]) | {"train": len(train)}
        write_json(temporary / "manifest.json", changed)
    shutil.rmtree(output_dir.with_name(output_dir.name + ".parts"), ignore_errors=True)
    lengths = [len(answer["ids"]) for answer in answers.values()]
    say(
        f"{output_dir}: {len(lengths)} answers, {sum(lengths) / len(lengths):.1f} tokens on average, "
        f"{lengths.count(0)} empty, {sum(length >= longest for length in lengths)} cut at {longest} tokens"
    )


if __name__ == "__main__":
    run_main(main)
    process.stop()
