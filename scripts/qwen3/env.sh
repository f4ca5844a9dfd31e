# shellcheck shell=bash disable=SC2034
# Qwen3, 1.7B -> 0.6B, in its own chat template without thoughts. Not in the paper: settings are this project's own,
# those of Qwen2; scripts/methods.sh says what is what.
STUDENT="${STUDENT:-$CHECKPOINTS/0.6b}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/1.7b}"

SFT_STUDENT=(--lr 5e-5 --epochs 10)
SFT_TEACHER=(--lr 2e-5 --epochs 5)
KD=(--global-batch-size 32 --lr 5e-5 --epochs 20)
KD_MATCHED=(--lr 5e-5 --epochs 20)
POCL=(--lr 5e-5)
MEMORY=(--gradient-checkpointing)
