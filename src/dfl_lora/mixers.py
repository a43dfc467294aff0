"""Mixers: how W is applied in a round. A mixer makes polynomials of the one exchange it is given."""

from collections.abc import Callable, Mapping

from dfl_lora.tensors import Tensors

Values = Mapping[int, Tensors]
Exchange = Callable[[Values, int], Values]
"""(values of the hosted peers, number of the exchange within the round) -> combined values: one W x."""
Mixer = Callable[[Values, Exchange], Values]


def plain(values: Values, exchange: Exchange) -> Values:
    """Returns W x: one exchange."""
    return exchange(values, 0)


MIXERS: dict[str, Mixer] = {"plain": plain}
