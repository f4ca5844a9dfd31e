"""Who answers an evaluation set, and by which protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pocl.common.console import say
from pocl.common.files import value_sha256
from pocl.data.prompts import encode_text
from pocl.evaluation.answers import Record, evaluate
from pocl.evaluation.sets import Example, TestSet, say_what_is_banned, tokenise_prompts
from pocl.evaluation.words import RougeTokenizer
from pocl.generation.decoding import Generator
from pocl.generation.sampling import Sampling
from pocl.models.identity import check_ids


@dataclass(frozen=True)
class EvalProtocol:
    """One way to answer: where its results go, how tokens are chosen, and under which seeds."""

    folder: Path
    sampling: Sampling
    seeds: tuple[int, ...]
    title: str = ""  # behind the set and the seed, where progress is shown
    rouge_tokenizer: RougeTokenizer = "rouge"


@dataclass(frozen=True)
class Answerer:
    """A model that answers, and what of the command is kept beside its answers.

    ``asked`` has at least ``model`` (a path), ``dtype`` and ``max_prompt_length``.
    """

    generator: Generator
    tokenizer: PreTrainedTokenizerBase
    fingerprints: Mapping[str, str]  # of the weights ("model") and of the tokenizer
    asked: Mapping[str, Any]
    template: str = "alpaca"  # of the prompts, as it is shown

    def say_what_is_banned(self, test_set: TestSet, protocol: EvalProtocol) -> None:
        """Say how many references the protocol's ban of repeated n-grams makes impossible."""
        pairs = list(zip(test_set.examples, test_set.prompts, strict=True))
        prompts = [prompt for example, prompt in pairs for _ in example.references]
        references = [encode_text(self.tokenizer, text) for example, _ in pairs for text in example.references]
        say_what_is_banned(test_set.name + protocol.title, prompts, references, protocol.sampling.no_repeat_ngram)

    def answer(self, test_set: TestSet, protocol: EvalProtocol, seed: int) -> list[Record]:
        """A scored record of each example, on every rank."""
        return evaluate(
            self.generator,
            self.tokenizer,
            test_set.examples,
            test_set.prompts,
            sampling=replace(protocol.sampling, seed=seed),
            title=f"{test_set.name}, seed {seed}{protocol.title}",
            rouge_tokenizer=protocol.rouge_tokenizer,
        )

    def origin(self, test_set: TestSet, protocol: EvalProtocol) -> dict[str, Any]:
        """What answers come from, beside the seed: where two are equal but for what was asked, so are the answers."""
        sampling = {key: value for key, value in asdict(protocol.sampling).items() if key != "seed"}
        limits = {"generator": self.generator.name, "max_prompt_length": self.asked["max_prompt_length"]}
        limits |= {"rouge_tokenizer": protocol.rouge_tokenizer, "template": self.template}
        return {
            "examples": len(test_set.examples),
            "cut_prompts": test_set.num_cut,
            "protocol": sampling | limits,
            **self.fingerprints,
            "dtype": self.asked["dtype"],
            "set": value_sha256([[example.prompt, *example.references] for example in test_set.examples]),
            "asked": dict(self.asked),
        }


def read_set(
    name: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, model: str
) -> TestSet:
    """A set with its prompts as tokens; says how many are cut.

    Raises UserError where a prompt has a token for which the ``model``, a path, has no vocabulary entry.
    """
    prompts, num_cut = tokenise_prompts(tokenizer, examples, max_prompt_length)
    check_ids(max(map(max, prompts), default=0), f"a prompt of {name}", model)
    if num_cut:
        say(f"{name}: {num_cut} of {len(prompts)} prompts lost their beginning to `max_prompt_length`")
    return TestSet(name, examples, prompts, num_cut)
