"""The arms by name, and which of them this processor can run."""

import torch

from dfl_lora.bench.arms import Kind
from dfl_lora.bench.arms.mixed import Mixed
from dfl_lora.bench.arms.one_by_one import seed, seed_plus, switch
from dfl_lora.bench.arms.own import one_peer_a_pass, other_attention, ours, own_a, padded

SEED, SEED_PLUS = Kind("seed", seed, copies=True), Kind("seed+", seed_plus, copies=True)
SWITCH, MIXED = Kind("peft-switch", switch), Kind("peft-mixed", Mixed)
OURS = Kind("ours", ours)
ABLATIONS = (
    Kind("ours, one peer a pass", one_peer_a_pass),
    Kind("ours, other attention", other_attention),
    Kind("ours, A at every peer", own_a, only="DFL-LoRA"),
    Kind("ours, padded", padded),
)
BASELINES = (SEED, SEED_PLUS, SWITCH, MIXED)
GRID = (SEED_PLUS, SWITCH, MIXED)
KINDS = {kind.name: kind for kind in (*BASELINES, OURS, *ABLATIONS)}
NO_BF16 = "this processor does not multiply bfloat16 (neither AVX512-BF16 nor AMX)"


def multiplies_bf16() -> bool:
    """Tells whether this processor has bfloat16 products of its own, as `compute.dtype: auto` asks."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
