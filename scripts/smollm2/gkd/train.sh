#!/usr/bin/env bash
# On-policy distillation (GKD): half of the micro-batches are answers that the student samples as it trains.
#
#     bash scripts/smollm2/gkd/train.sh [BASE_PATH] [any flag of train.py]
#
# With POCL's curriculum instead, in a folder of its own (results/smollm2/pocl/tjsd is that of JSD + POCL):
#
#     bash scripts/smollm2/pocl/train.sh --type tjsd --on-policy mixed --replay-buffer 1000 \
#         --output-dir results/smollm2/gkd-pocl
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

launch train.py --type jsd --model "$STUDENT" --teacher "$TEACHER" --data-dir "$DATA_DIR" \
    --output-dir "$RESULTS/gkd" --curriculum whole-pool --num-stages 1 --kd-ratio 1.0 \
    --on-policy mixed --mixed-alpha 0.5 --replay-buffer 1000 "${KD[@]}" \
    --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
