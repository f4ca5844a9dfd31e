"""The arms of the testbed as data: a name and flags of train.py, behind those that all arms of a regime share."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pocl.common.errors import UserError, closest

UPDATES = 400  # of every arm, shared out among its stages
BASELINE = "KLD"


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    flags: tuple[str, ...]
    recipe: str | None = None  # of train.py, which says the same in one flag

    @property
    def text(self) -> str:
        """Its flags, and the recipe that they are."""
        return " ".join(self.flags) + (f" (--recipe {self.recipe})" if self.recipe else "")

    @property
    def has_teacher(self) -> bool:
        """Whether it distils."""
        return "sft" not in self.flags


def _arm(name: str, flags: str, recipe: str | None = None) -> Arm:
    return Arm(name, tuple(shlex.split(flags)), recipe)


_WHOLE = "--curriculum whole-pool --num-stages 1 "
_STAGES = "--curriculum whole-pool --num-stages 4 "
_EASY, _RANDOM, _HARD, _SHUFFLED = (
    f"--curriculum {name} --num-stages 4 " for name in ("baby-step", "random", "hard-to-easy", "exposure-matched")
)
_RAMP_T, _RAMP_R = "--temperature 1 1.33 1.67 2 ", "--kd-ratio 0.7 0.8 0.9 1.0 "
_T1, _R07, _ONE_COSINE = "--temperature 1 ", "--kd-ratio 0.7 ", "--restart-optimizer false "
_TO_REVERSE = "--type-of-stage tfkl tfkl trkl trkl"
_POCL = _EASY + _RAMP_T + _RAMP_R

ARMS = tuple(
    _arm(*row)
    for row in (
        ("KLD", _WHOLE + _T1 + _R07),
        ("SFT", "--type sft " + _WHOLE),
        ("KLD, r = 1", _WHOLE + _T1 + "--kd-ratio 1"),
        ("KLD, T = 2", _WHOLE + "--temperature 2 " + _R07),
        ("KLD, constant rate", _WHOLE + _T1 + _R07 + "--lr-schedule constant"),
        ("POCL as published", _POCL, "paper"),
        ("POCL, random pools", _RANDOM + _RAMP_T + _RAMP_R),
        ("POCL, hard to easy", _HARD + _RAMP_T + _RAMP_R),
        ("POCL, same visits shuffled", _SHUFFLED + _RAMP_T + _RAMP_R),
        ("POCL, T = 1", _EASY + _T1 + _RAMP_R),
        ("POCL, T = 1.5", _EASY + "--temperature 1.5 " + _RAMP_R),
        ("POCL, T = 2", _EASY + "--temperature 2 " + _RAMP_R),
        ("POCL, T falling 2 to 1", _EASY + "--temperature 2 1.67 1.33 1 " + _RAMP_R),
        ("POCL, r = 0.7", _EASY + _RAMP_T + _R07),
        ("POCL, r = 1", _EASY + _RAMP_T + "--kd-ratio 1"),
        ("POCL, one cosine", _POCL + _ONE_COSINE),
        ("POCL, T = 1, one cosine", _EASY + _T1 + _RAMP_R + _ONE_COSINE),
        ("whole pool, restarts", _STAGES + _T1 + _R07),
        ("whole pool, T ramp, restarts", _STAGES + _RAMP_T + _R07),
        ("whole pool, both ramps, restarts", _STAGES + _RAMP_T + _RAMP_R),
        ("whole pool, both ramps, one cosine", _STAGES + _RAMP_T + _RAMP_R + _ONE_COSINE),
        ("pools, easy first, one cosine", _EASY + _T1 + _R07 + _ONE_COSINE, "steady"),
        ("pools, random, one cosine", _RANDOM + _T1 + _R07 + _ONE_COSINE),
        ("pools, hard first, one cosine", _HARD + _T1 + _R07 + _ONE_COSINE),
        ("same visits shuffled, one cosine", _SHUFFLED + _T1 + _R07 + _ONE_COSINE),
        ("pools, easy first, constant rate", _EASY + _T1 + _R07 + _ONE_COSINE + "--lr-schedule constant"),
        ("KLD, PACED weights", _WHOLE + _T1 + _R07 + "--difficulty pass-rate --weighting paced"),
        ("KLD, forward then reverse", _STAGES + _T1 + _R07 + _ONE_COSINE + _TO_REVERSE),
        ("pools, forward then reverse, one cosine", _EASY + _T1 + _R07 + _ONE_COSINE + _TO_REVERSE),
        ("pools of the easiest three quarters, one cosine", _EASY + _T1 + _R07 + _ONE_COSINE + "--keep-share 0.75"),
    )
)
QUICK = ("KLD", "SFT", "POCL as published", "pools, easy first, one cosine")


def own_arm(text: str) -> Arm:
    """An arm from ``NAME: FLAGS``.  Raises UserError for another form."""
    name, mark, flags = text.partition(":")
    try:
        words = tuple(shlex.split(flags))
    except ValueError as error:
        raise UserError(f"`arm` {text!r}: {error}") from error
    if not mark or not name.strip() or not words:
        raise UserError(f'`arm` is {text!r}; it wants a name and flags of train.py, as "mine: --curriculum random"')
    if any(arm.name == name.strip() for arm in ARMS):
        raise UserError(f"`arm` {name.strip()!r} is the name of an arm of the testbed; give another")
    return Arm(name.strip(), words)


def choose_arms(names: Sequence[str] | None, own: Sequence[str], *, quick: bool) -> list[Arm]:
    """The arms of these names (None: all, or the quick ones), the baseline always among them, and one's own.

    Raises UserError for an unknown name.
    """
    known = {arm.name: arm for arm in ARMS}
    for name in names or ():
        if name not in known:
            raise UserError(f"`arms`: no arm {name!r}{closest(name, known)} (known: {'; '.join(known)})")
    chosen = set(names or (QUICK if quick else known)) | {BASELINE}
    return [arm for arm in ARMS if arm.name in chosen] + [own_arm(text) for text in own]
