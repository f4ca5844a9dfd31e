"""The model card beside a saved student: what it is, how it was made and from what, how well it does, its licences.

It is made from the run's own files, so that it says no more than is known: scores come from evaluate.py later.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pocl.common.files import read_json, write_text
from pocl.training.run_folder import RunFolder

_SCORES = "## Scores"
_METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match"}
_PATHS = ("model", "teacher", "data_dir", "difficulty_file", "deepspeed_config")
_OF_THE_MACHINE = ("teacher_cache",)  # where something lay that changes nothing


def write_card(run: RunFolder, folder: Path | None = None, *, model: str | None = None) -> None:
    """Write README.md into a saved student's folder (default: the run's best/).

    ``model`` is the fingerprint of its weights: the scores of eval/summary.json that belong to it are told then.
    Nothing is written for a run without config.json, which a library's user may not have started.
    """
    if run.config.is_file():
        write_text((folder or run.best) / "README.md", make_card(run, model))


def has_scores(folder: Path) -> bool:
    """Whether the card in a student's folder tells scores of evaluation sets."""
    path = folder / "README.md"
    return path.is_file() and _SCORES in path.read_text(encoding="utf-8").splitlines()


def make_card(run: RunFolder, model: str | None = None) -> str:
    """The text of the card, with its front matter."""
    config = read_json(run.config)
    options = config["options"]
    student, teacher = options["models"]["model"], options["models"]["teacher"]
    scores = _scores(run, model) if model else {}
    return "\n".join(
        [
            f"---\n{_front_matter(options, scores)}\n---\n",
            f"# {_shown(student)}, {_how(options)}\n",
            *_method(options, _read(run.path / "stages.json", [])),
            *_use(),
            *_score_lines(run, options["run"].get("select_by", "rouge_l").rpartition(":")[2], scores),
            *_ledger(_read(run.path / "ledger.json", {})),
            *_again(options),
            "## Licences\n",
            *_table(["", "model", "licence"], _licences(student, teacher)),
            "Its weights come from the first, what it was taught from the second; its data has terms of its own.\n",
            *_origin(config),
        ]
    )


def _front_matter(options: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    models, name = options["models"], options["run"].get("run_name") or "student"
    results = [
        EvalResult("text-generation", set_name, _shown(set_name), metric, round(found[metric]["mean"], 2))
        for set_name, found in scores.items()
        for metric in _METRICS
    ]
    base = models["model"] if _on_hub(models["model"]) else (_card_data(models["model"]) or {}).get("base_model")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        license=licence_of(models["model"]),
        tags=["pocl", "knowledge-distillation", "curriculum-learning", options["loss"]["type"]],
        model_name=name if results else None,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text


def _how(options: Mapping[str, Any]) -> str:
    teacher = options["models"]["teacher"]
    return f"distilled from {_shown(teacher)}" if teacher else "fine-tuned"


def _method(options: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    loss, curriculum = options["loss"], options["curriculum"]
    what = f"`--type {loss['type']}` on `{_shown(options['data']['data_dir'])}`"
    many = curriculum["num_stages"] > 1
    how = f"the curriculum `{curriculum['curriculum']}` in {curriculum['num_stages']} stages" if many else "one stage"
    ranked = f", ranked by {' and '.join(curriculum['difficulty'])}" if many else ""
    yield f"Trained with POCL ([arXiv 2506.05695](https://arxiv.org/abs/2506.05695)): {what}, {how}{ranked}.\n"
    rows = [
        [stage["index"] + 1, "{}–{}".format(stage["pool"][0] + 1, stage["pool"][1]), stage["epochs"]]
        + [f"{stage['temperature']:.2f}", f"{stage['kd_ratio']:.2f}"]
        for stage in stages
    ]
    yield from _table(["stage", "examples, easy to hard", "epochs", "temperature", "KD ratio"], rows)


def _use() -> Iterable[str]:
    yield "## Use\n"
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield 'tokenizer, model = (kind.from_pretrained("FOLDER") for kind in (AutoTokenizer, AutoModelForCausalLM))'
    yield "```\n"
    yield "Give it its prompts in the template that its training data was processed with (`prompt_template.json`).\n"


def _scores(run: RunFolder, model: str) -> dict[str, Any]:
    """What evaluate.py found of these weights, by set."""
    found = _read(run.path / "eval" / "summary.json", {})
    return {name: scores for name, scores in found.items() if scores.get("model") == model}


def _score_lines(run: RunFolder, chosen_by: str, scores: Mapping[str, Any]) -> Iterable[str]:
    metrics = run.read_metrics() if run.metrics.is_file() else []
    dev = [record[f"dev_{chosen_by}"] for record in metrics if f"dev_{chosen_by}" in record]
    if dev:
        name = _METRICS.get(chosen_by, chosen_by)
        yield f"The best {name} on its dev split, by which it was chosen: {max(dev):.2f}.\n"
    if not scores:
        return
    yield _SCORES + "\n"
    rows = [
        [name, found["examples"], *(_interval(found[metric]) for metric in _METRICS), len(found["rouge_l"]["seeds"])]
        for name, found in scores.items()
    ]
    yield from _table(["set", "prompts", *_METRICS.values(), "seeds"], rows)
    yield "In brackets the 95 % interval of the mean over seeds (Student's t), where there are several.\n"


def _interval(scores: Mapping[str, Any]) -> str:
    from scipy import stats

    mean, seeds = scores["mean"], len(scores["seeds"])
    if seeds < 2:
        return f"{mean:.2f}"
    half = float(stats.t.ppf(0.975, seeds - 1)) * scores["std"] / seeds**0.5
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"


def _ledger(ledger: Mapping[str, Any]) -> Iterable[str]:
    yield "## What it has seen\n"
    rows = [[name.replace("_", " "), value] for name, value in ledger.items() if name != "finished"]
    yield from _table(["", ""], rows)
    if not ledger.get("finished"):
        yield "Its run had not ended when this was written.\n"


def _again(options: Mapping[str, Any]) -> Iterable[str]:
    yield "## Again\n"
    yield "With the options below as run.yaml, and paths of your own:\n"
    yield "```bash\npython train.py --config run.yaml --output-dir results\n```\n"
    shown = {
        group: {
            name: _shown(value) if name in _PATHS and isinstance(value, str) else value
            for name, value in values.items()
            if value is not None and name not in _OF_THE_MACHINE
        }
        for group, values in options.items()
    }
    text = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
    yield f"```yaml\n{text}```\n"


def _licences(student: str, teacher: str | None) -> list[list[str]]:
    models = {"student": student} | ({"teacher": teacher} if teacher else {})
    unknown = "not stated where it lies"
    return [[role, _shown(path), licence_of(path) or unknown] for role, path in models.items()]


def licence_of(path: str) -> str | None:
    """The licence that a model's own card states: in its folder, or as the hub's cache has it; None if it does not."""
    licence = (_card_data(path) or {}).get("license")
    return licence if isinstance(licence, str) else None


def _card_data(path: str) -> dict[str, Any] | None:
    """The front matter of a model's card; None without one."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        found: Any = Path(path) / "README.md"
    else:
        found = try_to_load_from_cache(path, "README.md") if _on_hub(path) else None
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    parts = Path(found).read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    return data if isinstance(data, dict) else None


def _on_hub(path: str) -> bool:
    return not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _shown(path: str) -> str:
    """A path without the folders of the machine that it is on."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _origin(config: Mapping[str, Any]) -> Iterable[str]:
    yield "## Made with\n"
    versions = ", ".join(f"{name} {value}" for name, value in config["versions"].items() if value)
    yield f"Commit {config['git_commit'] or 'unknown'}; {versions}; {config['world_size']} rank(s).\n"
    yield from _table(["fingerprint of", ""], [[name, value[:16]] for name, value in config["fingerprints"].items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterable[str]:
    if rows:
        lines = [columns, ["---"] * len(columns), *rows]
        yield "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.is_file() else otherwise
