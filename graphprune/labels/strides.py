"""Distances in a contiguous tensor, and the steps along its dimensions that they stand for.

``as_strided`` speaks of distances; labels and the cut speak of dimensions. A distance of 130 in a tensor of 8 x 4 x 16
is two steps down, none across, and two along: ``(2, 0, 2)``. Of a tensor that is a part or a transposition of another
one, distances say something else, and labels do not know which tensors are: so the program is run, and watched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.program import Program

__all__ = ["distance_of", "scattered_nodes", "steps_of"]


def steps_of(distance: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps along each dimension that a distance is, as few as there can be along the inner ones."""
    steps = []
    for dim in range(len(shape)):
        count, distance = divmod(distance, math.prod(shape[dim + 1 :]))
        steps.append(count)
    return tuple(steps)


def distance_of(steps: Sequence[int], shape: Sequence[int]) -> int:
    """Return the distance that steps along the dimensions of a contiguous tensor come to."""
    return sum(count * math.prod(shape[dim + 1 :]) for dim, count in enumerate(steps))


def scattered_nodes(program: Program) -> frozenset[str]:
    """Return the nodes of a graph whose memory is read by strides through a part or a transposition of it."""
    if not any(map(_is_strided, program.module.graph.nodes)):
        return frozenset()
    watch = _Watch(program.module, garbage_collect_values=False)
    device = next((tensor.device for _, tensor in program.named_tensors()), torch.device("cpu"))
    with torch.no_grad():
        watch.run(*(x.to(device) for x in program.example_inputs))
    return frozenset(watch.scattered)


def _is_strided(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0] == "as_strided"


class _Watch(fx.Interpreter):
    """Runs a graph, and notes who shares the memory of a strided read that is not of one whole contiguous tensor."""

    scattered: set[str]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        self.scattered = set()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        if _is_strided(n):
            x: Tensor = self.env[n.all_input_nodes[0]]
            if not x.is_contiguous() or x.storage_offset():
                memory = x.untyped_storage()._cdata
                self.scattered |= {
                    node.name
                    for node, value in self.env.items()
                    if isinstance(value, Tensor) and value.untyped_storage()._cdata == memory
                }
        return super().run_node(n)
