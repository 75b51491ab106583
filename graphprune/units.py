"""Removal units: the smallest sets of coupled channels that can go together and leave an exact program.

A channel that no constraint names is a unit of its own. Rows of a nest (heads of a split, groups of a
convolution, halves of a shuffle) must keep equal counts, so channels of different rows are tied together, the
least important of each row first. Which rows a channel stands in is its *signature*; channels with equal
signatures form a cell. A unit that takes the same fraction of every cell takes the same number from every row
of every nest: that is all a nest asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.cost import Keep
from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms

__all__ = ["GRANULARITIES", "Flags", "Granularity", "Units", "find_units"]

Granularity = Literal["channels", "heads"]
GRANULARITIES: tuple[Granularity, ...] = ("channels", "heads")
Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Units:
    """All removal units, as arrays; unit `i` holds ``channels[starts[i]:starts[i + 1]]``."""

    channels: Atoms
    starts: Atoms
    """Shape (len + 1,)."""
    group: Atoms
    """The dependency group that each unit counts for."""
    score: Scores
    """Mean importance of each unit's channels; low goes first."""
    is_head: Flags
    """Whether a unit is an attention head."""

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.group)

    def members(self, unit: int) -> Atoms:
        """Return the coupled channels of a unit."""
        return self.channels[self.starts[unit] : self.starts[unit + 1]]

    @cached_property
    def owner(self) -> Atoms:
        """For each entry of `channels`, its unit."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def without(self, removed: Flags, num_channels: int) -> Keep:
        """Return the choice that removes the flagged units."""
        keep = np.ones(num_channels, np.bool_)
        keep[self.channels[removed[self.owner]]] = False
        return keep


def find_units(
    groups: DependencyGroups, scores: Scores, *, granularity: Sequence[Granularity] = ("channels",)
) -> Units:
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
    blocks = groups.blocks
    heads = np.zeros(groups.num_channels, np.bool_)
    heads[blocks.rows[blocks.is_head]] = True
    free = ~groups.pinned
    sets: list[Atoms] = []
    if "channels" in granularity:
        sets += _channel_sets(groups, scores, owner, free & ~heads)
    num_channel_sets = len(sets)
    if "heads" in granularity:
        sets += _head_sets(groups, owner, free & heads)
    return _as_units(sets, num_channel_sets, scores, owner)


def _as_units(sets: list[Atoms], num_channel_sets: int, scores: Scores, owner: Atoms) -> Units:
    """Put sets of channels into arrays, in group order."""
    lengths = np.array([len(s) for s in sets], dtype=np.int64)
    flat = np.concatenate(sets) if sets else np.zeros(0, np.int64)
    unit_of = np.repeat(np.arange(len(sets)), lengths)
    owned = owner[flat] >= 0
    group = np.full(len(sets), np.iinfo(np.int64).max)
    np.minimum.at(group, unit_of[owned], owner[flat[owned]])
    count = np.bincount(unit_of[owned], minlength=len(sets))
    total = np.bincount(unit_of[owned], weights=scores[flat[owned]], minlength=len(sets))
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(lengths[order])])
    return Units(
        channels=np.concatenate([sets[i] for i in order]) if sets else flat,
        starts=starts,
        group=group[order],
        score=(total / np.maximum(1, count))[order],
        is_head=order >= num_channel_sets,
    )


def _channel_sets(
    groups: DependencyGroups, scores: Scores, owner: Atoms, free: Flags
) -> list[Atoms]:
    composite = np.zeros(groups.num_channels, np.bool_)
    composite[groups.blocks.rows] = True
    nested = np.zeros(groups.num_channels, np.bool_)
    sets: list[Atoms] = []
    for cluster in _clusters(groups.nests):
        for array in cluster:
            nested[array] = True
        sets += _tied(cluster, scores, owner, free)
    alone = free & (owner >= 0) & ~nested
    sets += list(np.flatnonzero(alone & ~composite)[:, None])
    whole = (_with_members(groups, int(c)) for c in np.flatnonzero(alone & composite))
    return [*sets, *(w for w in whole if w is not None)]


def _with_members(groups: DependencyGroups, channel: int) -> Atoms | None:
    """Return `channel` and what goes with it when it is a block; None where a part of it must stay."""
    keep = np.ones(groups.num_channels, np.bool_)
    keep[channel] = False
    removed = np.flatnonzero(~groups.close(keep))
    return None if groups.pinned[removed].any() else removed


def _head_sets(groups: DependencyGroups, owner: Atoms, heads: Flags) -> list[Atoms]:
    sets: dict[bytes, Atoms] = {}
    for channel in np.flatnonzero(heads):
        removed = _with_members(groups, int(channel))
        if removed is not None and (owner[removed] >= 0).any():
            sets[removed.tobytes()] = removed
    return list(sets.values())


# -- nests --------------------------------------------------------------------------------------------------------


def _clusters(nests: Iterable[Atoms]) -> list[list[Atoms]]:
    """Return nests, as 2-D arrays of rows, grouped so that those which share channels are together."""
    rows = (n.reshape(-1, n.shape[-1]) for n in nests)
    arrays = list({(a.tobytes(), a.shape): a for a in rows}.values())
    if not arrays:
        return []
    channels = np.concatenate([a.ravel() for a in arrays])
    number = np.repeat(np.arange(len(arrays)), [a.size for a in arrays])
    size = len(arrays) + int(channels.max()) + 1
    graph = coo_array(
        (np.ones(len(number), np.bool_), (number, len(arrays) + channels)), shape=(size, size)
    )
    label = connected_components(graph, directed=False)[1][: len(arrays)]
    clusters: dict[int, list[Atoms]] = {}
    for array, mark in zip(arrays, label.tolist(), strict=True):
        clusters.setdefault(mark, []).append(array)
    return list(clusters.values())


def _tied(cluster: list[Atoms], scores: Scores, owner: Atoms, free: Flags) -> list[Atoms]:
    """Return the units of a cluster of nests."""
    channels, counts = _signatures(cluster)
    _, cell_of = np.unique(counts, axis=0, return_inverse=True)
    cell_of = cell_of.ravel()
    sets: list[Atoms] = []
    tied: list[Atoms] = []
    for cell in range(int(cell_of.max()) + 1):
        inside = channels[cell_of == cell]
        if _is_balanced(counts[np.argmax(cell_of == cell)], cluster):
            sets += list(inside[free[inside] & (owner[inside] >= 0)][:, None])
        else:
            tied.append(inside)
    flat = np.concatenate(tied) if tied else np.zeros(0, np.int64)
    if not len(flat) or not free[flat].all() or not (owner[flat] >= 0).any():
        return sets  # a row with a pinned channel holds all rows of its nest back
    count = math.gcd(*map(len, tied))
    ranked = [cell[np.argsort(scores[cell], kind="stable")].reshape(count, -1) for cell in tied]
    together = np.concatenate(ranked, axis=1)
    return [*sets, *(unit for unit in together if (owner[unit] >= 0).any())]


def _signatures(cluster: list[Atoms]) -> tuple[Atoms, Atoms]:
    """Return the channels of a cluster, and how often each stands in each row of each nest: shape (channels, rows)."""
    channels, position = np.unique(
        np.concatenate([a.ravel() for a in cluster]), return_inverse=True
    )
    row = np.concatenate([np.repeat(np.arange(len(a)), a.shape[1]) for a in cluster])
    offset = np.cumsum([0, *(len(a) for a in cluster)])
    row += np.repeat(offset[:-1], [a.size for a in cluster])
    counts = np.zeros((len(channels), int(offset[-1])), np.int64)
    np.add.at(counts, (position.ravel(), row), 1)
    return channels, counts


def _is_balanced(signature: Atoms, cluster: list[Atoms]) -> bool:
    """Whether removing a channel of this signature takes the same number from every row of every nest."""
    ends = np.cumsum([len(a) for a in cluster])
    return all((part == part[0]).all() for part in np.split(signature, ends[:-1]))
