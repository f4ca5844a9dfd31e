#!/usr/bin/env bash
# The first minutes on a GPU machine: does everything compute there what it must, and how fast? At most 10 minutes, no hub.
#
#     bash scripts/gpu_check.sh [any flag of tools/gpu_check.py, such as --parts numbers]
#
# On a machine without a GPU it says which lines it could not check; its pairs are then small ones.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

PAIRS=()
((${#GPUS[@]})) || PAIRS=(--pairs micro)
run_python tools/gpu_check.py "${PAIRS[@]}" "${FLAGS[@]}"
