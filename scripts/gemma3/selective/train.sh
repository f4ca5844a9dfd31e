#!/usr/bin/env bash
# Curriculum distillation with selective reliance, one ROW=... of its table.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
selective_train
