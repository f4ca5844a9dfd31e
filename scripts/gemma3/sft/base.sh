#!/usr/bin/env bash
# Fine-tune the student on the references.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
sft_base
