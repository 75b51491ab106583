"""Fold constants: a channel that is one number whatever the input moves into the biases of the layers that read it.

    z = W y + b,  y_i = c for every input:     b := b + W_i c,  W_i := 0

Then nothing reads the channel, and `remove-zeros` takes it away. A batch norm with a scale of zero leaves such
channels, and a ReLU behind it leaves zeros or numbers. It is exact where every reader is a linear or convolution layer
that sees the constant everywhere; a convolution that pads with zeros sees something else at the border, and keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.constants import Reading, fixed_channels, readings, weights_of
from graphprune.contract import Context, Facts, Pass, SurgeryResult
from graphprune.groups import DependencyGroups
from graphprune.outcome import Kept
from graphprune.program import Program
from graphprune.second_order.layers import Layer, layers

__all__ = ["FoldConstants"]

Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Move constant channels into the biases behind them; outputs stay as they are."""

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Return a program whose layers read no channel that is a number other than zero."""
        groups = context.need(DependencyGroups)
        found = layers(program)
        weights = weights_of(program)
        fixed = fixed_channels(program, groups, found, weights) & ~groups.pinned
        kept = groups.kept
        if not fixed.any():
            return SurgeryResult(program=program, modified=False, kept=kept)
        read = readings(program, groups)
        folding, staying = _foldable(groups, _alone(program, found), weights, read, fixed)
        if staying:
            why = "a reader pads them with zeros, shares its weights, or is neither linear nor a convolution"
            kept = (*kept, Kept(f"{staying} constant channels", why))
        if not folding.any():
            return SurgeryResult(program=program, modified=False, kept=kept)
        clone = program.clone()
        by_node = {layer.node: layer for layer in found}
        for consumer, reading in zip(groups.labels.consumers, read, strict=True):
            layer = by_node.get(consumer.node)
            if layer is not None and reading is not None and folding[reading.channels].any():
                _fold(clone, layer, reading, torch.from_numpy(folding[reading.channels]))
        clone.module.recompile()
        step = f"{self.spec()}: {int(folding.sum())} channels"
        return SurgeryResult(
            program=program.evolve(clone.module, step=step),
            modified=True,
            kept=kept,
            is_rounded=True,
        )


def _alone(program: Program, found: tuple[Layer, ...]) -> dict[str, Layer]:
    """Return the layers, by node, whose weight and bias nothing else uses."""
    module, uses = program.module, Counter[int]()
    for node in module.graph.nodes:
        if node.op == "call_module":
            uses.update(map(id, module.get_submodule(str(node.target)).parameters()))
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            uses[id(getattr(module.get_submodule(owner), name))] += len(node.users)
    tensors = dict(module.named_parameters())
    return {
        layer.node: layer
        for layer in found
        if all(uses[id(tensors[n])] == 1 for n in (layer.weight, layer.bias) if n is not None)
    }


def _foldable(
    groups: DependencyGroups,
    by_node: Mapping[str, Layer],
    weights: Mapping[str, Tensor],
    read: tuple[Reading | None, ...],
    fixed: Flags,
) -> tuple[Flags, int]:
    """Return which fixed channels can go into biases, and how many have to stay."""
    possible, wanted = fixed.copy(), np.zeros_like(fixed)
    for consumer, reading in zip(groups.labels.consumers, read, strict=True):
        channels = groups.channel_of[consumer.field.atoms].ravel()
        if reading is None:
            possible[channels] = False
            wanted[channels] = True
            continue
        other = ((reading.low != 0) | (reading.high != 0)).numpy()
        layer = by_node.get(consumer.node)
        takes = layer is not None and not (
            layer.padding_mode == "constant" and any(map(any, layer.padding))
        )
        if layer is not None:
            other &= _reads(layer, weights[layer.weight])
        wanted[reading.channels[other]] = True
        possible[reading.channels[other & ~(reading.constant & takes)]] = False
    folding: Flags = possible & wanted
    return folding, int((fixed & wanted & ~possible).sum())


def _reads(layer: Layer, weight: Tensor) -> Flags:
    """Return which inputs of a layer meet a weight other than zero."""
    by_group = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(2)
    found: Flags = (by_group != 0).any(2).flatten().numpy()
    return found


def _fold(program: Program, layer: Layer, reading: Reading, going: Tensor) -> None:
    """Add what the constants give to a layer's output to its bias, and stop reading them."""
    module = program.module
    tensors = dict(module.named_parameters())
    weight = tensors[layer.weight]
    constants = torch.where(going, reading.low, 0.0).to(weight.device, torch.float64)
    with torch.no_grad():
        columns = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
        by_group = columns.unflatten(0, (layer.groups, -1))
        shift = torch.einsum("goi,gi->go", by_group, constants.unflatten(0, (layer.groups, -1)))
        shift = shift.flatten()
        if layer.bias is None:
            _add_bias(program, layer, shift.to(weight.dtype))
        else:
            bias = tensors[layer.bias]
            bias.copy_(bias.double() + shift)
        gone = going.to(weight.device).unflatten(0, (layer.groups, -1))
        mask = gone.repeat_interleave(weight.shape[0] // layer.groups, dim=0)
        weight[mask] = 0


def _add_bias(program: Program, layer: Layer, value: Tensor) -> None:
    """Give a layer without a bias one."""
    module = program.module
    node = next(n for n in module.graph.nodes if n.name == layer.node)
    bias = nn.Parameter(value)
    if node.op == "call_module":
        module.get_submodule(str(node.target)).register_parameter("bias", bias)
        return
    name = _free_name(module, layer.weight)
    owner, _, own = name.rpartition(".")
    module.get_submodule(owner).register_parameter(own, bias)
    with module.graph.inserting_before(node):
        added = module.graph.get_attr(name)
    arguments = list(node.args)
    if len(arguments) > 2:
        arguments[2] = added
        node.args = tuple(arguments)
    else:
        node.kwargs = {**node.kwargs, "bias": added}


def _free_name(module: nn.Module, weight: str) -> str:
    """Return a name for a new bias: beside its weight, as layers call it, or one of its own."""
    owner, _, own = weight.rpartition(".")
    if own == "weight" and getattr(module.get_submodule(owner), "bias", None) is None:
        return f"{owner}.bias" if owner else "bias"
    return f"{weight}_bias".replace(".", "_")
