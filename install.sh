#!/usr/bin/env bash
# Make .venv/ beside this file and install the pinned requirements and the project itself; quick where nothing is left
# to do.
#
#     [PYTHON=python3.12] bash install.sh [--dev]      --dev: what tests and checks the project too
#     [PYTHON=python3.12] bash install.sh --vllm       vLLM instead, in .venv-vllm/, on a machine with a GPU
#
# torch comes as pip's index has it, on Linux with CUDA. For a smaller build on a machine without a GPU, or for an
# index of your own, set pip's own variables: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL.
set -euo pipefail

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

ROOT="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
VENV="$ROOT/.venv"
PYTHON="${PYTHON:-python3}"
FILES=("$ROOT/requirements.txt")
PROJECT="$ROOT"
READY="source $VENV/bin/activate (the scripts find it by themselves)"
for argument in "$@"; do
    case "$argument" in
        --dev) FILES+=("$ROOT/requirements-dev.txt") ;;
        --vllm)
            (($# == 1)) || die "--vllm makes an environment of its own; give it alone"
            VENV="$ROOT/.venv-vllm" FILES=("$ROOT/requirements-vllm.txt") PROJECT=''
            READY="--generation-backend vllm (and auto, on a GPU) finds it by itself"
            ;;
        *) die "unknown argument $argument; bash install.sh [--dev | --vllm]" ;;
    esac
done

# Making it anew would empty the folder that the link leads to: another project's, perhaps.
[[ ! -L "$VENV" ]] || die "$VENV is a link to $(readlink "$VENV"); remove it, the environment is made here"
command -v "$PYTHON" >/dev/null || die "$PYTHON is not on PATH; install Python 3.11, 3.12 or 3.13, or give PYTHON=..."
version="$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')" || die "$PYTHON does not run"
# numpy, transformers and matplotlib at their pins want 3.11 or later.
[[ "$version" =~ ^3\.(11|12|13)\. ]] || die "$PYTHON is Python $version; 3.11 to 3.13 is needed, give PYTHON=..."

# What the environment was made for: its scripts hold its own path, so that a moved one is made again.
made_for="Python $version in $VENV"
if [[ "$(cat "$VENV/made-for" 2>/dev/null)" != "$made_for" ]]; then
    echo "making $VENV with Python $version (some minutes)"
    "$PYTHON" -m venv --clear "$VENV" || die "cannot make $VENV; Debian and Ubuntu want the package python3-venv"
    printf '%s\n' "$made_for" >"$VENV/made-for"
fi

# install_once FILE PIP_ARGUMENTS...: where it was not done for these very contents of the file, which a stamp names
# once all is installed.
install_once() {
    local file=$1 stamp wanted
    shift
    stamp="$VENV/$(basename "$file").sha256"
    wanted="$(sha256sum <"$file")"
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
        echo "$(basename "$file"): nothing to do"
        return
    fi
    rm -f "$stamp"
    echo "$(basename "$file"): installing"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"
    printf '%s\n' "$wanted" >"$stamp"
}

for file in "${FILES[@]}"; do
    install_once "$file" --requirement "$file"
done
if [[ -n "$PROJECT" ]]; then # built by the setuptools that is pinned, so that nothing is fetched
    install_once "$PROJECT/pyproject.toml" --no-deps --no-build-isolation --editable "$PROJECT"
fi
echo "ready: $READY"
