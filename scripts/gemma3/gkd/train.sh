#!/usr/bin/env bash
# On-policy distillation (GKD).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
gkd_train
