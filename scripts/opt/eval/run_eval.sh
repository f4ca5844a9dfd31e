#!/usr/bin/env bash
# Evaluate a checkpoint on the paper's five sets (or on DATA=... itself), five sampling seeds each; results go beside
# the run's best/. For a folder of another name say where: --output-dir DIR.
#
#     [MODEL=results/.../best] bash scripts/opt/eval/run_eval.sh [BASE_PATH] [any flag of evaluate.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

TRAINED_ON=() # prompts that the test sets share with it are listed
[[ ! -f "$DATA_DIR/manifest.json" ]] || TRAINED_ON=(--train-data "$DATA_DIR")
launch evaluate.py --model "${MODEL:-$RESULTS/pocl/tfkl/seed10/best}" \
    --sets "${SETS[@]}" --data-root "$BASE_PATH/data" "${TRAINED_ON[@]}" \
    --dtype "$DTYPE" "${FLAGS[@]}"
