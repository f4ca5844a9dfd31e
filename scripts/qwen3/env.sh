# shellcheck shell=bash disable=SC2034
# Qwen3, 1.7B -> 0.6B, in its own chat template without thoughts. Not in the paper: the settings are those of Qwen2.
STUDENT="${STUDENT:-$CHECKPOINTS/0.6b}"
TEACHER_BASE="${TEACHER_BASE:-$CHECKPOINTS/1.7b}"
# shellcheck source=scripts/qwen2/env.sh
source "$ROOT/scripts/qwen2/env.sh"
