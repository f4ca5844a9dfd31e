#!/usr/bin/env bash
# Fine-tune the teacher on the references; it is then TEACHER=results/gpt2/teacher/sft/seed10/best.
#
#     bash scripts/gpt2/sft/teacher.sh [BASE_PATH] [any flag of train.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

launch train.py --type sft --model "$TEACHER_BASE" --data-dir "$DATA_DIR" --output-dir "$RESULTS/teacher" \
    --curriculum whole-pool --num-stages 1 "${SFT_TEACHER[@]}" \
    --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
