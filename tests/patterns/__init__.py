"""Networks of one pattern each: all the ways in which people write a channel shuffle, a gate, a shortcut, attention.

base.py           the table; what is expected of a pattern
channel_order.py  shuffles, pixels, copies, rolls, indices
gates.py          gated units, squeeze and excitation
wiring.py         shortcuts, concatenations, splits, streams, shared and tied weights
convolutions.py   convolutions of every kind
experts.py        mixtures of experts
layers.py         normalisations, activations, embeddings, bare parameters
attention.py      attention over heads: fused, grouped, masked, with positions
mixers.py         linear, cross, spatial and pooled attention, attention modules, state spaces
recurrent.py      LSTM, GRU, RNN
arithmetic.py     products, statistics
space.py          resampling, pooling, padding, Fourier transforms
writes.py         writes in place and into tensors, sizes and control flow

A pattern is a function under ``@pattern(...)`` that returns a `Net`; it names what must be cut, what is
kept, and why.
"""

import importlib

from tests.patterns.base import PATTERNS, Net, Pattern

__all__ = ["PATTERNS", "Net", "Pattern"]

for _subject in (
    "arithmetic",
    "attention",
    "channel_order",
    "convolutions",
    "experts",
    "gates",
    "layers",
    "mixers",
    "recurrent",
    "space",
    "wiring",
    "writes",
):
    importlib.import_module(f"{__name__}.{_subject}")  # each fills the table
