#!/usr/bin/env bash
# Distil with POCL: --type tfkl trkl tjsd ttvd tsfkl tsrkl.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
pocl_train
