"""Networks of one pattern each: all the ways in which people write a channel shuffle, a gate, a shortcut, attention.

base.py           the table; what is expected of a pattern
channel_order.py  shuffles, pixels, copies, rolls, indices
gates.py          gated units, squeeze and excitation
wiring.py         shortcuts, concatenations, splits, streams, shared and tied weights
layers.py         convolutions, normalisations, activations, embeddings, bare parameters
attention.py      attention in every form, state spaces
recurrent.py      LSTM, GRU, RNN
arithmetic.py     products, statistics, transforms, writes in place, sizes and control flow

A pattern is a function under ``@pattern(...)`` that returns a `Net`; it names what must be cut, what is
kept, and why.
"""

from tests.patterns import (
    arithmetic,
    attention,
    channel_order,
    gates,
    layers,
    recurrent,
    wiring,
)
from tests.patterns.base import PATTERNS, Net, Pattern

__all__ = ["PATTERNS", "Net", "Pattern"]

assert all((arithmetic, attention, channel_order, gates, layers, recurrent, wiring))
