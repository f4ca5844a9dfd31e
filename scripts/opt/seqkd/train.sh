#!/usr/bin/env bash
# SeqKD: fine-tune the student on the teacher's answers (seqkd/generate.sh makes them); no gold text is a target.
#
#     bash scripts/opt/seqkd/train.sh [BASE_PATH] [any flag of train.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

launch train.py --type sft --model "$STUDENT" --data-dir "$DATA_DIR-seqkd" --output-dir "$RESULTS/seqkd" \
    --curriculum whole-pool --num-stages 1 "${KD[@]}" \
    --dtype "$DTYPE" "${MEMORY[@]}" "${FLAGS[@]}"
