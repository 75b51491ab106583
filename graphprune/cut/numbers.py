"""Sizes that the graph computes while it runs, such as ``x.shape[1] // heads`` in the fx dialect.

They are evaluated on the shapes that the cut program will have, for two batch sizes, to see what each of them
becomes and whether it follows the batch. A number that a cut would change must be corrected where a node uses
it: to the right size where it is a size, to its old value where it is a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from graphprune.cut.shapes import Shapes
from graphprune.labels.trace import TensorInfo

__all__ = ["Numbers"]


class Numbers:
    """Values of number-valued nodes, before and after the cut."""

    def __init__(self, shapes: Shapes, *, batch: int) -> None:
        """Evaluate for `batch` samples."""
        self._shapes = shapes
        self._batch = batch
        self._env: dict[fx.Node, Any] = {}

    def number(self, node: fx.Node) -> None:
        """Evaluate a number-valued node."""
        args = map_arg(node.args, self._lookup)
        kwargs = map_arg(node.kwargs, self._lookup)
        if node.op == "call_method":
            self._env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_function":
            self._env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            self._env[node] = self._shapes.values[node.name]

    def value(self, argument: Any) -> Any:
        """Return what an argument of a node evaluates to."""
        return map_arg(argument, self._lookup)

    def _lookup(self, node: fx.Node) -> Any:
        """Return the value of a number-valued node, or a stand-in for what another node produces."""
        if node not in self._env:
            self._env[node] = self._stand_in(self._shapes.values[node.name])
        return self._env[node]

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, TensorInfo):
            shape = list(self._shapes.shape(value))
            if shape and shape[0] == self._shapes.batch and value.field_of(0) is None:
                shape[0] = self._batch
            return torch.empty(shape, device="meta")
        if isinstance(value, (tuple, list)):
            return (
                type(value)(self._stand_in(v) for v in value)
                if not isinstance(value, torch.Size)
                else value
            )
        return tree_map(self._stand_in, value) if isinstance(value, dict) else value
