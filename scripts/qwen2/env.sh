# shellcheck shell=bash disable=SC2034
# Qwen2, 1.5B -> 0.5B. Not in the paper: the settings are this project's own, POCL's as for GPT-2 with half the
# learning rate and the uniform power of T. common.sh sources it; $CHECKPOINTS and $RESULTS are checkpoints/qwen2 and
# results/qwen2. STUDENT=... TEACHER=... bash scripts/qwen2/... takes other models.
STUDENT="${STUDENT:-$CHECKPOINTS/0.5b}"
TOKENIZER="${TOKENIZER:-$STUDENT}"

# The teacher is fine-tuned on the same data: scripts/qwen2/sft/teacher.sh makes it from TEACHER_BASE.
TEACHER="${TEACHER:-$RESULTS/teacher/sft/seed10/best}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/1.5b}"

# Batches are over all ranks. What is not said here (batch 64, lr 1e-4, 8 epochs a stage) is train.py's default.
SFT_STUDENT=(--lr 5e-5 --epochs 10)
SFT_TEACHER=(--lr 2e-5 --epochs 5)
KD=(--global-batch-size 32 --lr 5e-5 --epochs 20)
KD_MATCHED=(--lr 5e-5 --epochs 20)
POCL=(--lr 5e-5)
MEMORY=(--gradient-checkpointing) # flags that change memory and speed, not the result
