"""DFL-LoRA: decentralised LoRA fine-tuning of many peers by gossip, without a server."""

import os

# MKL's sums in float32 depend on the address of a matrix unless it is asked for strict reproducibility; a peer's
# bits must not depend on where in the store its row lies. Large products keep their speed.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
