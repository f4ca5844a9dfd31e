#!/usr/bin/env bash
# Every row of the paper's main table, from data to numbers, on a pair of tiny random models: minutes on a CPU.
# The numbers mean nothing; that each row runs through its script, on its own data and to its own place, does.
#
#     bash scripts/tiny_table.sh [FOLDER] [any flag of scripts/gpt2/reproduce.sh, such as --table selective]
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

FOLDER=results/tiny-table
if [[ $# -gt 0 && "$1" != -* ]]; then
    FOLDER="$1"
    shift
fi
mkdir -p "$FOLDER/data"
ROWS=("$@")
set --
source scripts/common.sh

export DATA=sample HF_HUB_OFFLINE=1
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
MODELS="$FOLDER/checkpoints/gpt2"
[[ -f $FOLDER/data/sample/valid.jsonl ]] || cp -r data/sample "$FOLDER/data/"
[[ -f $MODELS/xlarge/config.json ]] || "$PYTHON" tests/tiny.py gpt2 "$MODELS/base" "$MODELS/xlarge" 2>/dev/null
[[ -f $FOLDER/processed_data/gpt2/sample/manifest.json ]] ||
    DRY_RUN=0 bash scripts/gpt2/tools/process_data.sh "$FOLDER" --num-dev 8 --max-prompt-length 160 --num-workers 1
bash scripts/gpt2/reproduce.sh "$FOLDER" --sets sample --seeds 1 2 "${ROWS[@]}" \
    -- --epochs 1 --global-batch-size 8 --num-train 32 --num-dev 2 --max-length 192 --bucket-examples 1 --lr 1e-3 \
    -- --max-length 192 --max-prompt-length 160 --num-examples 4
