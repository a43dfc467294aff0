"""Codecs: what travels. A codec turns a vector into a frame and back; its memory lives in the peer.

Whatever is lost on the way, the own value enters as it was sent: flows sum_j w_ij (q_j - q_i) are added, so the mean
stays. A row is a function of the run's seed, from which stochastic codecs draw by name: peer, round, exchange, and its
options are those of the recipe. Each is loaded when it is made, since a recipe is read without torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dfl_lora.choices import Share

if TYPE_CHECKING:
    from dfl_lora.codecs.frames import Frame
    from dfl_lora.tensors import Tensors

Memory = Mapping[str, "Tensors"]
Name = tuple[int, int, int]
"""(peer, round, exchange): what a draw is named by."""


class Codec(Protocol):
    """Encode, decode and take in; `memory` names the peer's own vectors that it keeps, of all roles (`peers.Peer`)."""

    @property
    def memory(self) -> Sequence[str]: ...

    def encode(self, x: "Tensors", memory: Memory, name: Name) -> "Frame":
        """Returns what travels of a message, and changes the memory of its roles in place."""
        ...

    def decode(self, frame: "Frame", like: "Tensors") -> "Tensors | None":
        """Returns the vector as it was sent, or None where the frame is not one of the layout of `like`."""
        ...

    def take(self, x: "Tensors", add: "Callable[[Tensors], Tensors]", memory: Memory) -> "Tensors":
        """Returns what x becomes, `add` adding the flows of an exchange to a vector: `add(x)` if nothing is kept."""
        ...


def fp32(seed: int) -> Codec:
    """The vector as it is: lossless, 4 bytes a number."""
    from dfl_lora.codecs.fp32 import Fp32

    return Fp32()


def bf16(seed: int) -> Codec:
    """Rounded to bfloat16: 2 bytes a number, off by at most 2^-8 of each."""
    from dfl_lora.codecs.bf16 import Bf16

    return Bf16()


def int8(seed: int) -> Codec:
    """Stochastic rounding to 255 levels of each tensor's largest number: 1 byte a number, unbiased."""
    from dfl_lora.codecs.int8 import Int8

    return Int8(seed)


def top_k(seed: int, *, share: Share = 0.1, gamma: Share = 0.1) -> Codec:
    """The largest numbers alone, and what is left out with the next: 8 bytes a number sent."""
    from dfl_lora.codecs.top_k import TopK

    return TopK(share, gamma)


def choco(seed: int, *, share: Share = 0.1, gamma: Share = 0.4) -> Codec:
    """The largest changes since the last message alone: 8 bytes a number sent; needs every message."""
    from dfl_lora.codecs.choco import Choco

    return Choco(share, gamma)


CODECS: Mapping[str, Callable[..., Codec]] = {"fp32": fp32, "bf16": bf16, "int8": int8, "top_k": top_k, "choco": choco}
