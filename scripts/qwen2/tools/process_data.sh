#!/usr/bin/env bash
# data/dolly/raw.jsonl -> the processed data of this family.
#
#     bash scripts/qwen2/tools/process_data.sh [BASE_PATH] [any flag of tools/process_data.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

run_python tools/process_data.py --raw "$RAW" --tokenizer "$TOKENIZER" --output-dir "$DATA_DIR" \
    --data-root "$BASE_PATH/data" "${FLAGS[@]}"
