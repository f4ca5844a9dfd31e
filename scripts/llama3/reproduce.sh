#!/usr/bin/env bash
# Make a whole table: data, teacher, every row trained and evaluated.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../methods.sh"
reproduce
