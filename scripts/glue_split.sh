#!/usr/bin/env bash
# Share a GLUE task out to client folders; any flag of `dfl-lora split glue` overrides a default.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/seed.sh"
need dataset_path DATASET_PATH "the folder or file of the GLUE task" "$@"
need output_path OUTPUT_PATH "the folder for client_1 ... client_N" "$@"
run split glue ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} ${OUTPUT_PATH:+--output_path "$OUTPUT_PATH"} \
    --num_clients 4 --split_type dirichlet --min_size 1500 "$@"
