# shellcheck shell=bash disable=SC2034
# Qwen2, 1.5B -> 0.5B. Not in the paper: the settings are this project's own, POCL's as for GPT-2 with half the
# learning rate and the uniform power of T; scripts/methods.sh says what is what.
STUDENT="${STUDENT:-$CHECKPOINTS/0.5b}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/1.5b}"

SFT_STUDENT=(--lr 5e-5 --epochs 10)
SFT_TEACHER=(--lr 2e-5 --epochs 5)
KD=(--global-batch-size 32 --lr 5e-5 --epochs 20)
KD_MATCHED=(--lr 5e-5 --epochs 20)
POCL=(--lr 5e-5)
MEMORY=(--gradient-checkpointing)
