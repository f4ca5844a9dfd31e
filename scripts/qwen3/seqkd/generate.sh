#!/usr/bin/env bash
# The teacher answers the training prompts, for seqkd/train.sh.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
seqkd_generate
