"""Real data, where it is at hand: in the folder that DFL_LORA_DATA names, or in ../shared/data. It is never copied."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("DFL_LORA_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real(*parts: str) -> list[Path]:
    """Returns places below the folder of real data; skips the test where one is not there."""
    missing = [part for part in parts if not (DATA / part).exists()]
    if missing:
        pytest.skip(f"no real data in {DATA}: set DFL_LORA_DATA to a folder with {', '.join(missing)}")
    return [DATA / part for part in parts]
