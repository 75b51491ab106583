"""Remove zeros: cut channels that are zero wherever they are read, or read with zero weights only.

A coupled channel goes if at each of its consumers, which must all be linear or convolution layers,

    the weights that read it are all zero                                     0 x = 0, whatever x is; or
    its value is zero: the rows that make it are zero, or a batch norm scales them by zero, and what is left is measured
    to be exactly zero where the channel is read                              w 0 = 0, whatever w is

so the program computes what it did before, and the driver proves just that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphprune.constants import fixed_channels, readings, weights_of
from graphprune.contract import Context, Facts, Pass, SurgeryResult
from graphprune.cut import cut_program
from graphprune.groups import DependencyGroups
from graphprune.labels.trace import Consumer
from graphprune.outcome import Kept
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
    weights = weights_of(program)
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
    silent = fixed_channels(program, groups, by_node.values(), weights)
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


def _measured_zero(program: Program, groups: DependencyGroups) -> Flags:
    """Return which channels are zero wherever they are read."""
    zero = np.ones(groups.num_channels, np.bool_)
    for consumer, reading in zip(groups.labels.consumers, readings(program, groups), strict=True):
        if reading is None:
            zero[groups.channel_of[consumer.field.atoms]] = False
        else:
            other = ((reading.low != 0) | (reading.high != 0)).numpy()
            zero[reading.channels[other]] = False
    return zero


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
