#!/usr/bin/env bash
# Share GSM8K out to client folders: by size, or with --split_type length or topic; any flag of `dfl-lora split gsm8k`
# overrides a default.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/seed.sh"
need dataset_path DATASET_PATH "the folder or file of GSM8K" "$@"
need output_path OUTPUT_PATH "the folder for client_1 ... client_N" "$@"
run split gsm8k ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} ${OUTPUT_PATH:+--output_path "$OUTPUT_PATH"} \
    --num_clients 7 --split_type dirichlet "$@"
