"""Readers: the layers that sum over a removal unit, and which columns of their weights belong to it.

When a unit goes, every layer that reads it loses columns. Second-order methods ask what that costs, and let the
columns that stay make up for it; this needs the layer's weight as a matrix ``[outputs, columns]``, and the columns of
each unit. Units that something else sums over (a normalisation over channels, attention scores) cannot be made up for
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphprune.groups import DependencyGroups, Place
from graphprune.outcome import Kept
from graphprune.program import Program
from graphprune.second_order.layers import Layer, layers
from graphprune.units import Units

__all__ = ["Reader", "UnitGroup", "columns_of", "unit_groups"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer that reads units of a group."""

    layer: Layer
    columns: tuple[tuple[Tensor, Tensor], ...]
    """Pairs (positions in `UnitGroup.units`, shape [n]; columns of the weight matrix, shape [n, m]); units that own
    different numbers of columns stand in different pairs."""


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units of one dependency group, all of whose readers are layers."""

    name: str
    units: tuple[int, ...]
    """Numbers in `Units`."""
    width: int
    """How many of the group's channels go with each unit."""
    readers: tuple[Reader, ...]

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.units)


def unit_groups(
    program: Program, groups: DependencyGroups, units: Units
) -> tuple[list[UnitGroup], list[Kept]]:
    """Return the units that second-order methods can remove, by dependency group, and what must stay and why."""
    convolving = layers(program)
    tensors = dict(program.named_tensors())
    # Depthwise: each channel by itself, so nothing is summed over.
    depthwise = {
        layer.node
        for layer in convolving
        if layer.groups > 1 and tensors[layer.weight].shape[1] == 1
    }
    known = {layer.node: layer for layer in convolving if layer.node not in depthwise}
    reading = {n: c for n, c in groups.summed_over.items() if n not in depthwise}
    found: list[UnitGroup] = []
    kept: list[Kept] = []
    for number in np.unique(units.group):
        group = groups[int(number)]
        inside = np.flatnonzero(units.group == number)
        mine, times = np.unique(
            np.concatenate([units.members(int(u)) for u in inside]), return_counts=True
        )
        if units.is_head[inside].max() == units.is_head[inside].min() and times.max() > 1:
            why = "its channels go with several others: nothing says which of them makes up for it"
            kept.append(Kept(f"{group.name} ({len(group)} channels)", why))
            continue
        nodes = {node for node, channels in reading.items() if np.isin(channels, mine).any()}
        strangers = sorted(nodes - known.keys())
        if strangers or not nodes:
            why = f"read by {strangers[0]}, not a layer" if strangers else "no layer reads it"
            kept.append(
                Kept(f"{group.name} ({len(group)} channels)", f"{why}: nothing can make up for it")
            )
            continue
        position = np.full(groups.num_channels, -1, np.int64)
        for place, unit in enumerate(inside):
            position[units.members(int(unit))] = place
        readers = tuple(_reader(program, groups, known[n], position) for n in known if n in nodes)
        first = units.members(int(inside[0]))
        width = max(1, int(np.isin(first, group.channels).sum()))
        found.append(
            UnitGroup(name=group.name, units=tuple(map(int, inside)), width=width, readers=readers)
        )
    return found, kept


def _reader(
    program: Program, groups: DependencyGroups, layer: Layer, position: np.ndarray
) -> Reader:
    channels = groups.channels_of(Place(layer.weight, 1))
    area = math.prod(layer.kernel_size)
    columns: dict[int, list[int]] = {}
    for index, unit in enumerate(position[channels].tolist()):
        if unit >= 0:
            columns.setdefault(unit, []).extend(range(index * area, (index + 1) * area))
    by_length: dict[int, list[int]] = {}
    for unit, owned in columns.items():
        by_length.setdefault(len(owned), []).append(unit)
    pairs = tuple(
        (torch.tensor(members), torch.tensor([columns[u] for u in members]))
        for members in by_length.values()
    )
    return Reader(layer=layer, columns=pairs)


def columns_of(reader: Reader, removed: Sequence[int]) -> Tensor:
    """Return the columns of the units at some positions of the group, shape [k]."""
    gone = set(removed)
    parts = [
        owned[torch.tensor([p in gone for p in members.tolist()])].flatten()
        for members, owned in reader.columns
    ]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
