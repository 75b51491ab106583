"""Removal units: the smallest sets of coupled channels that can go together and leave an exact program.

A channel that no constraint names is a unit of its own. Rows of a nest (heads of a split, groups of a
convolution, halves of a shuffle) must keep equal counts, so channels of different rows are tied together, the
least important of each row first. Which rows a channel stands in is its *signature*; channels with equal
signatures form a cell. A unit that takes the same fraction of every cell takes the same number from every row
of every nest: that is all a nest asks for.

Rows of a grid (heads that share a rotation) must keep the same columns, so a column is one *element* here: it has the
sum of its channels' signatures, and goes as they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.cost import Keep
from graphprune.errors import UsageError
from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms

__all__ = [
    "GRANULARITIES",
    "Bundles",
    "Flags",
    "Granularity",
    "Units",
    "find_units",
    "parse_granularity",
]

Granularity = Literal[
    "channels", "widths", "head-dims", "query-key-dims", "value-dims", "heads", "query-heads"
]
GRANULARITIES: tuple[Granularity, ...] = (
    "channels",
    "widths",
    "head-dims",
    "query-key-dims",
    "value-dims",
    "heads",
    "query-heads",
)
"""What may go: any channel; those outside of attention heads; those inside them, or only the ones that queries and keys
meet along, or only those of values; whole heads, a key and value head with all its query heads; and of query heads that
share one, as many of each."""
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


@dataclass(frozen=True)
class Bundles:
    """Units that go together; bundle `i` holds ``units[starts[i]:starts[i + 1]]``."""

    units: Atoms
    starts: Atoms
    """Shape (len + 1,)."""

    @classmethod
    def of(cls, units: Sequence[Atoms], lengths: Sequence[Atoms]) -> Bundles:
        """Put pieces behind one another: the units of each, and the lengths of its bundles."""
        none = np.zeros(0, np.int64)
        ends = np.cumsum(np.concatenate([none, *lengths]))
        return cls(np.concatenate([none, *units]), np.concatenate([[0], ends]))

    def __len__(self) -> int:
        """Return the number of bundles."""
        return len(self.starts) - 1

    def __getitem__(self, bundle: int) -> Atoms:
        """Return the units of a bundle."""
        return self.units[self.starts[bundle] : self.starts[bundle + 1]]

    def between(self, start: int, stop: int) -> list[Atoms]:
        """Return the units of some bundles, one array for each."""
        return [self[i] for i in range(max(0, start), min(stop, len(self)))]

    @cached_property
    def lengths(self) -> Atoms:
        """The number of units in each bundle."""
        return np.diff(self.starts)

    @cached_property
    def owner(self) -> Atoms:
        """For each entry of `units`, its bundle."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def taken(self, order: Atoms) -> Bundles:
        """Return the bundles of the given numbers, in that order."""
        positions = _runs(self.starts[:-1], self.lengths, order)
        return Bundles.of([self.units[positions]], [self.lengths[order]])

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of one value per unit over each bundle."""
        weights = values[self.units]
        return np.asarray(np.bincount(self.owner, weights, minlength=len(self)), dtype=np.float64)

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of one value per unit over each bundle."""
        return np.asarray(self.sums(values) / self.lengths)


def parse_granularity(text: str) -> tuple[Granularity, ...]:
    """Parse names of `GRANULARITIES`, several with commas.

    Raises:
        UsageError: Something else is named.
    """
    names = [part.strip() for part in text.split(",")]
    if unknown := [n for n in names if n not in GRANULARITIES]:
        raise UsageError(
            f"granularity {unknown[0]!r} is not known; known: {', '.join(GRANULARITIES)}, and for a whole compilation "
            "blocks"
        )
    return tuple(g for g in GRANULARITIES if g in names)


def find_units(
    groups: DependencyGroups, scores: Scores, *, granularity: Sequence[Granularity] = ("channels",)
) -> Units:
    """Return every removal unit of a program.

    Args:
        groups: The analysis.
        scores: Importance of every coupled channel, shape (num_channels,).
        granularity: What may go; see `GRANULARITIES`.

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
    parts: list[_Sets] = []
    if set(granularity) - {"heads", "query-heads"}:
        sets = _channel_sets(groups, scores, owner, free & ~heads)
        parts += [_wanted(groups, part, granularity) for part in sets]
    num_channel_sets = sum(len(p.lengths) for p in parts)
    if "heads" in granularity or "query-heads" in granularity:
        alone, tied = _head_sets(groups, scores, owner, free)
        parts += [alone] if "heads" in granularity else []
        parts += [tied] if "query-heads" in granularity else []
    return _as_units(parts, num_channel_sets, scores, owner)


def _wanted(groups: DependencyGroups, sets: _Sets, granularity: Sequence[Granularity]) -> _Sets:
    """Return the sets that a granularity speaks of."""
    if "channels" in granularity or not len(sets.lengths):
        return sets
    inside = np.zeros(groups.num_channels, np.bool_)
    inside[groups.blocks.members[groups.blocks.is_head[groups.blocks.owner]]] = True
    met = np.zeros(groups.num_channels, np.bool_)
    for atoms in groups.labels.table.products:
        met[groups.channel_of[atoms]] = True
    number = np.repeat(np.arange(len(sets.lengths)), sets.lengths)
    in_head, meets = (
        np.bincount(number, flags[sets.channels], minlength=len(sets.lengths)) > 0
        for flags in (inside, inside & met)
    )
    kinds = {
        "widths": ~in_head,
        "head-dims": in_head,
        "query-key-dims": meets,
        "value-dims": in_head & ~meets,
    }
    chosen = np.logical_or.reduce([kinds[name] for name in granularity if name in kinds])
    return _Sets(sets.channels[chosen[number]], sets.lengths[chosen])


@dataclass(frozen=True)
class _Sets:
    """Sets of channels, one behind the other."""

    channels: Atoms
    lengths: Atoms

    @classmethod
    def of(cls, sets: Iterable[Atoms]) -> _Sets:
        arrays = list(sets)
        lengths = np.array([len(a) for a in arrays], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int64), *arrays]), lengths)

    @classmethod
    def singles(cls, channels: Atoms) -> _Sets:
        return cls(channels, np.ones(len(channels), np.int64))

    def __iter__(self) -> Iterator[Atoms]:
        ends = np.cumsum(self.lengths).tolist()
        return (self.channels[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _as_units(parts: list[_Sets], num_channel_sets: int, scores: Scores, owner: Atoms) -> Units:
    """Put sets of channels into arrays, in group order."""
    none = np.zeros(0, np.int64)
    flat = np.concatenate([none, *(p.channels for p in parts)])
    lengths = np.concatenate([none, *(p.lengths for p in parts)])
    count = len(lengths)
    unit_of = np.repeat(np.arange(count), lengths)
    owned = owner[flat] >= 0
    group = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(group, unit_of[owned], owner[flat[owned]])
    number = np.bincount(unit_of[owned], minlength=count)
    total = np.bincount(unit_of[owned], weights=scores[flat[owned]], minlength=count)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(lengths[order])])
    return Units(
        channels=flat[_runs(np.cumsum(lengths) - lengths, lengths, order)],
        starts=starts,
        group=group[order],
        score=(total / np.maximum(1, number))[order],
        is_head=order >= num_channel_sets,
    )


def _runs(starts: Atoms, lengths: Atoms, order: Atoms) -> Atoms:
    """Return the positions of runs, taken in another order: run `i` is at ``starts[i] + arange(lengths[i])``."""
    taken = lengths[order]
    ends = np.cumsum(taken)
    shift: Atoms = np.repeat(starts[order] - (ends - taken), taken)
    return shift + np.arange(len(shift))


def _channel_sets(
    groups: DependencyGroups, scores: Scores, owner: Atoms, free: Flags
) -> list[_Sets]:
    composite = np.zeros(groups.num_channels, np.bool_)
    composite[groups.blocks.rows] = True
    elements = _Elements.of(groups, scores, owner, free)
    nested = np.zeros(groups.num_channels, np.bool_)
    for column in groups.columns:
        nested[column] = True
    sets: list[_Sets] = []
    standing = elements.is_column & elements.free & elements.owned
    for cluster in _clusters([elements.of_channel[nest] for nest in groups.nests]):
        for array in cluster:
            standing[array] = False
        sets += [_closed(groups, elements.expanded(s)) for s in _tied(cluster, elements)]
    for nest in groups.nests:
        nested[nest] |= len(_rows(nest)) > 1
    sets.append(_closed(groups, elements.expanded(_Sets.singles(np.flatnonzero(standing)))))
    alone = free & (owner >= 0) & ~nested
    whole = (_with_members(groups, int(c)) for c in np.flatnonzero(alone & composite))
    return [
        *sets,
        _Sets.singles(np.flatnonzero(alone & ~composite)),
        _Sets.of(w for w in whole if w is not None),
    ]


@dataclass(frozen=True)
class _Elements:
    """What units are made of: single channels, numbered as they are, and columns of grids, numbered behind them."""

    of_channel: Atoms
    columns: tuple[Atoms, ...]
    score: Scores
    """Mean importance of what a parameter holds of an element."""
    free: Flags
    owned: Flags
    """Whether a parameter holds any of an element."""

    @classmethod
    def of(cls, groups: DependencyGroups, scores: Scores, owner: Atoms, free: Flags) -> _Elements:
        count = groups.num_channels
        of_channel = np.arange(count)
        score = np.concatenate([scores, np.zeros(len(groups.columns))])
        may = np.concatenate([free, np.zeros(len(groups.columns), np.bool_)])
        owned = np.concatenate([owner >= 0, np.zeros(len(groups.columns), np.bool_)])
        for number, column in enumerate(groups.columns):
            held = column[owner[column] >= 0]
            of_channel[column] = count + number
            may[count + number] = free[column].all()
            owned[count + number] = len(held) > 0
            score[count + number] = scores[held].mean() if len(held) else 0.0
        return cls(of_channel, groups.columns, score, may, owned)

    @cached_property
    def is_column(self) -> Flags:
        """Which elements are columns."""
        flags = np.zeros(len(self.score), np.bool_)
        flags[len(self.of_channel) :] = True
        return flags

    def expanded(self, sets: _Sets) -> _Sets:
        """Return sets of elements as sets of channels."""
        if not self.columns or not self.is_column[sets.channels].any():
            return sets
        count = len(self.of_channel)
        widths = np.ones(len(self.score), np.int64)
        widths[count:] = [len(column) for column in self.columns]
        flat = np.concatenate([np.arange(count), *self.columns])
        starts = np.cumsum(widths) - widths
        owner = np.repeat(np.arange(len(sets.lengths)), sets.lengths)
        lengths = np.bincount(owner, widths[sets.channels], minlength=len(sets.lengths))
        return _Sets(flat[_runs(starts, widths, sets.channels)], lengths.astype(np.int64))


def _closed(groups: DependencyGroups, sets: _Sets) -> _Sets:
    """Return sets that share nothing, each with what goes along: members of its blocks that are outside of it."""
    blocks = groups.blocks
    if not len(blocks.rows):
        return sets
    of_channel = np.full(groups.num_channels, -1)
    of_channel[sets.channels] = np.repeat(np.arange(len(sets.lengths)), sets.lengths)
    rows = of_channel[blocks.rows][blocks.owner]
    open_sets = set(rows[(rows >= 0) & (of_channel[blocks.members] != rows)].tolist())
    if not open_sets:
        return sets
    return _Sets.of(
        groups.goes_with(members) if number in open_sets else members
        for number, members in enumerate(sets)
    )


def _with_members(groups: DependencyGroups, channel: int) -> Atoms | None:
    """Return `channel` and what goes with it when it is a block; None where a part of it must stay."""
    removed = groups.goes_with([channel])
    return None if groups.pinned[removed].any() else removed


def _head_sets(
    groups: DependencyGroups, scores: Scores, owner: Atoms, free: Flags
) -> tuple[_Sets, _Sets]:
    """Return the heads that go alone, and query heads that share keys and values, tied together: one of each."""
    blocks = groups.blocks
    is_head = np.zeros(groups.num_channels, np.bool_)
    is_head[blocks.rows[blocks.is_head]] = True
    number: dict[bytes, int] = {}
    sets: list[Atoms] = []
    of_channel = np.full(groups.num_channels, -1)
    for channel in np.flatnonzero(is_head & free):
        removed = _with_members(groups, int(channel))
        if removed is not None and (owner[removed] >= 0).any():
            of_channel[channel] = number.setdefault(removed.tobytes(), len(sets))
            sets += [removed] if of_channel[channel] == len(sets) else []
    shared = [nest for nest in groups.nests if is_head[nest].any()]
    held = np.unique(np.concatenate([np.zeros(0, np.int64), *(n.ravel() for n in shared)]))
    held = held[of_channel[held] < 0]
    of_channel[held] = len(sets) + np.arange(len(held))
    is_set = np.arange(len(sets) + len(held)) < len(sets)
    score = np.zeros(len(is_set))
    score[is_set] = [scores[s[owner[s] >= 0]].mean() for s in sets]
    elements = _Elements(of_channel, columns=(), score=score, free=is_set, owned=is_set)
    alone = is_set.copy()
    single, tied = list[Atoms](), list[Atoms]()
    for cluster in _clusters(of_channel[nest] for nest in shared):
        for array in cluster:
            alone[array] = False
        for members in (m for part in _tied(cluster, elements) for m in part):
            together = np.unique(np.concatenate([sets[m] for m in members]))
            (single if len(members) == 1 else tied).append(together)
    single += [sets[i] for i in np.flatnonzero(alone)]
    return _Sets.of(single), _Sets.of(tied)


# -- nests --------------------------------------------------------------------------------------------------------


def _clusters(nests: Iterable[Atoms]) -> list[list[Atoms]]:
    """Return nests, as 2-D arrays of rows, grouped so that those which share channels are together."""
    rows = (_rows(n) for n in nests)
    arrays = list({(a.tobytes(), a.shape): a for a in rows if len(a) > 1}.values())
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


def _rows(nest: Atoms) -> Atoms:
    """Return the rows of a nest; one whose rows are a single channel each, such as a pixel shuffle's, ties nothing."""
    while nest.ndim > 1 and bool((nest == nest[..., :1]).all()):
        nest = nest[..., 0]
    return nest.reshape(-1, nest.shape[-1])


def _tied(cluster: list[Atoms], elements: _Elements) -> list[_Sets]:
    """Return the units of a cluster of nests, as sets of elements."""
    scores, free, owned = elements.score, elements.free, elements.owned
    channels, counts = _signatures(cluster)
    words = np.random.default_rng(0).integers(1, 2**63, size=counts.shape[1], dtype=np.int64)
    _, cell_of = np.unique(counts @ words, return_inverse=True)  # equal rows have equal sums
    sets: list[_Sets] = []
    tied: list[Atoms] = []
    for cell in range(int(cell_of.max()) + 1):
        inside = channels[cell_of == cell]
        if _is_balanced(counts[np.argmax(cell_of == cell)], cluster):
            sets.append(_Sets.singles(inside[free[inside] & owned[inside]]))
        else:
            tied.append(inside)
    flat = np.concatenate(tied) if tied else np.zeros(0, np.int64)
    if not len(flat) or not free[flat].all() or not owned[flat].any():
        return sets  # a row with a pinned channel holds all rows of its nest back
    count = math.gcd(*map(len, tied))
    ranked = [cell[np.argsort(scores[cell], kind="stable")].reshape(count, -1) for cell in tied]
    together = np.concatenate(ranked, axis=1)
    return [*sets, _Sets.of(unit for unit in together if owned[unit].any())]


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
    """Whether removing a channel of this signature takes equally from every row of every nest, or whole rows."""
    ends = np.cumsum([len(a) for a in cluster])
    return all(
        bool((part == part[0]).all() or ((part == 0) | (part == nest.shape[1])).all())
        for part, nest in zip(np.split(signature, ends[:-1]), cluster, strict=True)
    )
