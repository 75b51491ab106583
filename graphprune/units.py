"""Removal units: the smallest sets of coupled channels that can go together and leave an exact program.

A channel that no constraint names is a unit of its own. Rows of a nest (heads of a split, groups of a convolution, halves
of a shuffle) must keep equal counts, so channels of different rows are tied together, the least important of each row
first. Which rows a channel stands in is its *signature*; channels with equal signatures form a cell. A unit that takes
the same fraction of every cell takes the same number from every row of every nest: that is all a nest asks for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms

__all__ = ["GRANULARITIES", "Granularity", "Unit", "find_units"]

Granularity = Literal["channels", "heads"]
GRANULARITIES: tuple[Granularity, ...] = ("channels", "heads")


@dataclass(frozen=True)
class Unit:
    """Coupled channels that go together."""

    channels: Atoms
    group: int
    """The dependency group that the unit counts for."""
    score: float
    """Mean importance of its channels; low goes first."""
    kind: Granularity


def find_units(
    groups: DependencyGroups,
    scores: NDArray[np.float64],
    *,
    granularity: Sequence[Granularity] = ("channels",),
) -> list[Unit]:
    """Return every removal unit of a program.

    Args:
        groups: The analysis.
        scores: Importance of every coupled channel, shape (num_channels,).
        granularity: What may go: single channels, whole attention heads, or both.

    Returns:
        Units in group order. Units of different granularity may overlap; units of one granularity do not.
    """
    owner = np.full(groups.num_channels, -1, np.int64)
    for group in groups:
        owner[group.channels] = group.index
    heads = np.zeros(groups.num_channels, np.bool_)
    heads[groups.blocks.rows[groups.blocks.is_head]] = True
    removable = ~groups.pinned
    units: list[Unit] = []
    if "channels" in granularity:
        units += _channel_units(groups, scores, owner, removable & ~heads)
    if "heads" in granularity:
        units += _head_units(groups, scores, owner, removable & heads)
    return sorted(units, key=lambda u: (u.group, u.channels[0]))


def _unit(channels: Atoms, scores: NDArray[np.float64], owner: Atoms, kind: Granularity) -> Unit:
    owned = channels[owner[channels] >= 0]
    return Unit(channels, int(owner[owned[0]]), float(scores[owned].mean()), kind)


def _channel_units(
    groups: DependencyGroups,
    scores: NDArray[np.float64],
    owner: Atoms,
    removable: NDArray[np.bool_],
) -> list[Unit]:
    blocks = groups.blocks
    composite = np.zeros(groups.num_channels, np.bool_)
    composite[blocks.rows] = True
    nested = np.zeros(groups.num_channels, np.bool_)
    units = []
    for cluster in _clusters(groups):
        for array in cluster:
            nested[array] = True
        units += _tied(cluster, scores, owner, removable)
    alone = removable & (owner >= 0) & ~nested
    for channel in np.flatnonzero(alone & ~composite):
        units.append(_unit(np.array([channel]), scores, owner, "channels"))
    for channel in np.flatnonzero(alone & composite):
        if (taken := _with_members(groups, int(channel))) is not None:
            units.append(_unit(taken, scores, owner, "channels"))
    return units


def _with_members(groups: DependencyGroups, channel: int) -> Atoms | None:
    """Return `channel` and what goes with it when it is a block; None where a part of it must stay."""
    keep = np.ones(groups.num_channels, np.bool_)
    keep[channel] = False
    removed = np.flatnonzero(~groups.close(keep))
    return None if groups.pinned[removed].any() else removed


def _head_units(
    groups: DependencyGroups, scores: NDArray[np.float64], owner: Atoms, heads: NDArray[np.bool_]
) -> list[Unit]:
    units: dict[bytes, Unit] = {}
    for channel in np.flatnonzero(heads):
        removed = _with_members(groups, int(channel))
        if removed is not None and (owner[removed] >= 0).any():
            units.setdefault(removed.tobytes(), _unit(removed, scores, owner, "heads"))
    return list(units.values())


def _clusters(groups: DependencyGroups) -> list[list[Atoms]]:
    """Return nests (as 2-D arrays of rows) that share channels, together."""
    arrays = [n.reshape(-1, n.shape[-1]) for n in groups.nests]
    arrays = list({a.tobytes() + bytes(a.shape): a for a in arrays}.values())
    leader: dict[int, int] = {}
    parent = list(range(len(arrays)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, array in enumerate(arrays):
        for channel in np.unique(array).tolist():
            parent[find(leader.setdefault(channel, i))] = find(i)
    clusters: dict[int, list[Atoms]] = {}
    for i, array in enumerate(arrays):
        clusters.setdefault(find(i), []).append(array)
    return list(clusters.values())


def _tied(
    cluster: list[Atoms],
    scores: NDArray[np.float64],
    owner: Atoms,
    removable: NDArray[np.bool_],
) -> list[Unit]:
    """Return the units of a cluster of nests."""
    signatures: dict[int, Counter[tuple[int, int]]] = {}
    for number, array in enumerate(cluster):
        for row, channels in enumerate(array.tolist()):
            for channel in channels:
                signatures.setdefault(channel, Counter())[number, row] += 1
    cells: dict[frozenset[tuple[tuple[int, int], int]], list[int]] = {}
    for channel, signature in signatures.items():
        cells.setdefault(frozenset(signature.items()), []).append(channel)
    units: list[Unit] = []
    tied: list[list[int]] = []
    for mark, channels in cells.items():
        if _is_balanced(dict(mark), cluster):
            alone = [c for c in channels if removable[c] and owner[c] >= 0]
            units += [_unit(np.array([c]), scores, owner, "channels") for c in alone]
        else:
            tied.append(channels)
    flat = [c for cell in tied for c in cell]
    if not flat or not removable[flat].all() or not (owner[flat] >= 0).any():
        return units  # a row with a pinned channel holds all rows of its nest back
    count = math.gcd(*map(len, tied))
    ranked = [sorted(cell, key=scores.__getitem__) for cell in tied]
    for i in range(count):
        parts = [cell[i * len(cell) // count : (i + 1) * len(cell) // count] for cell in ranked]
        together = np.array([c for part in parts for c in part])
        if (owner[together] >= 0).any():
            units.append(_unit(together, scores, owner, "channels"))
    return units


def _is_balanced(signature: dict[tuple[int, int], int], cluster: list[Atoms]) -> bool:
    """Whether removing a channel of this signature takes the same number from every row of every nest it is in."""
    for number in {n for n, _ in signature}:
        counts = {signature.get((number, row), 0) for row in range(len(cluster[number]))}
        if len(counts) > 1:
            return False
    return True
