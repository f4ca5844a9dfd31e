# shellcheck shell=bash disable=SC2034
# Llama 3.2, 3B -> 1B, in its own chat template. Not in the paper: the settings are those of Qwen2.
STUDENT="${STUDENT:-$CHECKPOINTS/1b}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/3b}"
# shellcheck source=scripts/qwen2/env.sh
source "$ROOT/scripts/qwen2/env.sh"
