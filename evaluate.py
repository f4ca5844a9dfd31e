"""Evaluate a checkpoint on any evaluation sets and seeds, in one process.

    deepspeed evaluate.py --model results/gpt2/pocl/tfkl/seed10/best --sets dolly self-inst vicuna sinst uinst

writes eval/<set>/<seed>.jsonl (one record a prompt) and eval/summary.json beside best/. Seeds that are there are kept,
and answers of other options are not written over. With --answers FILE the answers are read instead of sampled:

    python evaluate.py --answers answers.jsonl --sets dolly
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocl.cli import process
from pocl.cli.evaluate_options import EvaluateOptions
from pocl.cli.flags import parse
from pocl.cli.options import GenerationOptions
from pocl.cli.process import quiet_libraries, run_main
from pocl.cli.resolve import prompts_together
from pocl.common import distributed
from pocl.common.console import say, show_table
from pocl.common.errors import UserError
from pocl.common.files import read_jsonl, value_sha256, write_json, write_jsonl
from pocl.data.dataset import load_split, read_manifest
from pocl.evaluation.answers import evaluate, mean_scores, score_answers, summarise
from pocl.evaluation.kept_answers import (
    GIVEN,
    ORIGIN,
    changed_options,
    read_summary,
    remove_answers,
    seed_files,
    what_is_there,
    write_summary,
)
from pocl.evaluation.sets import Example, load_set, tokenise_prompts
from pocl.generation.decoding import Generator
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import BackendSettings, open_generator
from pocl.models.identity import check_positions, tokenizer_fingerprint, weights_fingerprint
from pocl.models.loading import load_model, load_tokenizer
from pocl.models.student import Student

# What summary.json keeps of the command beside the protocol, so that it can be given again.
ASKED = ("model", "tokenizer", "num_examples", "max_length", "max_prompt_length", "dtype")


Answers = Mapping[int, Sequence[Mapping[str, Any]]]  # seed -> a record a prompt


@dataclass(frozen=True)
class TestSet:
    """An evaluation set with its prompts as the model reads them."""

    name: str
    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    num_cut: int  # prompts that lost their beginning


@dataclass(frozen=True)
class Protocol:
    """One way to answer: where its results go, how tokens are chosen, and under which seeds."""

    folder: Path
    sampling: Sampling
    seeds: tuple[int, ...]
    title: str = ""  # behind the set and the seed, where progress is shown


@dataclass(frozen=True)
class Respondent:
    """Who answers, and what of the command is kept beside the answers."""

    generator: Generator
    tokenizer: PreTrainedTokenizerBase
    fingerprints: Mapping[str, str]  # of the weights ("model") and of the tokenizer
    command: Mapping[str, Any]  # the options in ASKED

    def read(self, name: str, examples: Sequence[Example]) -> TestSet:
        """A set with its prompts as tokens; says how many are cut."""
        prompts, num_cut = tokenise_prompts(self.tokenizer, examples, self.command["max_prompt_length"])
        if num_cut:
            say(f"{name}: {num_cut} of {len(prompts)} prompts lost their beginning to --max-prompt-length")
        return TestSet(name, examples, prompts, num_cut)

    def origin(self, test_set: TestSet, protocol: Protocol) -> dict[str, Any]:
        """What answers come from, beside the seed: where two are equal, so are the answers."""
        sampling = {key: value for key, value in asdict(protocol.sampling).items() if key != "seed"}
        limits = {"generator": self.generator.name, "max_prompt_length": self.command["max_prompt_length"]}
        return {
            "examples": len(test_set.examples),
            "cut_prompts": test_set.num_cut,
            "protocol": sampling | limits,
            **self.fingerprints,
            "dtype": self.command["dtype"],
            "set": value_sha256([[example.prompt, *example.references] for example in test_set.examples]),
        }


def main() -> None:
    """Parse, answer or read answers, score, summarise."""
    quiet_libraries()
    options, generation = parse([EvaluateOptions, GenerationOptions], "Evaluate a checkpoint on instruction sets.")
    sets = {name: load_set(Path(options.data_root), name, options.num_examples) for name in options.sets}
    output_dir = results_folder(options)
    if options.answers:
        summary = score_file(Path(options.answers), sets, output_dir)
    else:
        summary = sample_and_score(options, generation, sets, output_dir)
    show(summary, options.answers or options.model)


def results_folder(options: EvaluateOptions) -> Path | None:
    """Where results go: --output-dir, or eval/ beside a run's best/; None where answers are only scored."""
    if options.output_dir:
        return Path(options.output_dir)
    if options.answers:
        return None
    folder = Path(options.model)
    if folder.name == "best":
        return folder.parent / "eval"
    raise UserError(f"{options.model} is no run's best/ folder, so say where results go: --output-dir DIR")


def score_file(path: Path, sets: Mapping[str, Sequence[Example]], output_dir: Path | None) -> dict[str, Any]:
    """Score a file of answers, one record with a ``text`` a prompt, in the order of the set."""
    (name, examples), *_ = sets.items()
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("text"), str):
            raise UserError(f"{path}:{number}: no string under 'text'; each line wants one answer")
    if output_dir and (seed_files(output_dir / name) or (output_dir / name / ORIGIN).is_file()):
        place = output_dir / name
        raise UserError(f"{place} holds the answers of a model; give another --output-dir, or delete {place}")
    scored = score_answers(examples, [record["text"] for record in records])
    summary = {name: summarise({0: mean_scores(scored)})}
    if output_dir:
        write_jsonl(output_dir / name / GIVEN, scored)
        write_summary(output_dir, name, summary[name])
    return summary


def sample_and_score(
    options: EvaluateOptions, generation: GenerationOptions, sets: Mapping[str, Sequence[Example]], output_dir: Path
) -> dict[str, Any]:
    """Answer and score every set under every seed, writing each result as soon as it is there."""
    trained_on = trained_prompts(options.train_data)
    device = process.start()
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    check_positions(options.model, options.max_length)
    model = load_model(options.model, options.dtype)
    batch_size = generation.eval_batch_size
    batch_size = batch_size or prompts_together(options.model, options.dtype, options.max_length, device)
    settings = BackendSettings(generation.generation_backend, options.max_length, batch_size, device)
    with open_generator(Student(model, tokenizer, options.model), settings) as generator:
        command = {option: getattr(options, option) for option in ASKED}
        fingerprints = {"model": weights_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
        respondent = Respondent(generator, tokenizer, fingerprints, command)
        test_sets = [respondent.read(name, examples) for name, examples in sets.items()]
        return score_sets(test_sets, protocols_of(options, generation, output_dir), respondent, trained_on)


def protocols_of(options: EvaluateOptions, generation: GenerationOptions, output_dir: Path) -> list[Protocol]:
    """The protocol that was asked for and, with --clean, the clean one."""
    sampling = Sampling(
        options.max_length - options.max_prompt_length,
        temperature=generation.sampling_temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        no_repeat_ngram=generation.no_repeat_ngram,
    )
    clean = Sampling(sampling.max_new_tokens, temperature=0.0, no_repeat_ngram=0)
    seeds = tuple(dict.fromkeys(options.seeds))
    both = [Protocol(output_dir, sampling, seeds), Protocol(output_dir / "clean", clean, seeds[:1], ", clean")]
    return both if options.clean else both[:1]


def score_sets(
    sets: Sequence[TestSet], protocols: Sequence[Protocol], respondent: Respondent, trained_on: set[str] | None
) -> dict[str, Any]:
    """Score every set under every protocol; what is there already is looked at before anything is answered."""
    kept = {
        (test_set.name, protocol): kept_answers(test_set, protocol, respondent)
        for test_set in sets
        for protocol in protocols
    }
    say_what_is_older(protocols[0].folder, [test_set.name for test_set in sets], respondent)
    summary: dict[str, Any] = {}
    for test_set in sets:
        scores = [
            score_set(test_set, protocol, respondent, kept[test_set.name, protocol], trained_on)
            for protocol in protocols
        ]
        summary[test_set.name] = scores[0] | ({"clean": scores[1]} if len(scores) > 1 else {})
    return summary


def score_set(
    test_set: TestSet, protocol: Protocol, respondent: Respondent, kept: Answers, trained_on: set[str] | None
) -> dict[str, Any]:
    """Answer the seeds that are not there -> the scores of the seeds that were asked for.

    summary.json has the scores of all seeds of this protocol that are there.
    """
    answered, place = dict(kept), protocol.folder / test_set.name
    origin = respondent.origin(test_set, protocol)

    def summary_of(seeds: Iterable[int]) -> dict[str, Any]:
        records = {seed: answered[seed] for seed in seeds}
        summary = summarise({seed: mean_scores(of_seed) for seed, of_seed in records.items()}) | origin
        return (
            summary | without_trained_prompts(test_set.examples, records, trained_on) | {"asked": respondent.command}
        )

    if distributed.is_main():
        if answered:
            write_summary(protocol.folder, test_set.name, summary_of(sorted(answered)))
        elif not seed_files(place):
            write_json(place / ORIGIN, origin | {"asked": respondent.command})
    for seed in protocol.seeds:
        if seed in answered:
            continue
        answered[seed] = evaluate(
            respondent.generator,
            respondent.tokenizer,
            test_set.examples,
            test_set.prompts,
            sampling=replace(protocol.sampling, seed=seed),
            title=f"{test_set.name}, seed {seed}{protocol.title}",
        )
        if distributed.is_main():
            write_jsonl(place / f"{seed}.jsonl", answered[seed])
            write_summary(protocol.folder, test_set.name, summary_of(sorted(answered)))
    return summary_of(protocol.seeds)


def kept_answers(test_set: TestSet, protocol: Protocol, respondent: Respondent) -> Answers:
    """Seed -> the records that earlier evaluations of the same model, set and protocol left, on every rank.

    Those of a model that stood at the same path are removed.  Raises UserError where other options made them.
    """
    place, origin = protocol.folder / test_set.name, respondent.origin(test_set, protocol)
    earlier, files, given = distributed.broadcast(what_is_there(protocol.folder, test_set.name))
    if given:
        raise UserError(f"{place} holds scores of --answers; give another --output-dir, or delete {place}")
    if not files:
        return {}
    if not earlier:
        raise UserError(f"{place} holds answers of unknown origin; give another --output-dir, or delete {place}")
    before, now = str(earlier.get("asked", {}).get("model", "unknown")), str(respondent.command["model"])
    moved = Path(before).resolve() != Path(now).resolve()
    changed = changed_options(earlier, origin)
    if moved and earlier.get("model") != origin["model"]:
        changed.append(f"--model was {before}, is {now}")
    if changed:
        raise UserError(
            f"{place} holds answers of other options ({'; '.join(changed)}); give another --output-dir, or delete "
            f"{place}"
        )
    if earlier["model"] != origin["model"]:
        seeds = " ".join(map(str, files))
        say(f"{test_set.name}: seeds {seeds} were answered by an earlier model in {now}; they are removed ({place})")
        if distributed.is_main():
            remove_answers(protocol.folder, test_set.name)
        return {}
    ids = [example.id for example in test_set.examples]
    read = distributed.broadcast({seed: read_jsonl(path) for seed, path in files.items() if path.is_file()})
    kept = {seed: records for seed, records in read.items() if [record.get("id") for record in records] == ids}
    if kept:
        say(f"{test_set.name}: seeds {' '.join(map(str, kept))} are there already ({place})")
    return kept


def say_what_is_older(folder: Path, names: Collection[str], respondent: Respondent) -> None:
    """Name the other sets of a folder whose answers are of another model, which a table would put side by side."""
    mine, others = respondent.fingerprints["model"], read_summary(folder).items()
    older = [name for name, scores in others if name not in names and scores.get("model", mine) != mine]
    if older:
        say(f"{folder}: {' '.join(older)} were answered by another model; evaluate them again, too")


def trained_prompts(train_data: str | None) -> set[str] | None:
    """The prompts of the training split that the model learnt from; None where it was not said."""
    if train_data is None:
        return None
    room = read_manifest(Path(train_data))["max_prompt_length"] + 1  # for the longest prompt and a token
    return set(load_split(Path(train_data), "train", max_length=room).column("prompt"))


def without_trained_prompts(
    examples: Sequence[Example], records: Mapping[int, Sequence[Mapping[str, Any]]], trained_on: set[str] | None
) -> dict[str, Any]:
    """Which examples have a prompt of the training data, and the mean scores without them."""
    if trained_on is None:
        return {}
    ids = {example.id for example in examples if example.prompt in trained_on}
    fresh = [record for answered in records.values() for record in answered if record["id"] not in ids]
    return {"contaminated": {"ids": sorted(ids), "without": mean_scores(fresh) if fresh else None}}


def show(summary: Mapping[str, Any], title: str | None) -> None:
    """Print the table: mean and spread over seeds; beside them the clean protocol, and without known prompts."""
    columns, notes = ["set", "seeds", "ROUGE-L", "exact match"], []
    clean = any("clean" in scores for scores in summary.values())
    contaminated = any(scores.get("contaminated", {}).get("ids") for scores in summary.values())
    if clean:
        columns.append("clean")
        notes.append("clean: ROUGE-L of greedy answers without the ban of repeated n-grams")
    if contaminated:
        columns.append("unseen")
        counts = {name: len(scores.get("contaminated", {}).get("ids", ())) for name, scores in summary.items()}
        known = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        notes.append(f"unseen: ROUGE-L less the prompts that stand in the training data ({known})")
    rows = []
    for name, scores in summary.items():
        mean = scores["rouge_l"]["mean"]
        row = [name, len(scores["rouge_l"]["seeds"])]
        row += [f"{mean:.2f}" + spread(scores["rouge_l"])]
        row += [f"{scores['exact_match']['mean']:.2f}" + spread(scores["exact_match"])]
        if clean:
            row.append(beside(scores.get("clean", {}).get("rouge_l", {}).get("mean"), mean))
        if contaminated:
            without = (scores.get("contaminated", {}).get("without") or {}).get("rouge_l")
            row.append(beside(without if counts[name] else mean, mean))
        rows.append(row)
    show_table(str(title), columns, rows)
    for note in notes:
        say(note)


def beside(value: float | None, mean: float) -> str:
    """A score and how far it is from the one of the protocol."""
    return "–" if value is None else f"{value:.2f} ({value - mean:+.2f})"


def spread(scores: Mapping[str, Any]) -> str:
    """The standard deviation over seeds, where there is more than one."""
    return f" ±{scores['std']:.2f}" if len(scores["seeds"]) > 1 else ""


if __name__ == "__main__":
    run_main(main)
    process.stop()
