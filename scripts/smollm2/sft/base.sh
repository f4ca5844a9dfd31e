#!/usr/bin/env bash
# Fine-tune the student on the references: the row SFT, and a start for distillation (STUDENT=.../best).
#
#     bash scripts/smollm2/sft/base.sh [BASE_PATH] [any flag of train.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

launch train.py --type sft --model "$STUDENT" --data-dir "$DATA_DIR" --output-dir "$RESULTS/sft" \
    --curriculum whole-pool --num-stages 1 "${SFT_STUDENT[@]}" \
    --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
