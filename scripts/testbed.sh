#!/usr/bin/env bash
# Compare ways to train on small graded tasks, with intervals over seeds: tools/testbed.py has the flags (--help).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
export OMP_NUM_THREADS=1
if [[ "${DRY_RUN:-0}" != 1 ]]; then
    check_installed
    exec "$PYTHON" "$ROOT/tools/testbed.py" "${FLAGS[@]}" # in this process's place, so that a signal reaches it
fi
run_python tools/testbed.py "${FLAGS[@]}"
