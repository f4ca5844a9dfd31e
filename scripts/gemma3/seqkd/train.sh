#!/usr/bin/env bash
# SeqKD: fine-tune the student on the teacher's answers (seqkd/generate.sh makes them).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
seqkd_train
