"""Who answers an evaluation set, and by which protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.files import value_sha256
from pocl.data.prompts import encode_text
from pocl.evaluation.answers import Record, evaluate
from pocl.evaluation.likelihood import cross_entropy_of_references
from pocl.evaluation.sets import Example, TestSet, say_what_is_banned, tokenise_prompts
from pocl.evaluation.words import RougeTokenizer
from pocl.generation.decoding import Generator
from pocl.generation.sampling import Sampling
from pocl.losses.chunked import automatic_chunk_tokens
from pocl.models.identity import check_ids
from pocl.models.student import Student


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
    student: Student
    device: torch.device  # of this rank; the student may still be elsewhere
    fingerprints: Mapping[str, str]  # of the weights ("model") and of the tokenizer
    asked: Mapping[str, Any]
    template: str = "alpaca"  # of the prompts, as it is shown

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.student.tokenizer

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

    def cross_entropy(self, test_set: TestSet, max_length: int) -> float | None:
        """Mean cross-entropy per token of the first references, in nats, on every rank.

        None, which is said, where the template or the model has no tokens for one of them. What answers must have left
        the device.
        """
        references, num_logits = [example.reference_ids for example in test_set.examples], self.student.head.num_logits
        written = [ids for ids in references if ids is not None and max(ids) < num_logits]
        if len(written) < len(references):
            missing = len(references) - len(written)
            say(f"{test_set.name}: no cross-entropy: {missing} reference(s) cannot be written as the model reads")
            return None
        self.student.model.to(self.device)
        memory = distributed.device_memory(self.device)
        chunk_tokens = automatic_chunk_tokens(num_logits, memory, self.device.type)
        return cross_entropy_of_references(
            self.student, test_set.prompts, written, max_length=max_length, chunk_tokens=chunk_tokens
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
