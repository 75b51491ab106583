"""Constants: channels that have one value whatever the input, by the weights that make them.

A layer's row of zeros, or a batch norm's scale of zero, makes a channel that is a number (the bias, the shift). What
operators make of it on the way is measured where the channel is read, on random inputs small and large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.groups import DependencyGroups, Place
from graphprune.labels.trace import Consumer
from graphprune.program import Program
from graphprune.second_order.layers import Layer

__all__ = ["Reading", "fixed_channels", "readings", "weights_of"]

Flags = NDArray[np.bool_]

_SIZES = (1.0, 100.0)
"""Inputs are standard normal numbers times these."""


@dataclass(frozen=True)
class Reading:
    """What a consumer reads along the dimension of its channels."""

    channels: NDArray[np.int64]
    """The coupled channel of every index."""
    low: Tensor
    """The least value of every index, over all inputs that were tried."""
    high: Tensor

    @property
    def constant(self) -> Flags:
        """Which indices never changed."""
        found: Flags = (self.low == self.high).numpy()
        return found


def weights_of(program: Program) -> dict[str, Tensor]:
    """Return parameters and buffers by name, detached, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in program.named_tensors()}


def fixed_channels(
    program: Program,
    groups: DependencyGroups,
    layers: Iterable[Layer],
    weights: Mapping[str, Tensor],
) -> Flags:
    """Return which channels are made by layers alone, none of which lets an input through."""
    made = np.zeros(groups.num_channels, np.bool_)
    varying = made.copy()
    by_node = {layer.node: layer for layer in layers}
    for node in program.module.graph.nodes:
        layer = by_node.get(node.name)
        place = None if layer is None else Place(layer.weight, 0)
        if layer is None or place not in groups.places:
            continue
        channels = groups.channels_of(place)
        moving = (weights[layer.weight].flatten(1) != 0).any(1)
        scale = _scale_behind(node, program, weights)
        if scale is not None:
            moving &= scale != 0
        made[channels] = True
        varying[channels[moving.numpy()]] = True
    return made & ~varying


def _scale_behind(node: fx.Node, program: Program, weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the scale of the batch norm that alone reads a layer."""
    users = list(node.users)
    if len(users) != 1:
        return None
    user = users[0]
    if user.op == "call_module":
        module = program.module.get_submodule(str(user.target))
        if isinstance(module, _BatchNorm) and module.weight is not None:
            return module.weight.detach().cpu()
    if user.target is torch.ops.aten.batch_norm.default:
        scale = user.args[1]
        if isinstance(scale, fx.Node) and scale.op == "get_attr":
            return weights.get(str(scale.target))
    return None


def readings(program: Program, groups: DependencyGroups) -> tuple[Reading | None, ...]:
    """Return what every consumer reads, in their order; None where it is not a dimension of a node's first argument."""
    recorder = _Recorder(program.module, groups)
    with torch.inference_mode():
        for seed, size in enumerate(_SIZES):
            inputs = program.batch(4, seed=seed)
            recorder.run(*(x * size if x.is_floating_point() else x for x in inputs))
    return tuple(recorder.found.get(i) for i in range(len(groups.labels.consumers)))


class _Recorder(fx.Interpreter):
    """Notes the range of every channel where it is read."""

    def __init__(self, module: fx.GraphModule, groups: DependencyGroups) -> None:
        super().__init__(module)
        self.channel_of = groups.channel_of
        self.found: dict[int, Reading | None] = {}
        self.consumers: dict[str, list[tuple[int, Consumer]]] = {}
        for number, consumer in enumerate(groups.labels.consumers):
            self.consumers.setdefault(consumer.node, []).append((number, consumer))

    def run_node(self, n: fx.Node) -> object:
        for number, consumer in self.consumers.get(n.name, ()):
            source = n.args[0] if n.args else next(iter(n.kwargs.values()))
            value = self.env.get(source) if isinstance(source, fx.Node) else None
            known = self.found.get(number)
            if number not in self.found or known is not None:
                self.found[number] = self._read(consumer, value, known)
        return super().run_node(n)

    def _read(self, consumer: Consumer, value: object, known: Reading | None) -> Reading | None:
        channels = self.channel_of[consumer.field.atoms]
        if (
            consumer.slot != 0
            or not isinstance(value, Tensor)
            or channels.shape != (value.shape[consumer.field.dims[0]],)
        ):
            return None
        rows = value.movedim(consumer.field.dims[0], 0).flatten(1).cpu()
        low, high = rows.amin(1), rows.amax(1)
        if known is not None:
            low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
        return Reading(channels=channels, low=low, high=high)
