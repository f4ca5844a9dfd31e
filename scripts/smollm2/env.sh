# shellcheck shell=bash disable=SC2034
# SmolLM2, 360M -> 135M (or 1.7B: TEACHER_BASE, then TEACHER). Not in the paper: the settings are this project's own,
# POCL's as for GPT-2 with the uniform power of T. common.sh sources it; $CHECKPOINTS and $RESULTS are
# checkpoints/smollm2 and results/smollm2. STUDENT=... TEACHER=... bash scripts/smollm2/... takes other models.
STUDENT="${STUDENT:-$CHECKPOINTS/135m}"
TOKENIZER="${TOKENIZER:-$STUDENT}"

# The teacher is fine-tuned on the same data: scripts/smollm2/sft/teacher.sh makes it from TEACHER_BASE.
TEACHER="${TEACHER:-$RESULTS/teacher/sft/seed10/best}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/360m}"

# Batches are over all ranks. What is not said here (batch 64, lr 1e-4, 8 epochs a stage) is train.py's default.
SFT_STUDENT=(--global-batch-size 32 --lr 1e-4 --epochs 10)
SFT_TEACHER=(--global-batch-size 32 --lr 5e-5 --epochs 5)
KD=(--global-batch-size 32 --lr 1e-4 --epochs 20)
KD_MATCHED=(--epochs 20)
POCL=()
SCALE="${SCALE:-hour}" # of reproduce.sh, for one GPU; --scale full takes all data and seeds
MEMORY=() # flags that change memory and speed, not the result
