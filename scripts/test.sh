#!/usr/bin/env bash
# Install what is missing and run every test; arguments go to pytest.
#
#     bash scripts/test.sh [-k name] [any flag of pytest]
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash install.sh --dev
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
# One thread a process, a process a core: the models of the tests are tiny. (nproc obeys OMP_NUM_THREADS.)
cores="$(env -u OMP_NUM_THREADS nproc)"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu

ruff check .
ruff format --check .
python -m pytest -n "$cores" --dist loadfile --no-loadscope-reorder "$@"
