#!/usr/bin/env bash
# Show who holds what of a split; any flag of `dfl-lora view-split` overrides a default.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/seed.sh"
need base_path OUTPUT_PATH "the folder of client_1 ... client_N" "$@"
run view-split ${OUTPUT_PATH:+--base_path "$OUTPUT_PATH"} --num_clients 4 --dataset_type glue "$@"
