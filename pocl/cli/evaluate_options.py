"""The options of evaluate.py: how answers are sampled, as in train.py, and what is evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pocl.cli.flags import flag
from pocl.common.errors import UserError
from pocl.evaluation.metrics import METRICS, SHOWN, metric_named
from pocl.evaluation.words import RougeTokenizer
from pocl.generation.sampling import Sampling
from pocl.generation.vllm_backend import Backend


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are sampled and scored; ranking and --sampling-temperature 0 are greedy."""

    _argument_group_name: ClassVar[str] = "generation"
    eval_batch_size: int | None = flag(
        "prompts that are answered together on one rank [examples; default: up to 64, on a GPU up to 1024, by memory]",
        None,
        above=0,
    )
    sampling_temperature: float = flag("sampling temperature in evaluation; 0 is greedy", 1.0, at_least=0)
    top_p: float = flag("nucleus sampling probability; 1 disables it", 1.0, above=0, at_most=1)
    top_k: int = flag("top-k sampling: most likely tokens kept; 0 keeps all [tokens]", 0, at_least=0)
    no_repeat_ngram: int = flag(
        "ban repeated n-grams over prompt and answer (paper: 6); 0 disables it [tokens]", 6, at_least=0
    )
    rouge_tokenizer: RougeTokenizer = flag(
        "what ROUGE takes for words. rouge: rouge-score's, of a to z and 0 to 9; unicode: of any script, by Unicode's "
        "rules, each character of Chinese, Japanese, Thai, Lao, Khmer and Myanmar one",
        "rouge",
    )
    generation_backend: Backend = flag(
        "what generates in the first ranking and in evaluate.py: builtin, vllm, or auto: vllm on a GPU if it is "
        "installed and loads the model, else builtin; a model in training (dev evaluation, on-policy text, later "
        "rankings) always uses builtin",
        "auto",
    )

    def sampling(self, max_new_tokens: int, *, seed: int = 10) -> Sampling:
        """How the tokens of an answer are chosen."""
        return Sampling(max_new_tokens, self.sampling_temperature, self.top_p, self.top_k, self.no_repeat_ngram, seed)


@dataclass(frozen=True)
class EvaluateOptions:
    """What evaluate.py evaluates."""

    _argument_group_name: ClassVar[str] = "evaluation"
    sets: list[str] = flag("evaluation sets: folders under --data-root with a valid.jsonl")
    model: str | None = flag("model folder or hub name whose answers are sampled", None)
    answers: str | None = flag("score this JSONL of answers (key: text) instead of a model's; one set", None)
    tokenizer: str | None = flag("tokenizer folder [default: the model's]", None)
    template: str | None = flag(
        "form of the prompts, for a model that does not say which it was trained with: alpaca, chat, plain or a Jinja "
        "file [default: that of --train-data; the tokenizer's chat template; alpaca]",
        None,
    )
    system: str | None = flag("system prompt of that template [default: none]", None)
    thinking: bool = flag("give that template enable_thinking", False)
    metrics: list[str] = flag(
        f"what the table shows: {', '.join(METRICS)}, or MODULE:FUNCTION, your own function of an answer and its "
        f"references [0 to 1]; all are kept in summary.json",
        list(SHOWN),
    )
    seeds: list[int] = flag("one sampled answer per prompt and seed", [10, 20, 30, 40, 50], at_least=0)
    data_root: str = flag("folder that holds the evaluation sets", "data")
    clean: bool = flag("also answer greedily without the n-gram ban; results in clean/ of the results folder", False)
    train_data: str | None = flag(
        "processed data that the model was trained on: prompts found in it are listed, and the scores without them "
        "reported",
        None,
    )
    output_dir: str | None = flag("results folder [default: eval/ beside a run's best/]", None)
    num_examples: int | None = flag("only the first N prompts of each set [examples; default: all]", None, above=0)
    max_length: int = flag("prompt limit and longest answer together [tokens]", 512, above=0)
    max_prompt_length: int = flag(
        "longer prompts are left-truncated; answers get max-length minus this [tokens]", 256, above=0
    )
    dtype: Literal["fp32", "bf16", "fp16"] = flag("precision of the model", "fp32")

    def check(self) -> None:
        """Raise UserError unless one thing is evaluated, with room for its answers, by metrics that there are."""
        for name in self.metrics:
            metric_named(name)
        if (self.model is None) == (self.answers is None):
            raise UserError("give either --model FOLDER or --answers FILE")
        if self.answers and len(self.sets) != 1:
            raise UserError(f"--answers belongs to one set, --sets names {len(self.sets)}")
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"--max-prompt-length {self.max_prompt_length} must leave room for an answer in --max-length "
                f"{self.max_length}"
            )

    def results_folder(self) -> Path:
        """Where the answers of a model go.  Raises UserError if the model's place does not say it."""
        if self.output_dir:
            return Path(self.output_dir)
        if self.model and Path(self.model).name == "best":
            return Path(self.model).parent / "eval"
        raise UserError(f"{self.model} is no run's best/ folder, so say where results go: --output-dir DIR")
