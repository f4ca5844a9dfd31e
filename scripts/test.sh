#!/usr/bin/env bash
# Install what is missing, check the sources (ruff, mypy --strict over pocl/) and pages (mkdocs), run every test; arguments go to pytest.
#
#     bash scripts/test.sh [--quick] [-k name] [any flag of pytest]
#
# --quick, for a developer's inner loop, takes about a minute on two cores: it leaves out the files whose tests start
# processes, make runs or try every family of models, which are those that import subprocess or from tests.runs, .ranks,
# .scripts or .models.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

FILES=() # all
if [[ "${1:-}" == --quick ]]; then
    shift
    slow='^import subprocess|^from tests\.(runs|ranks|scripts|models)'
    mapfile -t FILES < <(grep -rLE --include='test_*.py' "$slow" tests)
    FILES+=(tests/test_house.py)
fi

bash install.sh --dev
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
# One thread a process, a process a core: the models of the tests are tiny. (nproc obeys OMP_NUM_THREADS.)
cores="$(env -u OMP_NUM_THREADS nproc)"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu

ruff check .
ruff format --check .
mypy
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
python -m pytest -n "$cores" --dist loadfile --no-loadscope-reorder "$@" "${FILES[@]}"
