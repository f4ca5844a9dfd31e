# shellcheck shell=bash disable=SC2034
# OPT, 2.7B -> 0.3B: the models and the paper's settings. common.sh sources it; $CHECKPOINTS and $RESULTS are
# checkpoints/opt and results/opt. STUDENT=... TEACHER=... bash scripts/opt/... takes other models.
STUDENT="${STUDENT:-$CHECKPOINTS/350m}"
TOKENIZER="${TOKENIZER:-$STUDENT}"

# The teacher is fine-tuned on the same data: scripts/opt/sft/teacher.sh makes it from TEACHER_BASE.
TEACHER="${TEACHER:-$RESULTS/teacher/sft/seed10/best}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/2.7b}"

# Batches are over all ranks. What is not said here (batch 64, lr 1e-4, 8 epochs a stage) is train.py's default.
SFT_STUDENT=(--global-batch-size 128 --lr 5e-5 --epochs 20)
SFT_TEACHER=(--global-batch-size 16 --lr 5e-5 --epochs 10)
KD=(--global-batch-size 32 --lr 5e-5 --epochs 20)
KD_MATCHED=(--epochs 20)
POCL=(--loss-scaling published)
MEMORY=(--gradient-checkpointing) # flags that change memory and speed, not the result
