# shellcheck shell=bash disable=SC2034
# GPT-2, 1.5B -> 0.1B: the models and the paper's settings. common.sh sources it; $CHECKPOINTS and $RESULTS are
# checkpoints/gpt2 and results/gpt2. STUDENT=... TEACHER=... bash scripts/gpt2/... takes other models.
STUDENT="${STUDENT:-$CHECKPOINTS/base}"
TOKENIZER="${TOKENIZER:-$STUDENT}"

# The teacher is fine-tuned on the same data. `python tools/fetch.py models` brings MiniLLM's; to train it yourself,
# run scripts/gpt2/sft/teacher.sh and then the others with TEACHER=results/gpt2/teacher/sft/seed10/best.
TEACHER="${TEACHER:-$CHECKPOINTS/teacher-1.5B}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/xlarge}" # what is fine-tuned into the teacher

# Batches are over all ranks. What is not said here (batch 64, lr 1e-4, 8 epochs a stage) is train.py's default.
SFT_STUDENT=(--global-batch-size 32 --lr 5e-4 --epochs 20)
SFT_TEACHER=(--global-batch-size 8 --lr 5e-5 --epochs 10)
KD=(--global-batch-size 8 --lr 5e-4 --epochs 20)
KD_MATCHED=(--epochs 20)
POCL=(--loss-scaling published)
MEMORY=() # flags that change memory and speed, not the result
