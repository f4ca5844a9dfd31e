#!/usr/bin/env bash
# Evaluate MODEL=.../best on the paper's five sets, or on DATA=... itself.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
run_eval
