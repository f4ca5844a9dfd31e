#!/usr/bin/env bash
# Process raw.jsonl for this family's tokenizer.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../methods.sh"
process_data
