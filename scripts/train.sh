#!/usr/bin/env bash
# Train as the seed did; any flag of `dfl-lora train` overrides a default.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/seed.sh"
need model_checkpoint MODEL_CHECKPOINT "the folder or hub name of the base model" "$@"
need dataset_path_template DATASET_PATH_TEMPLATE "each client's folder, such as splits/client_{i}" "$@"
need val_dataset_path_template VAL_DATASET_PATH_TEMPLATE "the validation data" "$@"
run train ${MODEL_CHECKPOINT:+--model_checkpoint "$MODEL_CHECKPOINT"} \
    ${DATASET_PATH_TEMPLATE:+--dataset_path_template "$DATASET_PATH_TEMPLATE"} \
    ${VAL_DATASET_PATH_TEMPLATE:+--val_dataset_path_template "$VAL_DATASET_PATH_TEMPLATE"} \
    --num_clients 7 --lora_r 4 --lora_alpha 32 --target_modules q_lin,v_lin,pre_classifier,classifier \
    --training_type DFL-LoRA --dataset_type sst2 --name link3 --num_rounds 5 --batch_size 128 "$@"
