"""Remove zeros: cut channels that are zero wherever they are read, or read with zero weights only.

A coupled channel goes if at each of its consumers, which must all be linear or convolution layers,

    the weights that read it are all zero                                     0 x = 0, whatever x is; or
    its value is zero: the rows that make it are zero, or a batch norm scales them by zero, and what is left is measured
    to be exactly zero where the channel is read                              w 0 = 0, whatever w is

so the program computes what it did before, and the driver proves just that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.cut import cut_program
from graphprune.groups import DependencyGroups, Place
from graphprune.labels.trace import Consumer
from graphprune.outcome import Kept
from graphprune.pipeline import Context, Facts, Pass, SurgeryResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.second_order.layers import Layer, layers

__all__ = ["RemoveZeros"]

Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RemoveZeros(Pass):
    """Remove channels that zeros have made useless; outputs stay as they are."""

    name: ClassVar[str] = "remove-zeros"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Return the program without them."""
        groups = context.need(DependencyGroups)
        useless = _useless(program, groups)
        keep, restored = _closed(groups, useless)
        kept = groups.kept
        if restored:
            why = "blocks keep equal counts, and nothing becomes empty"
            kept = (*kept, Kept(f"{restored} channels of zeros", why))
        if keep.all():
            return SurgeryResult(program=program, modified=False, kept=kept)
        plan = Plan.of(program, groups, keep, method=self.spec())
        cut = cut_program(
            program, groups, keep, step=f"{self.spec()}: {plan.removed.channels} channels"
        )
        return SurgeryResult(program=cut.program, modified=True, removed=plan.removed, kept=kept)


def _useless(program: Program, groups: DependencyGroups) -> Flags:
    """Return which coupled channels are read without effect, pins and constraints left aside."""
    by_node = {layer.node: layer for layer in layers(program)}
    weights = {n: t.detach().cpu() for n, t in program.named_tensors()}
    # A block's own atom has no consumer: it goes with its last member, by `close`.
    consumed = np.zeros(groups.num_channels, np.bool_)
    read, elsewhere = consumed.copy(), consumed.copy()
    for consumer in groups.labels.consumers:
        channels = groups.channel_of[consumer.field.atoms]
        consumed[channels] = True
        layer = by_node.get(consumer.node)
        effective = None if layer is None else _reading(layer, weights[layer.weight], consumer)
        if effective is None:
            elsewhere[channels] = True
        else:
            read[channels[effective]] = True
    silent = ~_varying(program, groups, by_node, weights)
    if (silent & consumed & read & ~elsewhere).any():
        silent &= _measured_zero(program, groups)
    useless: Flags = consumed & ~elsewhere & ~groups.pinned & (~read | silent)
    return useless


def _reading(layer: Layer, weight: Tensor, consumer: Consumer) -> Flags | None:
    """Return which input channels some weight other than zero reads; None if that is not what the consumer is."""
    per_group = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(2)
    effective: Flags = (per_group != 0).any(2).flatten().numpy()
    if consumer.slot != 0 or consumer.field.atoms.shape != effective.shape:
        return None
    return effective


def _varying(
    program: Program,
    groups: DependencyGroups,
    by_node: Mapping[str, Layer],
    weights: Mapping[str, Tensor],
) -> Flags:
    """Return which channels no layer makes, or one by a row other than zero and without a batch norm of scale zero."""
    made = np.zeros(groups.num_channels, np.bool_)
    varying = made.copy()
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
    return varying | ~made


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


def _measured_zero(program: Program, groups: DependencyGroups) -> Flags:
    """Return which channels are exactly zero wherever they are read, on random inputs small and large."""
    recorder = _Recorder(program.module, groups)
    with torch.inference_mode():
        for seed, size in ((0, 1.0), (1, 100.0)):
            inputs = program.batch(4, seed=seed)
            recorder.run(*(x * size if x.is_floating_point() else x for x in inputs))
    return ~recorder.seen


class _Recorder(fx.Interpreter):
    """Notes which channels are ever other than zero where they are read."""

    def __init__(self, module: fx.GraphModule, groups: DependencyGroups) -> None:
        super().__init__(module)
        self.channel_of = groups.channel_of
        self.seen = np.zeros(groups.num_channels, np.bool_)
        self.consumers: dict[str, list[Consumer]] = {}
        for consumer in groups.labels.consumers:
            self.consumers.setdefault(consumer.node, []).append(consumer)

    def run_node(self, n: fx.Node) -> object:
        for consumer in self.consumers.get(n.name, ()):
            source = n.args[0] if n.args else next(iter(n.kwargs.values()))
            value = self.env.get(source) if isinstance(source, fx.Node) else None
            channels = self.channel_of[consumer.field.atoms]
            fits = isinstance(value, Tensor) and channels.shape == (
                value.shape[consumer.field.dims[0]],
            )
            if consumer.slot == 0 and fits and isinstance(value, Tensor):
                other = value.movedim(consumer.field.dims[0], 0).flatten(1)
                self.seen[channels[(other != 0).any(1).cpu().numpy()]] = True
            else:
                self.seen[channels] = True
        return super().run_node(n)


def _closed(groups: DependencyGroups, useless: Flags) -> tuple[Flags, int]:
    """Return what to keep so that every constraint holds, and how many useless channels stay for that."""
    going = useless.copy()
    while broken := groups.broken(keep := groups.close(~going)):
        before = going.copy()
        for channels in broken:
            for gone in _too_many(channels, keep):
                going[gone] = False
        if (
            going == before
        ).all():  # blocks went, not single channels: nothing to give back one by one
            going[:] = False
    return keep, int((useless & keep).sum())


def _too_many(channels: NDArray[np.int64], keep: Flags) -> list[NDArray[np.int64]]:
    """Return the channels that have to come back: rows that go in part lose as many as the one that loses least."""
    rows = [row[~keep[row]] for row in channels.reshape(-1, channels.shape[-1])]
    partly = [gone for gone in rows if len(gone) < channels.shape[-1]]
    if not partly:
        return [gone[:1] for gone in rows]
    fewest = min(len(gone) for gone in partly)
    return [gone[fewest:] for gone in partly]
