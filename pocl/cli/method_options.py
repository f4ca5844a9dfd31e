"""The options of train.py that say what is learnt, and when: the objective, the curriculum, on-policy text."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pocl.cli.flags import flag
from pocl.common.errors import UserError
from pocl.curriculum.stages import CURRICULA
from pocl.difficulty.ranking import SIGNALS, ensure_signals, sources_of
from pocl.losses.divergences import LOSSES, loss_type


def _names(*, tempered: bool) -> str:
    return " ".join(name for name, loss in LOSSES.items() if loss.tempered == tempered)


@dataclass(frozen=True)
class LossOptions:
    """The objective: (1 - r) * cross-entropy + r * T^k * divergence."""

    _argument_group_name: ClassVar[str] = "objective"
    type: str = flag(
        f"sft, a divergence ({_names(tempered=False)}) or its tempered form ({_names(tempered=True)})", "tfkl"
    )
    type_of_stage: list[str] | None = flag(
        "a divergence for each stage, such as tfkl tfkl trkl trkl [default: --type in all]",
        None,
    )
    temperature: list[float] | None = flag(
        "T of the tempered types: one value, first and last, or one per stage [default: 1 2; one stage: 1]",
        None,
        above=0,
    )
    kd_ratio: list[float] | None = flag(
        "r: one value, first and last, or one per stage [0 to 1; default: 0.7 1; one stage: 1]",
        None,
        at_least=0,
        at_most=1,
    )
    loss_scaling: Literal["uniform", "published"] = flag(
        "k of T^k. uniform: 2, and 1 for total variation; published: 2 for tfkl, tjsd, tsrkl and 0 for the rest",
        "uniform",
    )
    selective_reliance: Literal["off", "hard", "linear"] = flag(
        "KD ratio by difficulty. hard: r at or above the threshold and 0 below; linear: r times the percentile", "off"
    )
    reliance_threshold: float = flag(
        "difficulty percentile of --selective-reliance hard [0 to 1]", 0.5, at_least=0, at_most=1
    )
    weighting: Literal["off", "paced"] = flag(
        "weigh examples. paced: by p(1 - p), p the pass rate that --difficulty pass-rate measures (arXiv 2603.11178)",
        "off",
    )
    skew: float = flag("weight of the teacher (sfkl) or the student (srkl) in the mixture [0 to 1]", 0.1)
    teacher_weight: float = flag("weight of the teacher in the mixture of jsd [0 to 1]", 0.1)
    chunk_tokens: int | None = flag(
        "response tokens whose logits are held at a time [tokens; default: by vocabulary and memory]", None, above=0
    )
    fused_objective: Literal["auto", "on", "off"] = flag(
        "cross-entropy, divergence and gradient of a token in one kernel (Triton). auto: on a GPU, if a trial run "
        "gives the same as torch's operations",
        "auto",
    )

    def check(self) -> None:
        """Raise UserError for an unknown type, and for parameters that it does not have or outside its range."""
        loss = loss_type(self.type)
        if loss is not None:
            loss.bind(**vars(self))
        elif self.selective_reliance != "off":
            raise UserError(f"--type {self.type} has no teacher to rely on; drop --selective-reliance")
        elif self.weighting != "off":
            raise UserError(
                f"--weighting {self.weighting} weighs a teacher's lessons, and --type {self.type} has none"
            )
        for name in self.type_of_stage or ():
            other = loss_type(name)
            if loss is None or other is None or other.tempered != loss.tempered:
                raise UserError(
                    f"--type-of-stage {name} beside --type {self.type}: both want a teacher and a temperature, or "
                    "neither does; give names of one kind"
                )


@dataclass(frozen=True)
class CurriculumOptions:
    """Which examples are trained on, and when."""

    _argument_group_name: ClassVar[str] = "curriculum"
    curriculum: str = flag(f"which pool at which stage: {', '.join(CURRICULA)}", "baby-step", known=CURRICULA)
    num_stages: int = flag("stages; 1 is plain distillation without a curriculum", 4, above=0)
    epochs: int = flag("epochs over the pool in each stage; with --advance converged, at most this many", 8, above=0)
    keep_share: float = flag(
        "keep this share of the ranking, the easiest, and schedule it alone, in the manner of SRD (arXiv 2508.06135) "
        "[above 0, to 1]",
        1.0,
        above=0,
        at_most=1,
    )
    max_steps: int | None = flag(
        "take N optimiser steps, shared out among the stages as their epochs would be, which it replaces [steps; "
        "default: all epochs]",
        None,
        above=0,
    )
    advance: Literal["interval", "converged"] = flag(
        "when a stage ends. interval: after its epochs; converged: once dev ROUGE-L has not risen for --patience "
        "evaluations",
        "interval",
    )
    patience: int = flag("dev evaluations without a rise that end a stage with --advance converged", 2, above=0)
    restart_optimizer: bool = flag("fresh optimiser state and fresh cosine at each stage", True)
    difficulty: list[str] = flag(
        f"signals that rank the examples, fused if several are named: {', '.join(SIGNALS)}, any of --metrics, or "
        "MODULE:FUNCTION of yours, a score of the student's answer",
        ["student"],
    )
    pass_samples: int = flag("answers that are sampled for --difficulty pass-rate [answers]", 4, above=0)
    rerank: Literal["off", "stage", "epoch"] | None = flag(
        "rank again before each stage or epoch [default: stage with --difficulty snapshot, else off]", None
    )
    difficulty_file: str | None = flag(
        "take the first ranking from another run's difficulty.jsonl [default: rank now]", None
    )

    def check(self) -> None:
        """Raise UserError for an unknown signal, and if losses of training are to rank and never may."""
        try:
            ensure_signals(self.difficulty)
        except UserError as error:
            raise UserError(f"--difficulty: {error}") from error
        if "training" in sources_of(self.difficulty) and self.rerank == "off":
            raise UserError(
                "--difficulty snapshot ranks by training losses; drop --rerank off, or give --rerank stage or epoch"
            )
        if self.keep_share < 1:
            if CURRICULA[self.curriculum].order != "ranked":
                raise UserError(
                    f"--keep-share keeps the easiest examples, and --curriculum {self.curriculum} has no order"
                )
            if sources_of(self.difficulty) == {"training"}:
                raise UserError(
                    "--keep-share selects before the first step, when --difficulty snapshot knows nothing yet"
                )
        again = self.rerank not in (None, "off") or "training" in sources_of(self.difficulty)
        if again and CURRICULA[self.curriculum].shuffled_visits:
            raise UserError(
                f"--curriculum {self.curriculum} shuffles all visits before the first step; it cannot rank again: "
                "drop --rerank, and --difficulty snapshot"
            )


@dataclass(frozen=True)
class OnPolicyOptions:
    """Training on text that the student writes while it trains."""

    _argument_group_name: ClassVar[str] = "on-policy"
    on_policy: Literal["off", "mixed", "adaptive"] = flag(
        "train on the student's own samples. mixed: with a fixed probability (GKD); adaptive: with one that rises "
        "when the dev loss does (DistiLLM)",
        "off",
    )
    mixed_alpha: float = flag(
        "mixed: probability that the student samples an example's response [0 to 1]", 0.5, at_least=0, at_most=1
    )
    replay_buffer: int = flag("samples that are kept to train on again; 0: none [examples]", 0, at_least=0)
    on_policy_cross_entropy: bool = flag("apply the cross-entropy term to the student's text as well", False)
