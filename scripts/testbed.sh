#!/usr/bin/env bash
# Compare ways to train on small graded tasks, with intervals over seeds: tools/testbed.py has the flags (--help).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
export OMP_NUM_THREADS=1
run_python tools/testbed.py "${FLAGS[@]}"
