#!/usr/bin/env bash
# One node's part of a Slurm job: srun starts it once on every node, with one of the project's scripts.
#
#     srun --ntasks-per-node=1 bash scripts/slurm/node.sh scripts/gpt2/pocl/train.sh [BASE_PATH] [any flag]
#
# It tells common.sh where this node stands (NNODES, NODE_RANK), where node 0 is (MASTER_ADDR, unless it is given) and
# a port that all nodes know (MASTER_PORT, unless it is given), and passes the first SIGUSR1, SIGTERM or SIGINT on to
# the launcher as SIGTERM: the ranks finish their step and save. torchrun ends with status 1 then, as after a crash, so
# this script ends with 128 + the number of the signal that it passed on (138, 143, 130), else with torchrun's status.
set -euo pipefail

# Another job on node 0 has another port; below the ports that the system hands out itself.
MASTER_PORT="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 12768))}"
COMMAND=("$@")
set -- # common.sh would take them for its own
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../common.sh"

[[ -f "${COMMAND[0]:-}" ]] || die "the first argument must be a script, such as scripts/gpt2/pocl/train.sh"
for name in SLURM_JOB_ID SLURM_NNODES SLURM_NODEID SLURM_JOB_NODELIST; do
    [[ -n "${!name:-}" ]] ||
        die "$name is not set; start this with srun in a Slurm job, as scripts/slurm/train.sbatch does"
done

if [[ -z "${MASTER_ADDR:-}" ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#hosts[@]})) || die "scontrol names no host of $SLURM_JOB_NODELIST; give MASTER_ADDR, the name of node 0"
    MASTER_ADDR="${hosts[0]}"
fi
export MASTER_ADDR MASTER_PORT NNODES="$SLURM_NNODES" NODE_RANK="$SLURM_NODEID" LAUNCHER=torchrun

# Some clusters send SIGUSR1 to every process of a job, and torchrun would die of it.
deaf_to_usr1() {
    trap '' USR1
    exec bash "$@"
}
pass_signals_to itself deaf_to_usr1 "${COMMAND[@]}"
