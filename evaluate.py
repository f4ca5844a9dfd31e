"""Evaluate a checkpoint on any evaluation sets and seeds, in one process.

    deepspeed evaluate.py --model results/gpt2/pocl/tfkl/seed10/best --sets dolly self-inst vicuna sinst uinst

writes eval/<set>/<seed>.jsonl (one record a prompt) and eval/summary.json beside best/. Seeds that are there are kept,
and answers of other options are not written over. With --answers FILE the answers are read instead of sampled:

    python evaluate.py --answers answers.jsonl --sets dolly
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pocl.cli import process
from pocl.cli.evaluate_options import EvaluateOptions, GenerationOptions
from pocl.cli.flags import parse
from pocl.cli.resolve import prompts_together
from pocl.cli.show_evaluation import show_evaluation
from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import read_jsonl, write_json, write_jsonl
from pocl.data.dataset import read_manifest, template_of
from pocl.data.encoding import Encoder
from pocl.data.processing import with_ends
from pocl.data.templates import Template, check_template, choose_template
from pocl.evaluation.answerer import Answerer, EvalProtocol, read_set
from pocl.evaluation.answers import Record, mean_scores, score_answers, summarise
from pocl.evaluation.contamination import trained_prompts, without_known
from pocl.evaluation.kept_answers import (
    GIVEN,
    ORIGIN,
    kept_answers,
    kept_cross_entropy,
    note_cross_entropy,
    say_what_is_older,
    seed_files,
    write_summary,
)
from pocl.evaluation.metrics import metric_named
from pocl.evaluation.sets import TestSet, load_set
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import BackendSettings, open_generator
from pocl.models.identity import check_positions, tokenizer_fingerprint
from pocl.models.loading import load_model, load_template, load_tokenizer
from pocl.models.student import Student
from pocl.training.model_card import write_card
from pocl.training.run_folder import RunFolder

# What summary.json keeps of the command beside the protocol, so that it can be given again.
ASKED = ("model", "tokenizer", "template", "system", "thinking", "num_examples", "max_length", "max_prompt_length")
ASKED += ("dtype",)


def main() -> None:
    """Parse, answer or read answers, score, summarise."""
    process.quiet_libraries()
    options, generation = parse([EvaluateOptions, GenerationOptions], "Evaluate a checkpoint on instruction sets.")
    if options.answers:
        summary = score_file(Path(options.answers), options, generation)
    else:
        summary = score_checkpoint(options.model, options, generation)
        tell_model_card(Path(options.model), summary)
    show_evaluation(summary, options.answers or options.model, [metric_named(name) for name in options.metrics])


def tell_model_card(model: Path, summary: dict[str, Any]) -> None:
    """Put the scores of a run's best student on its model card."""
    run = RunFolder(model.parent)
    if model.name == "best" and run.config.is_file() and distributed.is_main():
        write_card(run, model=next(iter(summary.values()))["model"])


def score_file(path: Path, options: EvaluateOptions, generation: GenerationOptions) -> dict[str, Any]:
    """Score a file of answers, one record with a ``text`` a prompt, in the order of the set."""
    (name,), words = options.sets, generation.rouge_tokenizer
    examples = load_set(Path(options.data_root), name, options.num_examples, rouge_tokenizer=words)
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("text"), str):
            raise UserError(f"{path}:{number}: no string under 'text'; each line wants one answer")
    place = Path(options.output_dir) / name if options.output_dir else None
    if place and (seed_files(place) or (place / ORIGIN).is_file()):
        raise UserError(f"{place} holds the answers of a model; give another --output-dir, or delete {place}")
    scored = score_answers(examples, [record["text"] for record in records], words)
    scores = summarise({0: mean_scores(scored)})
    if place:
        write_jsonl(place / GIVEN, scored)
        write_summary(place.parent, name, scores)
    return {name: scores}


def score_checkpoint(path: str, options: EvaluateOptions, generation: GenerationOptions) -> dict[str, Any]:
    """Answer and score every set under every protocol and seed -> the scores by set."""
    root, words = Path(options.data_root), generation.rouge_tokenizer
    known = trained_prompts(Path(options.train_data)) if options.train_data else None
    tokenizer = load_tokenizer(options.tokenizer or path)
    encoder = Encoder(tokenizer, choose_prompts(path, tokenizer, options), max_prompt_length=options.max_prompt_length)
    load = partial(load_set, root, num_examples=options.num_examples, rouge_tokenizer=words, encoder=encoder)
    tests = [read_set(name, load(name), tokenizer, options.max_prompt_length, path) for name in options.sets]
    protocols = protocols_of(options, generation)
    with open_answerer(path, options, generation, encoder) as answerer:
        # All of what is there already is looked at before anything is answered.
        kept = {(test.name, way): kept_answers(test, way, answerer) for test in tests for way in protocols}
        losses = {test.name: kept_cross_entropy(test, protocols[0], answerer) for test in tests}
        say_what_is_older(protocols[0].folder, options.sets, answerer.fingerprints["model"])
        summary: dict[str, Any] = {}
        for test in tests:
            first, *clean = [score_set(test, way, answerer, kept[test.name, way], known) for way in protocols]
            summary[test.name] = first | ({"clean": clean[0]} if clean else {})
    for test in tests:  # now that vLLM, where it answered, has left the device
        loss = losses[test.name] or answerer.cross_entropy(test, options.max_length)
        if loss is not None:
            summary[test.name]["cross_entropy"] = loss
            note_cross_entropy(protocols[0].folder, test.name, loss)
    return summary


def score_set(
    test: TestSet,
    protocol: EvalProtocol,
    answerer: Answerer,
    answered: dict[int, list[Record]],
    known: set[str] | None,
) -> dict[str, Any]:
    """Answer the seeds that are not there -> the scores of the seeds that were asked for.

    Each result is written as soon as it is there; summary.json has the scores of all seeds of this protocol.
    """
    place, origin = protocol.folder / test.name, answerer.origin(test, protocol)
    answerer.say_what_is_banned(test, protocol)

    def scores_of(seeds: list[int]) -> dict[str, Any]:
        scores = summarise({seed: mean_scores(answered[seed]) for seed in seeds}) | origin
        if known is not None:
            scores["contaminated"] = without_known(test.examples, [answered[seed] for seed in seeds], known)
        return scores

    if distributed.is_main():
        write_json(place / ORIGIN, origin)
        if answered:
            write_summary(protocol.folder, test.name, scores_of(sorted(answered)))
    for seed in protocol.seeds:
        if seed not in answered:
            answered[seed] = answerer.answer(test, protocol, seed)
            if distributed.is_main():
                write_jsonl(place / f"{seed}.jsonl", answered[seed])
                write_summary(protocol.folder, test.name, scores_of(sorted(answered)))
    return scores_of(list(protocol.seeds))


def protocols_of(options: EvaluateOptions, generation: GenerationOptions) -> list[EvalProtocol]:
    """The protocol that was asked for and, with --clean, the clean one."""
    folder, seeds = options.results_folder(), tuple(dict.fromkeys(options.seeds))
    sampling = generation.sampling(options.max_length - options.max_prompt_length)
    clean = Sampling(sampling.max_new_tokens, temperature=0.0, no_repeat_ngram=0)
    words = generation.rouge_tokenizer
    both = [EvalProtocol(folder, sampling, seeds, "", words)]
    both.append(EvalProtocol(folder / "clean", clean, seeds[:1], ", clean", words))
    return both if options.clean else both[:1]


def choose_prompts(path: str, tokenizer: Any, options: EvaluateOptions) -> Template:
    """The template that the model was trained with, or one for a model that was not trained here.

    That is the one that was asked for, that of --train-data, or the tokenizer's own, or Alpaca's.
    """
    trained, asked = load_template(path), options.template or options.system or options.thinking
    if options.train_data:
        trained_on = template_of(read_manifest(Path(options.train_data)))
        check_template(trained_on, options.train_data, path, trained)
        trained = trained or trained_on
    if trained and not asked:
        return trained
    template = choose_template(tokenizer, options.template, system=options.system, thinking=options.thinking)
    if trained and trained != template:
        raise UserError(f"--template is {template}, but {path} was trained with {trained}; leave --template out")
    if not options.template:
        say(f"{path} does not say which template it was trained with; the prompts have {template}: --template")
    return with_ends(template, tokenizer, ())


@contextmanager
def open_answerer(
    path: str, options: EvaluateOptions, generation: GenerationOptions, encoder: Encoder
) -> Iterator[Answerer]:
    """The checkpoint, ready to answer, for as long as the block runs."""
    device, dtype, max_length = process.start(), options.dtype, options.max_length
    tokenizer, template = encoder.tokenizer, encoder.template
    check_positions(path, max_length)
    student = Student(load_model(path, dtype), tokenizer, path, template=template)
    batch_size = generation.eval_batch_size or prompts_together(path, dtype, max_length, device)
    settings = BackendSettings(generation.generation_backend, max_length, batch_size, device)
    fingerprints = {"model": student.fingerprint(), "tokenizer": tokenizer_fingerprint(tokenizer)}
    with open_generator(student, settings) as generator:
        asked = {option: getattr(options, option) for option in ASKED}
        yield Answerer(generator, student, device, fingerprints, asked, str(template))


if __name__ == "__main__":
    process.run_main(main)
    process.stop()
