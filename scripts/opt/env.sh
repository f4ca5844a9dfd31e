# shellcheck shell=bash disable=SC2034
# OPT, 2.7B -> 0.3B: the models and the paper's settings; scripts/methods.sh says what is what.
STUDENT="${STUDENT:-$CHECKPOINTS/350m}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/2.7b}"

SFT_STUDENT=(--global-batch-size 128 --lr 5e-5 --epochs 20)
SFT_TEACHER=(--global-batch-size 16 --lr 5e-5 --epochs 10)
KD=(--global-batch-size 32 --lr 5e-5 --epochs 20)
POCL=(--loss-scaling published)
MEMORY=(--gradient-checkpointing)
TEMPLATE=(--template alpaca) # the paper's
