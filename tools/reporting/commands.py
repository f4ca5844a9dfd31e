"""What is needed to make a run again: its commands, the fingerprints of what it stood on, versions, every option."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.cli.evaluate_options import EvaluateOptions, GenerationOptions
from pocl.cli.flags import defaults
from pocl.cli.options import train_defaults
from pocl.common.errors import UserError
from pocl.common.files import file_sha256
from pocl.evaluation.sets import set_path
from tools.reporting.data import Entry
from tools.reporting.facts import Grid

# A key of the evaluation's protocol -> the flag that sets it.
PROTOCOL = {
    "temperature": "sampling_temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "no_repeat_ngram": "no_repeat_ngram",
    "rouge_tokenizer": "rouge_tokenizer",
}


def flags(values: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """The flags that give these values, without those that are the default; the words of a flag are one string."""
    written = []
    for name, value in values.items():
        if value is None or (name in usual and usual[name] == value):
            continue
        words = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        written.append(" ".join([f"--{name.replace('_', '-')}", *(shlex.quote(str(word)) for word in words)]))
    return written


def command(program: str, written: Sequence[str]) -> str:
    """A command over several lines, as it can be pasted."""
    return " \\\n    ".join([program, *written])


def train_command(entry: Entry) -> str | None:
    """train.py with every option that is not the default; None where there is no config.json."""
    options = entry.config.get("options")
    if not options:
        return None
    usual, path = train_defaults(), entry.folder
    written = [line for group, values in options.items() for line in flags(values, usual.get(group, {}))]
    # A run is OUTPUT_DIR/TYPE/NAME; a folder that was moved does not say what OUTPUT_DIR was.
    output_dir = path.parent.parent if path.parent.name == options["loss"]["type"] else Path("results/again")
    ranks, on_cpu = entry.config["world_size"], str(entry.config.get("versions", {}).get("torch")).endswith("+cpu")
    place = f"--num_accelerators {ranks}" if on_cpu else f"--num_gpus {ranks}"
    launcher = f"{'DS_ACCELERATOR=cpu ' if on_cpu else ''}deepspeed {place} --no_local_rank train.py"
    return command(launcher, [*written, f"--output-dir {shlex.quote(str(output_dir))}"])


def data_command(entry: Entry) -> str | None:
    """tools/process_data.py as the manifest says; None where the processed data is not there."""
    made = entry.manifest
    if not made:
        return None
    if "responses_of" in made:
        return _seqkd_command(entry, made)
    given = {"raw": made["raw"], "tokenizer": made["tokenizer"], "output_dir": entry.option("data", "data_dir")}
    template = made.get("template", {})
    if template.get("name", "alpaca") != "alpaca":  # what is not said there is the usual
        given |= {name: template.get(name) for name in ("system", "thinking") if template.get(name)}
        given |= {"template": template["name"], "turns": made.get("turns")}
    given |= {"columns": made.get("columns")}
    limits = {"num_dev": made["num_dev"], "max_prompt_length": made["max_prompt_length"]}
    return command("python tools/process_data.py", flags(given | limits, {}))


def _seqkd_command(entry: Entry, made: Mapping[str, Any]) -> str:
    """tools/generate_seqkd.py; the manifest names neither the teacher's folder nor that of the prompts."""
    key = made["responses_of"]
    sampling = {PROTOCOL.get(name, name): value for name, value in key["sampling"].items()}
    longest = sampling.pop("max_new_tokens") + made["max_prompt_length"]
    backend = "vllm" if str(key.get("generator")).startswith("vllm") else "builtin"
    given = {"output_dir": entry.option("data", "data_dir"), "max_length": longest, "dtype": key["dtype"]}
    given |= {"num_train": key["examples"], "generation_backend": backend}
    places = ["--model TEACHER", "--data-dir DATA"]
    return command("deepspeed --no_local_rank tools/generate_seqkd.py", [*places, *flags(given | sampling, {})])


def evaluate_commands(entry: Entry, data_root: Path = Path("data")) -> list[str]:
    """evaluate.py, once for all sets that were evaluated alike."""
    alike: dict[str, tuple[list[str], list[str]]] = {}
    for name, summary in entry.summary.items():
        written = _evaluate_flags(entry, summary, data_root)
        if written is not None:
            alike.setdefault(" ".join(written), (written, []))[1].append(shlex.quote(name))
    return [
        command("deepspeed --no_local_rank evaluate.py", [written[0], f"--sets {' '.join(sets)}", *written[1:]])
        for written, sets in alike.values()
    ]


def _evaluate_flags(entry: Entry, summary: Mapping[str, Any], data_root: Path) -> list[str] | None:
    protocol = summary.get("protocol")
    if protocol is None:  # answers that were made elsewhere
        return None
    asked = dict(summary.get("asked") or {})
    model = asked.pop("model", None) or (str(entry.run.best) if entry.run else None)
    seeds = [int(seed) for seed in summary["rouge_l"]["seeds"]]
    sampling = {flag: protocol[key] for key, flag in PROTOCOL.items() if key in protocol}
    sampling["data_root"] = str(data_root)
    if "generator" in protocol:
        sampling["generation_backend"] = "vllm" if protocol["generator"].startswith("vllm") else "builtin"
    usual = defaults(EvaluateOptions) | defaults(GenerationOptions)
    output_dir = entry.evaluation if entry.run is None or entry.evaluation != entry.run.path / "eval" else None
    return [
        f"--model {shlex.quote(str(model or 'MODEL'))}",
        *flags({"seeds": seeds}, {}),
        *flags(asked | sampling, usual),
        *flags({"output_dir": output_dir}, {}),
    ]


def lines(entry: Entry, data_root: Path) -> dict[str, str]:
    """The commands that make one row again, by what they make."""
    found = {f"{name}, as tools/reproduce.py called it": line for name, line in entry.commands.items()}
    made = {"The data": data_command(entry), "Training": train_command(entry)}
    for i, line in enumerate(evaluate_commands(entry, data_root), start=1):
        made["Evaluation" if i == 1 else f"Evaluation {i}"] = line
    return found | {name: line for name, line in made.items() if line}


def fingerprints(entry: Entry, data_root: Path) -> dict[str, str | None]:
    """What the run stood on: name -> a value that changes when it does."""
    config = entry.config
    found: dict[str, str | None] = {"git commit": config.get("git_commit")} if config else {}
    found |= {f"fingerprint of the {name}": value for name, value in config.get("fingerprints", {}).items()}
    if entry.manifest:
        found["raw data, SHA-256"] = entry.manifest.get("raw_sha256")
        found["tokenizer"] = entry.manifest.get("tokenizer_fingerprint")
        found["prompt templates, SHA-256"] = entry.manifest.get("prompt_templates_sha256")
    for name in entry.summary:
        try:
            found[f"set {name} as it is now, SHA-256"] = file_sha256(set_path(data_root, name))
        except UserError:
            found[f"set {name}"] = f"not under {data_root} now"
    if config:
        found["ranks"] = str(config["world_size"])
        versions = [f"{name} {version}" for name, version in config.get("versions", {}).items() if version]
        found["versions"] = ", ".join(versions)
    return found


def options(entry: Entry) -> Grid:
    """Every resolved option of a run, with the default where the value is another."""
    usual, rows = train_defaults(), []
    for group, values in entry.config["options"].items():
        for name, value in values.items():
            standard = usual.get(group, {}).get(name, "")
            default = "" if standard == value else _words(standard)
            rows.append([f"--{name.replace('_', '-')}", _words(value), default, group.replace("_", " ")])
    return Grid("options", ["option", "value", "default", "group"], rows, text_columns=4)


def _words(value: object) -> str:
    """A value of an option as it is written behind its flag."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
