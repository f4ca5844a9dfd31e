# shellcheck shell=bash disable=SC2034
# GPT-2, 1.5B -> 0.1B: the models and the paper's settings; scripts/methods.sh says what is what.
STUDENT="${STUDENT:-$CHECKPOINTS/base}"

# `python tools/fetch.py models` brings MiniLLM's teacher; to train it yourself, run scripts/gpt2/sft/teacher.sh and
# then the others with TEACHER=results/gpt2/teacher/sft/seed10/best.
TEACHER="${TEACHER:-$CHECKPOINTS/teacher-1.5B}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/xlarge}"

SFT_STUDENT=(--global-batch-size 32 --lr 5e-4 --epochs 20)
SFT_TEACHER=(--global-batch-size 8 --lr 5e-5 --epochs 10)
KD=(--global-batch-size 8 --lr 5e-4 --epochs 20)
POCL=(--loss-scaling published)
TEMPLATE=(--template alpaca) # the paper's
