#!/usr/bin/env bash
# The teacher answers the training prompts; its answers become the targets of seqkd/train.sh.
#
#     bash scripts/smollm2/seqkd/generate.sh [BASE_PATH] [any flag of tools/generate_seqkd.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

launch tools/generate_seqkd.py --model "$TEACHER" --data-dir "$DATA_DIR" --output-dir "$DATA_DIR-seqkd" \
    --dtype "$DTYPE" "${FLAGS[@]}"
