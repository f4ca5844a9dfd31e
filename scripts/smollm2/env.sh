# shellcheck shell=bash disable=SC2034
# SmolLM2, 360M -> 135M (or 1.7B: TEACHER_BASE, then TEACHER). Not in the paper: the settings are this project's own,
# POCL's as for GPT-2 with the uniform power of T; scripts/methods.sh says what is what.
STUDENT="${STUDENT:-$CHECKPOINTS/135m}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/360m}"

SFT_STUDENT=(--global-batch-size 32 --lr 1e-4 --epochs 10)
SFT_TEACHER=(--global-batch-size 32 --lr 5e-5 --epochs 5)
KD=(--global-batch-size 32 --lr 1e-4 --epochs 20)
SCALE="${SCALE:-hour}" # of reproduce.sh, for one GPU; --scale full takes all data and seeds
