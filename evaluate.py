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

from pocl import config as options
from pocl import distributed
from pocl.config import EvaluateOptions, GenerationOptions
from pocl.console import quiet_libraries, say, show_table
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
from pocl.files import read_json, read_jsonl, write_json, write_jsonl
from pocl.flags import parse
from pocl.generation import Sampling
from pocl.models import load_model, load_tokenizer

# What summary.json keeps of the command beside the protocol, so that it can be given again.
ASKED = ("model", "tokenizer", "num_examples", "max_length", "max_prompt_length", "dtype")


def main() -> None:
    """Parse, answer or read answers, score, summarise."""
    quiet_libraries()
    what, generation = parse([EvaluateOptions, GenerationOptions], "Evaluate a checkpoint on instruction sets.")
    options.check_evaluate(what, generation)
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
        write_json(output_dir / "summary.json", summary)
    return summary


def sample_and_score(
    what: EvaluateOptions, generation: GenerationOptions, sets: Mapping[str, Sequence[Example]], output_dir: Path
) -> dict[str, Any]:
    """Answer and score every set under every seed, writing each result as soon as it is there."""
    device = distributed.start()
    tokenizer = load_tokenizer(what.tokenizer or what.model)
    model = load_model(what.model, what.dtype).to(device)
    summary: dict[str, Any] = {}
    for name, examples in sets.items():
        prompts, cut = tokenise_prompts(tokenizer, examples, what.max_prompt_length)
        if cut:
            say(f"{name}: {cut} of {len(prompts)} prompts lost their beginning to --max-prompt-length")
        by_seed = {}
        sampling = Sampling(
            what.max_length - what.max_prompt_length,
            temperature=generation.sampling_temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            no_repeat_ngram=generation.no_repeat_ngram,
        )
        for seed in what.seeds:
            records = evaluate(
                model,
                tokenizer,
                examples,
                prompts,
                sampling=replace(sampling, seed=seed),
                batch_size=generation.eval_batch_size,
                title=f"{name}, seed {seed}",
            )
            by_seed[seed] = mean_scores(records)
            if distributed.is_main():
                write_jsonl(output_dir / name / f"{seed}.jsonl", records)
        protocol = {key: value for key, value in asdict(sampling).items() if key != "seed"}
        summary[name] = summarise(by_seed) | {"examples": len(examples), "cut_prompts": cut, "protocol": protocol}
        summary[name]["asked"] = {option: getattr(what, option) for option in ASKED}
        if distributed.is_main():
            write_summary(output_dir, name, summary[name])
    return summary


def write_summary(output_dir: Path, name: str, scores: Mapping[str, Any]) -> None:
    """Put one set's scores into summary.json, beside those of other sets."""
    path = output_dir / "summary.json"
    others = read_json(path) if path.is_file() else {}
    write_json(path, others | {name: scores})


def show(summary: Mapping[str, Any], title: str | None) -> None:
    """Print the table: mean and spread over seeds."""
    rows = [
        [name, len(s["rouge_l"]["seeds"])] + [f"{s[m]['mean']:.4f}" + spread(s[m]) for m in ("rouge_l", "exact_match")]
        for name, s in summary.items()
    ]
    show_table(str(title), ["set", "seeds", "ROUGE-L", "exact match"], rows)


def spread(scores: Mapping[str, Any]) -> str:
    """The standard deviation over seeds, where there is more than one."""
    return f" ± {scores['std']:.2f}" if len(scores["seeds"]) > 1 else ""


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
