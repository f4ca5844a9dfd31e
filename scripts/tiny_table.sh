#!/usr/bin/env bash
# Every row of the paper's main table, from data to numbers, on a pair of tiny random models: minutes on a CPU.
# The numbers mean nothing; that each row runs through its script, on its own data and to its own place, does.
#
#     bash scripts/tiny_table.sh [FOLDER] [any flag of scripts/gpt2/reproduce.sh, such as --table selective]
set -euo pipefail

FOLDER=''
if [[ $# -gt 0 && "$1" != -* ]]; then
    mkdir -p "$1"
    FOLDER="$(readlink -f "$1")"
    shift
fi
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
ROWS=("$@")
set --
source scripts/common.sh

FOLDER="${FOLDER:-$ROOT/results/tiny-table}"
MODELS="$FOLDER/checkpoints/gpt2"
mkdir -p "$FOLDER/data"
export DATA=sample MATCHED=0 HF_HUB_OFFLINE=1
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
if [[ "${DRY_RUN:-0}" != 1 ]]; then
    [[ -f $FOLDER/data/sample/valid.jsonl ]] || cp -r data/sample "$FOLDER/data/"
    [[ -f $MODELS/xlarge/config.json ]] || "$PYTHON" tests/tiny.py gpt2 "$MODELS/base" "$MODELS/xlarge" 2>/dev/null
    if [[ ! -f $FOLDER/processed_data/gpt2/sample/manifest.json ]]; then
        bash scripts/gpt2/tools/process_data.sh "$FOLDER" --num-dev 8 --max-prompt-length 160 --num-workers 1
    fi
fi
bash scripts/gpt2/reproduce.sh "$FOLDER" --seeds 1 2 "${ROWS[@]}" \
    -- --epochs 1 --global-batch-size 8 --num-train 32 --num-dev 2 --max-length 192 --bucket-examples 1 --lr 1e-3 \
    -- --max-length 192 --max-prompt-length 160 --num-examples 4
