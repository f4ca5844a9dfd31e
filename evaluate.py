"""Evaluate a checkpoint on any evaluation sets and seeds, in one process.

    deepspeed evaluate.py --model results/gpt2/pocl/tfkl/seed10/best --sets dolly self-inst vicuna sinst uinst

writes eval/<set>/<seed>.jsonl (one record a prompt) and eval/summary.json beside best/. With --answers FILE the
answers are read instead of sampled:

    python evaluate.py --answers answers.jsonl --sets dolly
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocl import distributed
from pocl.config import check_evaluate
from pocl.console import quiet_libraries, say, show_table
from pocl.data import load_split, tokenizer_fingerprint
from pocl.errors import UserError, run_main
from pocl.evaluation import (
    Example,
    evaluate,
    load_set,
    mean_scores,
    score_answers,
    summarise,
    tokenise_prompts,
)
from pocl.files import locked_folder, read_json, read_jsonl, value_sha256, write_json, write_jsonl
from pocl.flags import parse
from pocl.generation import Generator
from pocl.models import check_positions, load_model, load_tokenizer, weights_fingerprint
from pocl.options import EvaluateOptions, GenerationOptions
from pocl.plan.resolve import prompts_together
from pocl.sampling import Sampling
from pocl.vllm_backend import open_generator

# What summary.json keeps of the command beside the protocol, so that it can be given again.
ASKED = ("model", "tokenizer", "num_examples", "max_length", "max_prompt_length", "dtype")


def main() -> None:
    """Parse, answer or read answers, score, summarise."""
    quiet_libraries()
    what, generation = parse([EvaluateOptions, GenerationOptions], "Evaluate a checkpoint on instruction sets.")
    check_evaluate(what, generation)
    sets = {name: load_set(Path(what.data_root), name, what.num_examples) for name in what.sets}
    output_dir = results_folder(what)
    if what.answers:
        summary = score_file(Path(what.answers), sets, output_dir)
    else:
        summary = sample_and_score(what, generation, sets, output_dir)
    show(summary, what.answers or what.model)


def results_folder(what: EvaluateOptions) -> Path | None:
    """Where results go: --output-dir, or eval/ beside a run's best/; None where answers are only scored."""
    if what.output_dir:
        return Path(what.output_dir)
    if what.answers:
        return None
    folder = Path(what.model)
    if folder.name == "best":
        return folder.parent / "eval"
    raise UserError(f"{what.model} is no run's best/ folder, so say where results go: --output-dir DIR")


def score_file(path: Path, sets: Mapping[str, Sequence[Example]], output_dir: Path | None) -> dict[str, Any]:
    """Score a file of answers, one record with a ``text`` a prompt, in the order of the set."""
    (name, examples), *_ = sets.items()
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("text"), str):
            raise UserError(f"{path}:{number}: no string under 'text'; each line wants one answer")
    scored = score_answers(examples, [record["text"] for record in records])
    summary = {name: summarise({0: mean_scores(scored)})}
    if output_dir:
        write_jsonl(output_dir / name / "answers.jsonl", scored)
        write_summary(output_dir, name, summary[name])
    return summary


def sample_and_score(
    what: EvaluateOptions, generation: GenerationOptions, sets: Mapping[str, Sequence[Example]], output_dir: Path
) -> dict[str, Any]:
    """Answer and score every set under every seed, writing each result as soon as it is there."""
    device = distributed.start()
    tokenizer = load_tokenizer(what.tokenizer or what.model)
    check_positions(what.model, what.max_length)
    model = load_model(what.model, what.dtype)
    with open_generator(
        generation.generation_backend,
        model,
        tokenizer,
        model_path=what.model,
        max_length=what.max_length,
        batch_size=generation.eval_batch_size or prompts_together(what.model, what.dtype, what.max_length, device),
        device=device,
    ) as generator:
        fingerprint = weights_fingerprint(model)
        return score_sets(what, generation, sets, output_dir, tokenizer, generator, fingerprint)


def score_sets(
    what: EvaluateOptions,
    generation: GenerationOptions,
    sets: Mapping[str, Sequence[Example]],
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    generator: Generator,
    fingerprint: str,
) -> dict[str, Any]:
    """Every set under the protocol that was asked for and, with --clean, under the clean one."""
    asked = Sampling(
        what.max_length - what.max_prompt_length,
        temperature=generation.sampling_temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        no_repeat_ngram=generation.no_repeat_ngram,
    )
    passes = {output_dir: (asked, what.seeds)}
    if what.clean:
        passes[output_dir / "clean"] = (
            Sampling(asked.max_new_tokens, temperature=0.0, no_repeat_ngram=0),
            what.seeds[:1],
        )
    seen = trained_prompts(what.train_data)
    summary: dict[str, Any] = {}
    for name, examples in sets.items():
        prompts, cut = tokenise_prompts(tokenizer, examples, what.max_prompt_length)
        if cut:
            say(f"{name}: {cut} of {len(prompts)} prompts lost their beginning to --max-prompt-length")
        for folder, (sampling, seeds) in passes.items():
            protocol = {key: value for key, value in asdict(sampling).items() if key != "seed"}
            protocol |= {"generator": generator.name, "max_prompt_length": what.max_prompt_length}
            about = {"examples": len(examples), "cut_prompts": cut, "protocol": protocol, "model": fingerprint}
            about |= {"dtype": what.dtype, "tokenizer": tokenizer_fingerprint(tokenizer)}
            about["set"] = value_sha256([[example.prompt, *example.references] for example in examples])
            records = {seed: kept for seed, kept in kept_seeds(folder, name, about).items() if seed in seeds}
            for seed in seeds:
                if seed not in records:
                    title = f"{name}, seed {seed}" + (", clean" if folder != output_dir else "")
                    at_seed = replace(sampling, seed=seed)
                    answered = evaluate(generator, tokenizer, examples, prompts, sampling=at_seed, title=title)
                    records[seed] = answered
                    if distributed.is_main():
                        write_jsonl(folder / name / f"{seed}.jsonl", answered)
                found = summarise({done: mean_scores(records[done]) for done in records}) | about
                found |= without_trained_prompts(examples, records, seen)
                found["asked"] = {option: getattr(what, option) for option in ASKED}
                if distributed.is_main():
                    write_summary(folder, name, found)
            if folder == output_dir:
                summary[name] = found
            else:
                summary[name] = summary[name] | {"clean": found}
    return summary


def kept_seeds(folder: Path, name: str, about: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Seed -> the records that an earlier evaluation of the same model, set and protocol left, on every rank."""
    path = folder / "summary.json"
    earlier = (read_json(path) if path.is_file() else {}).get(name, {})
    if any(earlier.get(key) != value for key, value in about.items()):
        return {}
    files = {int(seed): folder / name / f"{seed}.jsonl" for seed in earlier["rouge_l"]["seeds"]}
    kept = distributed.broadcast({seed: read_jsonl(path) for seed, path in files.items() if path.is_file()})
    if kept:
        say(f"{name}: seeds {' '.join(map(str, kept))} are there already ({folder / name})")
    return kept


def trained_prompts(train_data: str | None) -> set[str] | None:
    """The prompts of the training split that the model learnt from; None where it was not said."""
    if train_data is None:
        return None
    return set(load_split(Path(train_data), "train", max_length=1 << 30).column("prompt"))


def without_trained_prompts(
    examples: Sequence[Example], records: Mapping[int, Sequence[Mapping[str, Any]]], seen: set[str] | None
) -> dict[str, Any]:
    """Which examples have a prompt of the training data, and the mean scores without them."""
    if seen is None:
        return {}
    ids = {example.id for example in examples if example.prompt in seen}
    fresh = [record for answered in records.values() for record in answered if record["id"] not in ids]
    return {"contaminated": {"ids": sorted(ids), "without": mean_scores(fresh) if fresh else None}}


def write_summary(output_dir: Path, name: str, scores: Mapping[str, Any]) -> None:
    """Put one set's scores into summary.json, beside those of other sets, which others may be writing now."""
    path = output_dir / "summary.json"
    with locked_folder(output_dir):
        others = read_json(path) if path.is_file() else {}
        write_json(path, others | {name: scores})


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
        row += [f"{mean:.4f}" + spread(scores["rouge_l"])]
        row += [f"{scores['exact_match']['mean']:.2f}" + spread(scores["exact_match"])]
        if clean:
            row.append(beside(scores.get("clean", {}).get("rouge_l", {}).get("mean"), mean))
        if contaminated:
            without = (scores.get("contaminated", {}).get("without") or {}).get("rouge_l")
            row.append(beside(without, mean) if counts[name] else "the same")
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
    distributed.stop()
