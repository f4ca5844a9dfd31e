#!/usr/bin/env bash
# data/dolly/raw.jsonl (or that of DATA=...) -> the processed data of this family.
#
#     bash scripts/qwen2/tools/process_data.sh [BASE_PATH] [any flag of tools/process_data.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common.sh"

NUM_DEV=() # data may say how many of its first records are the dev split
[[ ! -f "$BASE_PATH/data/$DATA/num_dev" ]] || NUM_DEV=(--num-dev "$(<"$BASE_PATH/data/$DATA/num_dev")")
run_python tools/process_data.py --raw "$RAW" --tokenizer "$TOKENIZER" --output-dir "$DATA_DIR" \
    --data-root "$BASE_PATH/data" "${NUM_DEV[@]}" "${FLAGS[@]}"
