#!/usr/bin/env bash
# Distil with POCL: four stages from easy to hard, while temperature and KD ratio rise.
# Types: tfkl (the default) trkl tjsd ttvd tsfkl tsrkl.
#
#     bash scripts/smollm2/pocl/train.sh [BASE_PATH] [--type trkl] [any flag of train.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

launch train.py --model "$STUDENT" --teacher "$TEACHER" --data-dir "$DATA_DIR" --output-dir "$RESULTS/pocl" \
    --temperature 1 1.33 1.67 2 --kd-ratio 0.7 0.8 0.9 1.0 "${POCL[@]}" \
    --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
