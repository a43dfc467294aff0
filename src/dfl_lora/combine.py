"""How a neighbourhood becomes one value: the inbox and the weighted mean.

x_i <- x_i + sum_j w_ij (q_j - q_i), where q is each value as it was sent. Written as a sum of
differences it keeps three promises: equal peers stay equal to the bit; a message that is missing simply
drops its term, which gives its weight back to the own value; and under a lossy codec the mean of the
network stays, because the own value enters as the neighbours saw it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dfl_lora.mixing import Row
from dfl_lora.tensors import Tensors

Fault = Literal["stranger", "malformed", "non-finite"]


@dataclass(frozen=True)
class Inbox:
    """The own value, the own value as sent, and what arrived well formed; built by `receive` only."""

    row: Row
    own: Tensors
    sent: Tensors
    received: Mapping[int, Tensors]
    refused: Mapping[int, Fault]

    @staticmethod
    def receive(row: Row, own: Tensors, sent: Tensors, arrived: Mapping[int, Tensors | None]) -> "Inbox":
        """Keeps the messages of neighbours that have the own layout and dtype and are finite; None is malformed.

        What is refused or missing has no effect but a line in `refused`: its weight goes to the own value.
        """
        received, refused = dict[int, Tensors](), dict[int, Fault]()
        for j in sorted(arrived):
            message = arrived[j]
            fault = fault_of(row, own, j, message)
            if message is not None and fault is None:
                received[j] = message
            else:
                refused[j] = fault or "malformed"
        return Inbox(row, own, sent, received, refused)


def fault_of(row: Row, own: Tensors, sender: int, message: Tensors | None) -> Fault | None:
    """Returns why a message is refused, or None; the cheapest checks come first."""
    if sender not in row.weights:
        return "stranger"
    if message is None or message.layout != own.layout or message.flat.dtype != own.flat.dtype:
        return "malformed"
    return None if message.is_finite() else "non-finite"


Combine = Callable[[Inbox], Tensors]


def mean(inbox: Inbox) -> Tensors:
    """Returns x_i + sum_j w_ij (q_j - q_i), summed in the order of peer ids.

    Both ends of an edge compute the same flow, w_ij times the higher id's value less the lower's, each operation
    rounded: the lower adds it and the higher subtracts it.
    """
    total, sent = inbox.own.flat.clone(), inbox.sent.flat
    for j, message in inbox.received.items():
        weight = inbox.row.weights[j]
        if j > inbox.row.peer:
            total.add_((message.flat - sent).mul_(weight))
        else:
            total.sub_((sent - message.flat).mul_(weight))
    return inbox.own.with_flat(total)
