"""Recipes of train.py: a name for a set of method options, which lies under all others (``--recipe NAME``)."""

import shlex

_POOLS = "--curriculum baby-step --num-stages 4 --epochs 8 "

RECIPES = {
    name: tuple(shlex.split(flags))
    for name, flags in {
        # POCL, arXiv 2506.05695, with the values of its released scripts.
        "paper": _POOLS + "--temperature 1 1.33 1.67 2 --kd-ratio 0.7 0.8 0.9 1 --restart-optimizer true",
        # Its pools alone; docs/curricula.md says on what evidence.
        "steady": _POOLS + "--temperature 1 --kd-ratio 0.7 --restart-optimizer false",
    }.items()
}
