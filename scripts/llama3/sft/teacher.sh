#!/usr/bin/env bash
# Fine-tune the teacher on the references.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
sft_teacher
