#!/usr/bin/env bash
# Distil without a curriculum: [MATCHED=1] --type fkl rkl jsd tvd sfkl srkl.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
kd_train
