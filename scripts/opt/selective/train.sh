#!/usr/bin/env bash
# Curriculum distillation with selective reliance (Khan, 2023), one row of its table a call:
#   ROW=kd                                     the whole pool, the teacher weighs alike everywhere
#   ROW=kd-cl-teacher    ROW=kd-cl-student     easy to hard, by the teacher's confidence or the student's own losses
#   ROW=kd-cl-sr-teacher ROW=kd-cl-sr-student  and the teacher is relied on for the harder half alone
# (--selective-reliance linear: in proportion to difficulty.) All rows make about as many updates.
#
#     ROW=kd-cl-sr-teacher bash scripts/opt/selective/train.sh [BASE_PATH] [any flag of train.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

ROW="${ROW:-kd-cl-sr-teacher}"
case "$ROW" in
    kd) CURRICULUM=(--curriculum whole-pool --num-stages 1 --epochs 20) ;;
    kd-cl-teacher) CURRICULUM=(--difficulty teacher) ;;
    kd-cl-student) CURRICULUM=(--difficulty snapshot) ;;
    kd-cl-sr-teacher) CURRICULUM=(--difficulty teacher --selective-reliance hard) ;;
    kd-cl-sr-student) CURRICULUM=(--difficulty snapshot --selective-reliance hard) ;;
    *) die "ROW=$ROW: it is one of kd, kd-cl-teacher, kd-cl-student, kd-cl-sr-teacher, kd-cl-sr-student" ;;
esac
launch train.py --type tfkl --model "$STUDENT" --teacher "$TEACHER" --data-dir "$DATA_DIR" \
    --output-dir "$RESULTS/selective/$ROW" --temperature 2 --kd-ratio 0.5 "${POCL[@]}" "${CURRICULUM[@]}" \
    --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
