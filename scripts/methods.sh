# shellcheck shell=bash disable=SC2034
# Sourced by the scripts of a family, scripts/<family>/…: its models and numbers (env.sh), and every method once, as a
# function that such a script calls. [BASE_PATH] and flags are those of common.sh.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

# The family is the folder of scripts/ that the caller stands in.
FAMILY="$(readlink -f "${BASH_SOURCE[1]}")"
FAMILY="${FAMILY#"$ROOT/scripts/"}"
FAMILY="${FAMILY%%/*}"
CHECKPOINTS="$BASE_PATH/checkpoints/$FAMILY"
RESULTS="$BASE_PATH/results/$FAMILY"

DATA="${DATA:-dolly}"
DATA_DIR="$BASE_PATH/processed_data/$FAMILY/$DATA"
SETS=(dolly self-inst vicuna sinst uinst) # the paper's; other data is evaluated on itself
[[ "$DATA" == dolly ]] || SETS=("$DATA")

# Prompts and references of the sample set repeat each other: the paper's ban of repeated 6-grams would make a fifth of
# its references impossible to write.
BAN=()
[[ "$DATA" != sample ]] || BAN=(--no-repeat-ngram 0)

SAID_MATCHED="${MATCHED:-}" # where nobody says it, tools/reproduce.py decides for a table
MATCHED="${MATCHED:-0}" # of kd_train
[[ "$MATCHED" == [01] ]] || die "MATCHED=$MATCHED: it must be 1 or 0"

# What env.sh says besides: STUDENT, TEACHER_BASE (what is fine-tuned into the teacher), and flags in SFT_STUDENT,
# SFT_TEACHER and KD. Batches are over all ranks; what nobody says (batch 64, lr 1e-4, 8 epochs a stage) is train.py's.
KD_MATCHED=(--epochs 20)
POCL=()
TEMPLATE=() # --template of the data [default: the student's own chat template; Alpaca's where it has none]
MEMORY=() # flags that change memory and speed, not the result
# shellcheck source=scripts/gpt2/env.sh
source "$ROOT/scripts/$FAMILY/env.sh"
TEACHER="${TEACHER:-$RESULTS/teacher/sft/seed10/best}" # as sft_teacher makes it
TOKENIZER="${TOKENIZER:-$STUDENT}"
PAIR=(--model "$STUDENT" --teacher "$TEACHER" --data-dir "$DATA_DIR")

# train FLAGS...: train.py with what every training shares.
train() { launch train.py "$@" --dtype "$DTYPE" "${BAN[@]}" "${MEMORY[@]}" "${FLAGS[@]}"; }

# fine_tune MODEL DATA_DIR OUTPUT_DIR FLAGS...
fine_tune() {
    train --type sft --model "$1" --data-dir "$2" --output-dir "$3" --curriculum whole-pool --num-stages 1 "${@:4}"
}

# data/dolly/raw.jsonl (or that of DATA=...) -> the processed data of this family.
process_data() {
    local num_dev=() path="$BASE_PATH/data/$DATA" # data may say how many of its first records are the dev split
    [[ ! -f "$path/num_dev" ]] || num_dev=(--num-dev "$(<"$path/num_dev")")
    run_python tools/process_data.py --raw "$path/raw.jsonl" --tokenizer "$TOKENIZER" --output-dir "$DATA_DIR" \
        --data-root "$BASE_PATH/data" "${TEMPLATE[@]}" "${num_dev[@]}" "${FLAGS[@]}"
}

# The row SFT, and a start for distillation (STUDENT=.../best).
sft_base() { fine_tune "$STUDENT" "$DATA_DIR" "$RESULTS/sft" "${SFT_STUDENT[@]}"; }

sft_teacher() { fine_tune "$TEACHER_BASE" "$DATA_DIR" "$RESULTS/teacher" "${SFT_TEACHER[@]}"; }

# The baselines fkl (the default) rkl jsd tvd sfkl srkl. MATCHED=1 takes POCL's batch and learning rate, and 20 epochs:
# at 178 steps an epoch (Dolly's 11,435 examples) these are 3,560 updates, where POCL makes 3,552.
kd_train() {
    local name=kd settings=("${KD[@]}")
    ((MATCHED == 0)) || name=kd-matched settings=("${KD_MATCHED[@]}")
    train --type fkl "${PAIR[@]}" --output-dir "$RESULTS/$name" --curriculum whole-pool --num-stages 1 \
        --kd-ratio 1.0 --temperature 1.0 "${settings[@]}"
}

# Four stages from easy to hard, as temperature and KD ratio rise: tfkl (the default) trkl tjsd ttvd tsfkl tsrkl.
# --recipe steady keeps the pools alone.
pocl_train() {
    train "${PAIR[@]}" --output-dir "$RESULTS/pocl" --recipe paper "${POCL[@]}"
}

# The teacher answers the training prompts; its answers are the targets of seqkd_train, and no gold text is one.
seqkd_generate() {
    launch tools/generate_seqkd.py --model "$TEACHER" --data-dir "$DATA_DIR" --output-dir "$DATA_DIR-seqkd" \
        --dtype "$DTYPE" "${FLAGS[@]}"
}

seqkd_train() { fine_tune "$STUDENT" "$DATA_DIR-seqkd" "$RESULTS/seqkd" "${KD[@]}"; }

# On-policy distillation (GKD): half of the examples are answers that the student samples as it trains. With POCL's
# curriculum instead, in a folder of its own (results/<family>/pocl/tjsd is that of JSD + POCL):
#
#     bash scripts/<family>/pocl/train.sh --type tjsd --on-policy mixed --replay-buffer 1000 \
#         --output-dir results/<family>/gkd-pocl
gkd_train() {
    train --type jsd "${PAIR[@]}" --output-dir "$RESULTS/gkd" --curriculum whole-pool --num-stages 1 --kd-ratio 1.0 \
        --on-policy mixed --mixed-alpha 0.5 --replay-buffer 1000 "${KD[@]}"
}

# Curriculum distillation with selective reliance (Khan, 2023), one row of its table a call:
#   ROW=kd                                     the whole pool, the teacher weighs alike everywhere
#   ROW=kd-cl-teacher    ROW=kd-cl-student     easy to hard, by the teacher's confidence or the student's own losses
#   ROW=kd-cl-sr-teacher ROW=kd-cl-sr-student  and the teacher is relied on for the harder half alone
# (--selective-reliance linear: in proportion to difficulty.) All rows make about as many updates.
selective_train() {
    local row="${ROW:-kd-cl-sr-teacher}" curriculum
    case "$row" in
        kd) curriculum=(--curriculum whole-pool --num-stages 1 --epochs 20) ;;
        kd-cl-teacher) curriculum=(--difficulty teacher) ;;
        kd-cl-student) curriculum=(--difficulty snapshot) ;;
        kd-cl-sr-teacher) curriculum=(--difficulty teacher --selective-reliance hard) ;;
        kd-cl-sr-student) curriculum=(--difficulty snapshot --selective-reliance hard) ;;
        *) die "ROW=$row: it is one of kd, kd-cl-teacher, kd-cl-student, kd-cl-sr-teacher, kd-cl-sr-student" ;;
    esac
    train --type tfkl "${PAIR[@]}" --output-dir "$RESULTS/selective/$row" --temperature 2 --kd-ratio 0.5 \
        "${POCL[@]}" "${curriculum[@]}"
}

# MODEL=results/.../best on SETS, five sampling seeds each; results go beside the run's best/. For a folder of another
# name say where: --output-dir DIR.
run_eval() {
    local trained_on=() # prompts that the test sets share with it are listed
    [[ ! -f "$DATA_DIR/manifest.json" ]] || trained_on=(--train-data "$DATA_DIR")
    launch evaluate.py --model "${MODEL:-$RESULTS/pocl/tfkl/seed10/best}" --sets "${SETS[@]}" \
        --data-root "$BASE_PATH/data" "${trained_on[@]}" --dtype "$DTYPE" "${BAN[@]}" "${FLAGS[@]}"
}

# A whole table: data, teacher, every row trained and evaluated, the table printed. Started again, it goes on.
# --plan prints the commands. TEACHER=FOLDER takes a teacher that is there already, DATA=NAME other data, which is
# evaluated on its own valid.jsonl, and STUDENT=FOLDER another student: give it a BASE_PATH of its own, since its runs
# would lie where the first one's are.
#
#     bash scripts/<family>/reproduce.sh [BASE_PATH] [--table main|selective|ablation] [--rows "KLD" "KLD + POCL" ...]
#         [--sets dolly ...] [--seeds 10 ...] [--train-seeds 10 20 ...] [--matched 1|0] [--jobs N]
#         [--scale full|hour|tiny] [--plan] [-- flags of train.py] [-- flags of evaluate.py]
reproduce() {
    local matched=()
    [[ -z "$SAID_MATCHED" ]] || matched=(--matched "$MATCHED")
    check_installed
    exec "$PYTHON" "$ROOT/tools/reproduce.py" --family "$FAMILY" --base-path "$BASE_PATH" --data "$DATA" \
        --student "$STUDENT" --teacher "$TEACHER" --teacher-base "$TEACHER_BASE" --scale "${SCALE:-full}" \
        "${matched[@]}" "${FLAGS[@]}"
}
