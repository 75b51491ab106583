"""Coupled channels, dependency groups, and the constraints on removing them.

Labels say which atoms are the same; the connected components of those pairs are the *coupled channels*,
numbered from 0. Coupled channels that live in the same places (parameter dimensions) form a *dependency group*.
A choice of channels is a boolean array `keep` over coupled channels; `DependencyGroups.close` completes one, so
that blocks (heads, convolution groups) go when their last member does, and take their members along.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.contract import Facts
from graphprune.cost import CostModel, Keep
from graphprune.labels.atoms import Atoms, AtomTable
from graphprune.labels.propagate import propagate
from graphprune.labels.trace import NO_RULE, Labels, tensor_infos
from graphprune.outcome import Kept
from graphprune.program import Program, Slices

__all__ = ["DependencyGroup", "DependencyGroups", "Place", "analyze"]


@dataclass(frozen=True)
class Place:
    """One dimension of one parameter or buffer."""

    name: str
    dim: int

    def __str__(self) -> str:
        """Return ``name[dim]``."""
        return f"{self.name}[{self.dim}]"


@dataclass(frozen=True)
class DependencyGroup:
    """Coupled channels that live in the same places, so that removing one means the same slices everywhere."""

    index: int
    channels: Atoms
    """The coupled channels, in the order of their first place."""
    places: tuple[Place, ...]
    pinned: str | None
    """Why no channel of the group can go; None where they can."""

    def __len__(self) -> int:
        """Return the number of coupled channels."""
        return len(self.channels)

    @property
    def name(self) -> str:
        """What people call the group: the parameter that makes its channels."""
        return str(self.places[0])

    def __str__(self) -> str:
        """Return one line: size, places, and why it is pinned."""
        shown = ", ".join(map(str, self.places[:4])) + (", ..." if len(self.places) > 4 else "")
        reason = f"  pinned: {self.pinned}" if self.pinned else ""
        return f"group {self.index}: {len(self)} channels in {len(self.places)} places ({shown}){reason}"


@dataclass(frozen=True)
class _Blocks:
    """All block atoms as coupled channels, members flattened."""

    rows: Atoms
    members: Atoms
    starts: Atoms
    is_head: NDArray[np.bool_]

    @classmethod
    def of(cls, table: AtomTable, channel_of: Atoms) -> _Blocks:
        rows, members, lengths, heads = [], [], [], []
        for block in table.blocks:
            rows.append(channel_of[block.rows])
            members.append(channel_of[block.members].ravel())
            lengths += [block.members.shape[1]] * len(block.rows)
            heads += [block.is_head] * len(block.rows)
        empty = np.zeros(0, np.int64)
        return cls(
            rows=np.concatenate(rows) if rows else empty,
            members=np.concatenate(members) if members else empty,
            starts=np.cumsum([0, *lengths])[:-1] if lengths else empty,
            is_head=np.array(heads, dtype=np.bool_),
        )

    @cached_property
    def owner(self) -> Atoms:
        """For each entry of `members`, the position of its row."""
        lengths = np.diff([*self.starts, len(self.members)])
        return np.repeat(np.arange(len(self.rows)), lengths)

    @cached_property
    def inside(self) -> list[list[int]]:
        """The members of each block, by its position."""
        return [part.tolist() for part in np.split(self.members, self.starts[1:])]

    @cached_property
    def at(self) -> dict[int, list[int]]:
        """For each channel that is a block, the positions of the blocks that it is."""
        return _positions(self.rows, np.arange(len(self.rows)))

    @cached_property
    def holding(self) -> dict[int, list[int]]:
        """For each member, the positions of the blocks that hold it, as often as they do."""
        return _positions(self.members, self.owner)


def _positions(channels: Atoms, blocks: Atoms) -> dict[int, list[int]]:
    """Return the blocks that stand beside each channel."""
    found: dict[int, list[int]] = {}
    for channel, block in zip(channels.tolist(), blocks.tolist(), strict=True):
        found.setdefault(channel, []).append(block)
    return found


@dataclass(frozen=True)
class DependencyGroups(Facts):
    """What the analysis of a program found; changes nothing."""

    labels: Labels
    channel_of: Atoms
    """Atom -> coupled channel."""
    num_channels: int
    """Number of coupled channels, those without a parameter included."""
    groups: tuple[DependencyGroup, ...]
    pinned: NDArray[np.bool_]
    """Per coupled channel: it may never be removed."""
    cost: CostModel
    kept: tuple[Kept, ...]
    """Groups that cannot be pruned, and why."""
    blocks: _Blocks = field(repr=False)

    def __len__(self) -> int:
        """Return the number of dependency groups."""
        return len(self.groups)

    def __iter__(self) -> Iterator[DependencyGroup]:
        """Iterate over the dependency groups in graph order."""
        return iter(self.groups)

    def __getitem__(self, index: int) -> DependencyGroup:
        """Return one dependency group."""
        return self.groups[index]

    def __str__(self) -> str:
        """Return one line per group."""
        total = sum(map(len, self.groups))
        head = f"{len(self)} dependency groups, {total} coupled channels"
        return "\n".join([head, *(f"  {group}" for group in self.groups)])

    def channels_of(self, place: Place) -> Atoms:
        """Return the coupled channel of every index along a parameter dimension."""
        return self.channel_of[self.labels.sources[place.name].atoms[place.dim]]

    def kept_indices(self, keep: Keep) -> dict[str, dict[int, Atoms]]:
        """Return parameter or buffer -> dimension -> what is left of it, where these channels leave less than all."""
        found: dict[str, dict[int, Atoms]] = {}
        for place in self.places:
            kept = keep[self.channels_of(place)]
            if not kept.all():
                found.setdefault(place.name, {})[place.dim] = np.flatnonzero(kept)
        return found

    def slices(self, keep: Keep) -> Slices:
        """Return the same as plain numbers."""
        found = self.kept_indices(keep)
        return {n: {d: tuple(kept.tolist()) for d, kept in ds.items()} for n, ds in found.items()}

    @cached_property
    def summed_over(self) -> Mapping[str, Atoms]:
        """For each node that sums or takes statistics over channels, these coupled channels, in order."""
        found: dict[str, list[Atoms]] = {}
        for consumer in self.labels.consumers:
            channels = self.channel_of[consumer.field.atoms].ravel()
            found.setdefault(consumer.node, []).append(channels)
        return {node: np.unique(np.concatenate(parts)) for node, parts in found.items()}

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Every labelled dimension of every parameter and buffer."""
        sources = self.labels.sources.values()
        return tuple(Place(s.name, dim) for s in sources for dim in sorted(s.atoms))

    @cached_property
    def axes(self) -> tuple[Atoms, ...]:
        """The coupled channels of every labelled dimension, each once: none of these may become empty."""
        arrays: dict[int, Atoms] = {}
        for source in self.labels.sources.values():
            arrays.update((id(a), a) for a in source.atoms.values())
        inside = [value for call in self.labels.calls for value in (call.before, call.after)]
        for info in tensor_infos([*self.labels.values.values(), *inside]):
            arrays.update((id(f.atoms), f.atoms) for f in info.fields)
        mapped = (self.channel_of[a].ravel() for a in arrays.values())
        return tuple({a.tobytes(): a for a in mapped if a.size}.values())

    @cached_property
    def nests(self) -> tuple[Atoms, ...]:
        """Arrays of coupled channels whose rows (last axis) keep equal counts, and so on outwards."""
        return tuple(self.channel_of[nest.atoms] for nest in self.labels.table.nests)

    @cached_property
    def repeats(self) -> tuple[tuple[Atoms, Atoms], ...]:
        """Places of copies of heads, and what was laid out in them: as many places are left as in each row."""
        found = self.labels.table.repeats
        return tuple((self.channel_of[places], self.channel_of[rows]) for places, rows in found)

    @cached_property
    def grids(self) -> tuple[Atoms, ...]:
        """Arrays of coupled channels whose rows, where they are left, keep the same columns."""
        return tuple(self.channel_of[grid.atoms] for grid in self.labels.table.grids)

    @cached_property
    def columns(self) -> tuple[Atoms, ...]:
        """What goes together, unless whole rows go: all of a column of a grid, and of the columns that it meets."""
        grids = self.labels.table.grids
        if not grids:
            return ()
        ends = [self.channel_of[np.broadcast_to(g.columns, g.atoms.shape)].ravel() for g in grids]
        members = [grid.ravel() for grid in self.grids]
        pair = (np.concatenate(members), np.concatenate(ends))
        graph = coo_array(
            (np.ones(len(pair[0]), np.bool_), pair), shape=(self.num_channels, self.num_channels)
        )
        label = connected_components(graph, directed=False)[1]
        involved = np.unique(np.concatenate(pair))
        order = involved[np.argsort(label[involved], kind="stable")]
        return tuple(np.split(order, np.flatnonzero(np.diff(label[order])) + 1))

    def close(self, keep: Keep) -> Keep:
        """Return `keep` without blocks whose last member is gone, and without the members of blocks that are gone.

        Where a tensor holds copies of heads, as many of them are left as every head has.
        """
        blocks, keep = self.blocks, keep.copy()
        while len(blocks.rows):
            row_kept = keep[blocks.rows] & np.logical_or.reduceat(
                keep[blocks.members], blocks.starts
            )
            after = keep.copy()
            after[blocks.rows[~row_kept]] = False
            after[blocks.members[~row_kept[blocks.owner]]] = False
            if (after == keep).all():
                break
            keep = after
        for places, rows in self.repeats:
            keep[places] = np.arange(len(places)) < keep[rows].sum(axis=-1).max()
        return keep

    def goes_with(self, channels: Iterable[int]) -> Atoms:
        """Return what goes where some channels do: themselves, their members, and blocks that nothing is left of.

        What `close` finds, by a walk from these channels alone: a model has thousands of heads to ask about.
        """
        blocks = self.blocks
        gone = set(map(int, channels))
        queue, missing = list(gone), Counter[int]()
        while queue:
            current = queue.pop()
            found = [m for block in blocks.at.get(current, ()) for m in blocks.inside[block]]
            for block in blocks.holding.get(current, ()):
                missing[block] += 1
                if missing[block] == len(blocks.inside[block]):
                    found.append(int(blocks.rows[block]))
            fresh = set(found) - gone
            gone |= fresh
            queue += fresh
        return np.array(sorted(gone))

    def broken(self, keep: Keep) -> list[Atoms]:
        """Return the channels of every nest or grid whose rows would not match, and of every tensor left empty."""
        found = [self.nests[position] for position in self._unequal(keep)]
        if (gone := np.flatnonzero(~keep & self.pinned)).size:  # a block took one along
            found.append(gone)
        return [*found, *self._uneven(keep), *self._empty(keep)]

    def _uneven(self, keep: Keep) -> list[Atoms]:
        """Return the grids whose rows would keep different columns."""
        found = []
        for grid in self.grids:
            kept = keep[grid]
            if (kept != np.logical_and.outer(kept.any(axis=1), kept.any(axis=0))).any():
                found.append(grid)
        return found

    def _unequal(self, keep: Keep) -> list[int]:
        """Return the positions in `nests` whose rows would keep unequal counts."""
        found = []
        for position, nest in enumerate(self.nests):
            present = keep[nest]
            while present.ndim > 1:
                counts = present.sum(axis=-1)
                present = counts > 0
                if len(set(counts[present].tolist())) > 1:
                    found.append(position)
                    break
        return found

    def _empty(self, keep: Keep) -> list[Atoms]:
        return [axis for axis in self.axes if not keep[axis].any()]

    def violations(self, keep: Keep) -> list[str]:
        """Return what is wrong with a choice of channels; empty for one that surgery can carry out."""
        wrong = []
        if (~keep & self.pinned).any():
            wrong.append(f"{int((~keep & self.pinned).sum())} pinned channels would go")
        if (self.close(keep) != keep).any():
            wrong.append("a block would go without its members, or the other way round")
        for position in self._unequal(keep):
            counts = keep[self.nests[position]].sum(axis=-1).ravel().tolist()[:8]
            node = self.labels.table.nests[position].node
            wrong.append(f"blocks at node {node} would keep unequal counts {counts}")
        wrong += ["heads would keep different dimensions" for _ in self._uneven(keep)]
        wrong += ["a tensor would lose all its channels" for _ in self._empty(keep)]
        return wrong

    def to_networkx(self) -> nx.Graph[str]:
        """Return a bipartite graph: groups on one side, places (parameter dimensions) on the other."""
        graph: nx.Graph[str] = nx.Graph()
        for group in self.groups:
            node = f"group {group.index}"
            graph.add_node(node, kind="group", channels=len(group), pinned=group.pinned)
            for place in group.places:
                graph.add_node(str(place), kind="place", parameter=place.name, dim=place.dim)
                graph.add_edge(node, str(place))
        return graph


def analyze(program: Program) -> DependencyGroups:
    """Find coupled channels, dependency groups, constraints and costs of a program.

    Args:
        program: What `capture` returned; not changed.

    Returns:
        The facts that choosing and removing channels need.

    Raises:
        AnalysisError: The graph does not run on the shapes of its example inputs.
    """
    labels = propagate(program)
    channel_of, num_channels = _components(labels.table)
    blocks = _Blocks.of(labels.table, channel_of)
    pinned, reasons = _pins(labels.table, channel_of, num_channels, blocks)
    groups = _dependency_groups(labels, channel_of, num_channels, pinned, reasons)
    cost = CostModel.build(program, labels, channel_of, num_channels)
    kept = [
        *_without_rules(program, labels, channel_of, cost),
        *(Kept(f"{g.name} ({len(g)} channels)", g.pinned) for g in groups if g.pinned),
    ]
    return DependencyGroups(
        labels=labels,
        channel_of=channel_of,
        num_channels=num_channels,
        groups=groups,
        pinned=pinned,
        cost=cost,
        kept=tuple(kept),
        blocks=blocks,
    )


def _components(table: AtomTable) -> tuple[Atoms, int]:
    if not table.size:
        return np.zeros(0, np.int64), 0
    if not table.pairs:
        return np.arange(table.size), table.size
    a = np.concatenate([p for p, _ in table.pairs])
    b = np.concatenate([q for _, q in table.pairs])
    matrix = coo_array((np.ones(len(a), np.bool_), (a, b)), shape=(table.size, table.size))
    count, labels = connected_components(matrix, directed=False)
    return labels.astype(np.int64), int(count)


def _without_rules(
    program: Program, labels: Labels, channel_of: Atoms, cost: CostModel
) -> Iterator[Kept]:
    """Say of every operator without a rule where it stands, and what share of the MACs its channels hold."""
    dense = max(1, cost.macs)
    for name, nodes in labels.unknown.items():
        held = cost.everything()
        for pin in labels.table.pins:
            if pin.why == NO_RULE.format(name):
                held[channel_of[pin.atoms]] = False
        share = 1 - cost.total(held).macs / dense
        places = ", ".join(_place_of(program, node) for node in dict.fromkeys(nodes))
        yield Kept(
            f"operator {name} at {places}",
            f"it has no labelling rule; what reaches it stays, and with it {share:.1%} of the MACs",
        )


def _place_of(program: Program, name: str) -> str:
    """Return a node's name, and the line of the user's code that it comes from, where the capture knows it."""
    for node in program.module.graph.nodes:
        if node.name == name:
            lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
            return (
                f"node {name} ({Path(lines[-1][0]).name}:{lines[-1][1]})"
                if lines
                else f"node {name}"
            )
    return f"node {name}"


def _pins(
    table: AtomTable, channel_of: Atoms, num_channels: int, blocks: _Blocks
) -> tuple[NDArray[np.bool_], Mapping[int, str]]:
    """Return which channels may never go; a block stays where one of its members must."""
    pinned = np.zeros(num_channels, np.bool_)
    reasons: dict[int, str] = {}
    for pin in table.pins:
        channels = channel_of[pin.atoms]
        fresh = np.unique(channels[~pinned[channels]])
        pinned[channels] = True
        reasons.update(dict.fromkeys(fresh.tolist(), f"{pin.why} (node {pin.node})"))
    sizes = np.bincount(channel_of, minlength=num_channels)
    for places, _ in table.repeats:  # copies that met something are not alike: none goes
        differ = channel_of[places][sizes[channel_of[places]] > 1]
        pinned[differ] = True
        reasons.update(dict.fromkeys(differ.tolist(), "a copy of a head that differs from others"))
    while len(blocks.rows):
        held = np.logical_or.reduceat(pinned[blocks.members], blocks.starts) & ~pinned[blocks.rows]
        if not held.any():
            break
        pinned[blocks.rows[held]] = True
        reasons.update(dict.fromkeys(blocks.rows[held].tolist(), "a part of it cannot go"))
    return pinned, reasons


def _dependency_groups(
    labels: Labels,
    channel_of: Atoms,
    num_channels: int,
    pinned: NDArray[np.bool_],
    reasons: Mapping[int, str],
) -> tuple[DependencyGroup, ...]:
    """Group channels by the set of places in which they live, told apart by the sum of random words per place."""
    places = [
        (s.name, dim, channel_of[a])
        for s in labels.sources.values()
        for dim, a in sorted(s.atoms.items())
    ]
    if not places:
        return ()
    words = np.random.default_rng(0).integers(1, 2**63, size=len(places), dtype=np.uint64)
    signature = pinned.astype(np.uint64)
    for word, (_, _, channels) in zip(words, places, strict=True):
        signature[channels] += word  # buffered: a channel that stands here twice counts once
    everywhere = np.concatenate([channels for _, _, channels in places])
    first = np.full(num_channels, len(everywhere))
    first[everywhere[::-1]] = np.arange(len(everywhere))[::-1]
    present = np.flatnonzero(first < len(everywhere))
    present = present[np.argsort(first[present])]
    _, number = np.unique(signature[present], return_inverse=True)
    group_of = np.zeros(num_channels, np.int64)
    group_of[present] = number
    members = np.split(
        present[np.argsort(number, kind="stable")], np.cumsum(np.bincount(number))[:-1]
    )
    where: dict[int, list[Place]] = {}
    for name, dim, channels in places:
        inside = group_of[channels]
        runs = inside[np.concatenate([[True], inside[1:] != inside[:-1]])]
        for mark in dict.fromkeys(runs.tolist()):
            where.setdefault(mark, []).append(Place(name, dim))
    return tuple(
        DependencyGroup(
            index=i,
            channels=members[mark],
            places=tuple(found),
            pinned=reasons.get(int(members[mark][0])) if pinned[members[mark][0]] else None,
        )
        for i, (mark, found) in enumerate(where.items())
    )
