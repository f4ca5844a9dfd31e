# shellcheck shell=bash disable=SC2034
# Gemma 3, 1B -> 270M, in its own chat template. Not in the paper: the settings are those of Qwen2.
STUDENT="${STUDENT:-$CHECKPOINTS/270m}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/1b}"
# shellcheck source=scripts/qwen2/env.sh
source "$ROOT/scripts/qwen2/env.sh"
