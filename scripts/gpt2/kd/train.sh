#!/usr/bin/env bash
# Distil without a curriculum: the baselines fkl rkl jsd tvd sfkl srkl.
#
# MATCHED=1 takes POCL's batch and learning rate, and 20 epochs: at 178 steps an epoch (Dolly's 11,435 examples)
# these are 3,560 updates, where POCL makes 3,552.
#
#     [MATCHED=1] bash scripts/gpt2/kd/train.sh [BASE_PATH] [--type rkl] [any flag of train.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

METHOD=kd
if [[ "$MATCHED" == 1 ]]; then
    METHOD=kd-matched
    KD=("${KD_MATCHED[@]}")
fi
launch train.py --type fkl --model "$STUDENT" --teacher "$TEACHER" --data-dir "$DATA_DIR" \
    --output-dir "$RESULTS/$METHOD" --curriculum whole-pool --num-stages 1 --kd-ratio 1.0 --temperature 1.0 \
    "${KD[@]}" --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
