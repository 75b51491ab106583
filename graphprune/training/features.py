"""Distillation inside the network: the cut program attends to the places that the dense one attends to.

    map of a tensor [batch, channels, places] = mean over channels of its square, scaled to length one over the places
    distance = mean over stages of  ||map(dense) - map(cut)||^2

A map has no channels, so nothing has to be learned to compare networks of different widths. Channels that gates have
shut are still in a tensor, and not in the mean.

Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equation 2, with squared lengths.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.errors import UsageError
from graphprune.groups import analyze
from graphprune.labels.trace import TensorInfo
from graphprune.program import Program

__all__ = ["Tap", "attention_map", "insert_taps", "stages", "taps_distance"]

_STAGES = 3
"""How many tensors are compared where all have the same places, as in a transformer."""


def attention_map(x: Tensor, dims: tuple[int, ...], gates: Tensor | None = None) -> Tensor:
    """Return where `x` is large: ``[batch, places]`` of length one, from a tensor with channels along `dims`.

    Where there are gates, only channels that are open count.
    """
    squares = x.float().square()
    if gates is not None:
        squares = squares * gates  # of squares, so that a shut gate has a gradient too
    return F.normalize(squares.mean(dims).flatten(1), dim=1)


class Tap(nn.Module):
    """Lets a tensor through, and remembers it until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        self.value = x
        return x

    def take(self) -> Tensor:
        """Return the tensor of the last forward, and forget it."""
        value, self.value = self.value, None
        assert value is not None
        return value


def insert_taps(module: fx.GraphModule, names: Collection[str]) -> dict[str, Tap]:
    """Put a tap behind each of the named nodes, in place."""
    taps = {}
    for node in list(module.graph.nodes):
        if node.name not in names:
            continue
        path = f"tap_{node.name}"
        taps[node.name] = Tap()
        module.add_submodule(path, taps[node.name])
        with module.graph.inserting_after(node):
            tapped = module.graph.call_module(path, (node,))
        node.replace_all_uses_with(tapped, delete_user_cb=lambda user, own=tapped: user is not own)
    module.recompile()
    return taps


def taps_distance(
    cut: Mapping[str, Tap],
    dense: Mapping[str, Tap],
    channels: Mapping[str, tuple[int, ...]],
    gates: Mapping[str, Tensor],
) -> Tensor:
    """Return the distance of what the taps of two networks hold; `gates` are those of the first, where it has any."""
    apart = []
    for name, dims in channels.items():
        ours = attention_map(cut[name].take(), dims, gates.get(name))
        apart.append((ours - attention_map(dense[name].take(), dims)).square().sum(1).mean())
    return torch.stack(apart).mean()


def stages(cut: Program, dense: Program) -> dict[str, tuple[int, ...]]:
    """Return the nodes to compare, and the dimensions of their channels: the last of each resolution.

    Raises:
        UsageError: The two programs have no such node in common.
    """
    ours, theirs = _shapes(cut), _shapes(dense)
    by_places: dict[tuple[int, ...], list[tuple[str, tuple[int, ...]]]] = {}
    for name, dims in _channel_dims(dense).items():
        shape, wide = ours.get(name, ()), theirs.get(name, ())
        if len(shape) != len(wide) or len(shape) < 3:
            continue
        samples, *places = _without(shape, dims)
        if [samples, *places] == _without(wide, dims) and math.prod(places) > 1:
            by_places.setdefault(tuple(places), []).append((name, dims))
    if not by_places:
        raise UsageError("features= found no tensor that both programs have; leave it at 0")
    if len(by_places) == 1:
        found = next(iter(by_places.values()))
        return dict(found[-1 - i * len(found) // _STAGES] for i in reversed(range(_STAGES)))
    return dict(found[-1] for found in by_places.values())


def _channel_dims(program: Program) -> dict[str, tuple[int, ...]]:
    """Return along which dimensions the tensor of a node has channels: those that can go, or else all with a label."""
    groups = analyze(program)
    found = {}
    for name, info in groups.labels.values.items():
        if not isinstance(info, TensorInfo) or not info.fields or info.field_of(0):
            continue  # without channels, or with some that stand among the samples
        free = [f for f in info.fields if not groups.pinned[groups.channel_of[f.atoms]].all()]
        found[name] = tuple(sorted({dim for f in free or info.fields for dim in f.dims}))
    return found


def _without(shape: Sequence[int], dims: tuple[int, ...]) -> list[int]:
    return [size for dim, size in enumerate(shape) if dim not in dims]


def _shapes(program: Program) -> dict[str, torch.Size]:
    recorder = _Shapes(program.module)
    device = next((t.device for _, t in program.named_tensors()), torch.device("cpu"))
    with torch.inference_mode():
        recorder.run(*(x.to(device) for x in program.batch(2)))
    return recorder.shapes


class _Shapes(fx.Interpreter):
    """Notes the shape of every floating-point tensor that a node computes from the inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, torch.Size] = {}
        self.fed = set(module.graph.find_nodes(op="placeholder"))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        is_computed = not self.fed.isdisjoint(n.all_input_nodes)
        if is_computed:
            self.fed.add(n)
        if is_computed and isinstance(value, Tensor) and value.is_floating_point():
            self.shapes[n.name] = value.shape
        return value
