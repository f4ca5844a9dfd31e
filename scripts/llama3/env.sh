# shellcheck shell=bash disable=SC2034
# Llama 3.2, 3B -> 1B, in its own chat template. Not in the paper: the settings are this project's own, those of Qwen2;
# scripts/methods.sh says what is what.
STUDENT="${STUDENT:-$CHECKPOINTS/1b}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/3b}"

SFT_STUDENT=(--lr 5e-5 --epochs 10)
SFT_TEACHER=(--lr 2e-5 --epochs 5)
KD=(--global-batch-size 32 --lr 5e-5 --epochs 20)
KD_MATCHED=(--lr 5e-5 --epochs 20)
POCL=(--lr 5e-5)
MEMORY=(--gradient-checkpointing)
