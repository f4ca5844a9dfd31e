# shellcheck shell=bash disable=SC2034
# Sourced by every script: where things are, which python, and how a program is launched.
#
#   bash scripts/<family>/<method>/<script>.sh [BASE_PATH] [any flag of the program: the last mention wins]
#
# BASE_PATH (a folder; default: the project's root) holds data/ processed_data/ checkpoints/ results/. From the
# environment: DATA (a folder of data/; default: dolly), NUM_GPUS (ranks, of each node; default: every visible GPU, or
# 1 on the CPU), MASTER_PORT, DTYPE, and DRY_RUN=1, which prints the command and runs nothing.
# Relative paths in flags are relative to where you stand; the scripts' own paths are absolute.
#
# Several nodes, which must all see the same BASE_PATH, models and results:
#   HOSTFILE=FILE  DeepSpeed's launcher starts the ranks of every node over ssh, from here.
#   NNODES=N NODE_RANK=R MASTER_ADDR=HOST [MASTER_PORT=29500]
#                  The same command is started on every node, by you or by a scheduler, each time with its own
#                  NODE_RANK from 0 to N - 1; torchrun starts the ranks there, without ssh. HOST is node 0, and a
#                  signal to the script (SIGTERM, SIGINT) is one to torchrun, which passes it on to the ranks.
#                  LAUNCHER=torchrun does the same with NNODES=1. scripts/slurm/ sets all of this under Slurm.
set -euo pipefail

die() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# GPUS: the numbers of the visible GPUs; none means the CPU.
find_gpus() {
    GPUS=()
    [[ "${DS_ACCELERATOR:-}" != cpu ]] || return 0
    local count
    count="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
    ((count > 0)) || return 0
    if [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        mapfile -t GPUS < <(seq 0 $((count - 1)))
    elif [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        IFS=, read -ra GPUS <<<"$CUDA_VISIBLE_DEVICES"
    elif [[ -n "$CUDA_VISIBLE_DEVICES" && "$CUDA_VISIBLE_DEVICES" != -1 ]]; then
        die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher wants numbers, such as 0,1"
    fi
}

# glibc would give every large tensor back to the system and fault its pages in again: a tenth of the time. With pages
# of 2 MB, where the kernel has them, there are fewer to fault in at all: some hundredths.
CPU_ENV=(DS_ACCELERATOR=cpu MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592)
CPU_ENV+=("GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}")

# LAUNCHER_FLAGS: where the ranks run, for the launcher; LAUNCHER_ENV: what goes into their environment.
place_ranks() {
    LAUNCHER_FLAGS=() LAUNCHER_ENV=()
    [[ "${NUM_GPUS:-1}" =~ ^[1-9][0-9]*$ ]] || die "NUM_GPUS=$NUM_GPUS: it must be a whole number above 0"
    if [[ ! "$MASTER_PORT" =~ ^[1-9][0-9]{0,4}$ ]] || ((MASTER_PORT > 65535)); then
        die "MASTER_PORT=$MASTER_PORT: it must be a whole number from 1 to 65535"
    fi
    if uses_torchrun; then
        place_node
        return
    fi
    if [[ -n "${HOSTFILE:-}" ]]; then
        # DeepSpeed would take this machine alone, without a word.
        [[ -f "$HOSTFILE" || "${DRY_RUN:-0}" == 1 ]] || die "HOSTFILE=$HOSTFILE: there is no such file"
        LAUNCHER_FLAGS=(--hostfile "$HOSTFILE" ${NUM_GPUS:+--num_gpus "$NUM_GPUS"})
        return
    fi
    local shown=${#GPUS[@]}
    if ((shown == 0)); then
        LAUNCHER_ENV=(env "${CPU_ENV[@]}")
        LAUNCHER_FLAGS=(--num_accelerators "${NUM_GPUS:-1}")
        share_cores "${NUM_GPUS:-1}"
        return
    fi
    local ranks="${NUM_GPUS:-$shown}"
    ((ranks <= shown)) || die "NUM_GPUS=$ranks, but $shown GPU(s) are visible here"
    LAUNCHER_FLAGS=(--num_gpus "$ranks")
    # With --num_gpus the launcher drops CUDA_VISIBLE_DEVICES and takes the machine's first GPUs.
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        LAUNCHER_FLAGS=(--include "localhost:$(IFS=, && echo "${GPUS[*]:0:ranks}")")
    fi
}

# Whether torchrun starts the ranks of this node, and not DeepSpeed's launcher.
uses_torchrun() { [[ "${NNODES:-1}" != 1 || "${LAUNCHER:-}" == torchrun ]]; }

# LAUNCHER_FLAGS and LAUNCHER_ENV for torchrun: this node's ranks among those of all nodes.
place_node() {
    local whole='^(0|[1-9][0-9]*)$' nodes="${NNODES:-1}" ranks
    [[ "$nodes" =~ $whole && "$nodes" != 0 ]] || die "NNODES=$nodes: it must be a whole number above 0"
    [[ -z "${HOSTFILE:-}" ]] || die "NNODES and HOSTFILE are two ways to use several nodes; give one of them"
    [[ -n "${NODE_RANK:-}" ]] || die "NNODES=$nodes wants NODE_RANK, this node's number from 0 to $((nodes - 1))"
    if [[ ! "$NODE_RANK" =~ $whole ]] || ((NODE_RANK >= nodes)); then
        die "NODE_RANK=$NODE_RANK: with NNODES=$nodes it must be a whole number from 0 to $((nodes - 1))"
    fi
    [[ -n "${MASTER_ADDR:-}" ]] || die "NNODES=$nodes wants MASTER_ADDR, the name or address of node 0"
    # torchrun kills ranks that have not ended so many seconds after a signal: saving a large student takes a while.
    LAUNCHER_ENV=(env TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}")
    if ((${#GPUS[@]} == 0)); then
        ranks="${NUM_GPUS:-1}"
        LAUNCHER_ENV+=("${CPU_ENV[@]}")
    else
        ranks="${NUM_GPUS:-${#GPUS[@]}}"
        ((ranks <= ${#GPUS[@]})) || die "NUM_GPUS=$ranks, but ${#GPUS[@]} GPU(s) are visible here"
    fi
    share_cores "$ranks"
    LAUNCHER_FLAGS=(--nnodes "$nodes" --node_rank "$NODE_RANK" --nproc_per_node "$ranks")
    LAUNCHER_FLAGS+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
}

# Without this every rank starts a thread on every core.
share_cores() {
    local ranks=$1 cores
    if ((ranks > 1)) && [[ -z "${OMP_NUM_THREADS:-}" ]]; then
        cores="$(nproc)"
        LAUNCHER_ENV+=("OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))")
    fi
}

# run COMMAND...: run it, or print it as one line that can be pasted.
run() {
    if [[ "${DRY_RUN:-0}" != 1 ]]; then
        "$@"
        return
    fi
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

# launch PROGRAM ARGUMENTS...: a program of the project's root, on every rank. With torchrun nothing behind it runs.
launch() {
    local program="$ROOT/$1" name=deepspeed launcher
    shift
    uses_torchrun && name=torchrun
    launcher="$(command -v "$name")" || {
        launcher="$name"
        [[ "${DRY_RUN:-0}" == 1 ]] || die "no $name in this environment; run: bash install.sh"
    }
    place_ranks
    local command=("${LAUNCHER_ENV[@]}" "$launcher" "${LAUNCHER_FLAGS[@]}")
    # --log_level: the launcher's own talk, not the program's. At "error" it would print the whole command behind the
    # one line with which a program ends; what it fails at itself is an exception, which is shown either way.
    [[ "$name" == torchrun ]] || command+=(--master_port "$MASTER_PORT" --no_local_rank --log_level critical)
    command+=("$program" "$@")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        run "${command[@]}"
        return
    fi
    # In this process's place, so that a signal to the script reaches the ranks.
    [[ "$name" == deepspeed ]] || exec "${command[@]}"
    # From a hostfile DeepSpeed passes signals on by itself; else it would die of one and leave its ranks training,
    # while the process that it has started tells the ranks: they finish their step and save.
    local whom=children status=0
    [[ -z "${HOSTFILE:-}" ]] || whom=itself
    pass_signals_to "$whom" "${command[@]}" || status=$?
    # A rank that a signal ended has said nothing, and DeepSpeed's status is 256 less the signal's number then. (255 is
    # what ssh ends with.)
    ((status <= 192 || status == 255)) || tell_of_killed_rank $((256 - status))
    return "$status"
}

tell_of_killed_rank() {
    local why=''
    (($1 != 9)) || why=', as the system does where memory has run out'
    printf 'error: a rank was ended by signal %d%s\n' "$1" "$why" >&2
}

# pass_signals_to itself|children COMMAND...: run it, and pass the first SIGTERM, SIGINT or SIGUSR1 on as SIGTERM to
# its process or to those that this one has started. The status is 128 + the signal's number then.
pass_signals_to() {
    local whom=$1 launcher='' status woken=0 passed_on=0 number
    shift
    for number in 10 15 2; do
        # shellcheck disable=SC2064  # the number of now
        trap "_pass_on $number" "$number"
    done
    "$@" &
    launcher=$!
    ((passed_on == 0)) || _terminate # the signal came before there was a launcher
    while :; do # a signal ends a wait before the launcher has ended
        woken=0 status=0
        wait "$launcher" || status=$?
        ((woken)) || break
    done
    trap - 10 15 2
    ((status == 0 || passed_on == 0)) || status=$((128 + passed_on))
    return "$status"
}

# For the traps of pass_signals_to, whose variables it sees.
_pass_on() {
    woken=1
    ((passed_on == 0)) || return 0
    passed_on=$1
    [[ -z "$launcher" ]] || _terminate
}

_terminate() {
    local targets="$launcher"
    [[ "$whom" == itself ]] ||
        targets="$(cat "/proc/$launcher/task/$launcher/children" 2>/dev/null || pgrep -P "$launcher" || true)"
    # shellcheck disable=SC2086  # one process each
    kill -TERM ${targets:-$launcher} 2>/dev/null || true
}

# check_installed: the packages are there, or it is said what installs them.
check_installed() {
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "datasets"))))' ||
        die "$PYTHON lacks the packages of this project; run: bash install.sh"
}

# run_python PROGRAM ARGUMENTS...: a program of the project's root, in one process.
run_python() {
    local program="$ROOT/$1"
    shift
    [[ "${DRY_RUN:-0}" == 1 ]] || check_installed
    run "$PYTHON" "$program" "$@"
}

ROOT="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # a clone runs its own code, whatever is installed
BASE_PATH="$ROOT"
if [[ $# -gt 0 && "$1" != -* ]]; then
    [[ -d "$1" ]] || die "$1 is no folder; the first argument is the base path or a flag"
    BASE_PATH="$(readlink -f "$1")"
    shift
fi
FLAGS=("$@")

if [[ -z "${VIRTUAL_ENV:-}" && -d "$ROOT/.venv/bin" ]]; then
    PATH="$ROOT/.venv/bin:$PATH"
fi
PYTHON="$(command -v python3 || command -v python || echo python3)"
if uses_torchrun; then
    MASTER_PORT="${MASTER_PORT:-29500}" # all nodes must name the same
else
    MASTER_PORT="${MASTER_PORT:-$((20000 + RANDOM % 12768))}" # below the ports that the system hands out itself
fi
find_gpus
DTYPE="${DTYPE:-$( ((${#GPUS[@]})) && echo bf16 || echo fp32)}"
