"""The importers: ONNX operator -> torch operations. One file per family; each registers its own with `operator`.

=================  ==========================================================================
arithmetic.py      one element at a time: unary, binary, Where, Clip, Cast
layers.py          convolution, matrix products, normalisation, pooling, activations with state
reductions.py      sums, means, softmax, sorting along dimensions
movement.py        reshape, transpose, slice, concat, gather, pad, resize
sizes.py           Shape, Range, ConstantOfShape, If with a known condition: what sizes are made of
recurrent.py       LSTM, GRU, RNN
=================  ==========================================================================
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.onnx_import.builder import Builder, Call

__all__ = ["find_operator", "known_operators", "operator"]

Importer = Callable[["Builder", "Call"], Any]
_IMPORTERS: dict[str, Importer] = {}
_FAMILIES = ("arithmetic", "layers", "reductions", "movement", "sizes", "recurrent")


def operator(*names: str) -> Callable[[Importer], Importer]:
    """Register a function as the importer of ONNX operators; it returns the output, or a tuple of outputs.

    Raises:
        ValueError: An operator has an importer already.
    """

    def register(function: Importer) -> Importer:
        for name in names:
            if name in _IMPORTERS:
                raise ValueError(f"operator {name} already has an importer")
            _IMPORTERS[name] = function
        return function

    return register


def find_operator(name: str) -> Importer | None:
    """Return the importer of an operator, or None."""
    _load()
    return _IMPORTERS.get(name)


def known_operators() -> tuple[str, ...]:
    """Return the names of all operators that can be imported."""
    _load()
    return tuple(sorted(_IMPORTERS))


def _load() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
