#!/usr/bin/env bash
# A whole table: data, teacher, every row trained and evaluated, the table printed. Started again, it goes on.
# --plan prints the commands. TEACHER=FOLDER takes a teacher that is there already, DATA=NAME other data, which is
# evaluated on its own valid.jsonl, and STUDENT=FOLDER another student: give it a BASE_PATH of its own, since its runs
# would lie where the first one's are.
#
#     bash scripts/gpt2/reproduce.sh [BASE_PATH] [--table main|selective|ablation] [--rows "KLD" "KLD + POCL" ...]
#         [--sets dolly ...] [--seeds 10 ...] [--matched] [--jobs N] [--scale full|hour|tiny] [--plan]
#         [-- flags of train.py] [-- flags of evaluate.py]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../common.sh"

check_installed
exec "$PYTHON" "$ROOT/tools/reproduce.py" --family "$FAMILY" --base-path "$BASE_PATH" --data "$DATA" \
    --student "$STUDENT" --teacher "$TEACHER" --teacher-base "$TEACHER_BASE" --scale "${SCALE:-full}" \
    --matched "$MATCHED" "${FLAGS[@]}"
