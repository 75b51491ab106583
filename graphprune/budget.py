"""Budget: target + scores + constraints + cost -> which coupled channels stay.

Units (`graphprune.units`) are taken in order of importance until every target is met, and the last ones are put back
where the target allows it. The best unit of every tensor dimension is protected, so nothing becomes empty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graphprune.cost import Cost, Keep, Resource
from graphprune.errors import TargetError, UsageError
from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms
from graphprune.target import Target
from graphprune.units import Bundles, Flags, Granularity, Units, find_units

__all__ = [
    "AUTO_STEPS",
    "Choice",
    "choose",
    "is_near",
    "limits_room",
    "parse_round_to",
    "unreachable",
]

Scope = Literal["global", "uniform"]
SLACK = 0.002
"""Land at most this fraction of the dense model below the target, where units are fine enough."""
REFILL_TRIALS = 1000
"""How many units are tried, one by one, when the budget left over is filled up."""
NEAR = 0.005
"""Further than this below the target, units are exchanged to come nearer."""
EXCHANGE_TRIALS = 100
"""How many units on either side of the limit are tried for an exchange."""
EXCHANGE_WORK = 20_000_000
"""How many channels are counted, over all trials of exchanges."""


def parse_round_to(text: str) -> int | Literal["auto"]:
    """Parse ``auto`` or a number of at least 1.

    Raises:
        UsageError: The text is neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"round_to: expected auto, or a number of at least 1, found {text!r}")
    return int(text)


@dataclass(frozen=True)
class Choice:
    """The channels that stay."""

    keep: Keep
    cost: Cost
    heads: int
    """How many attention heads go."""


def choose(
    groups: DependencyGroups,
    scores: NDArray[np.float64],
    target: Target,
    *,
    granularity: Sequence[Granularity] = ("channels",),
    round_to: int | Literal["auto"] = 1,
    scope: Scope = "global",
    max_ratio: float = 1.0,
) -> Choice:
    """Choose which coupled channels stay.

    Args:
        groups: The analysis.
        scores: Importance of every coupled channel, shape (num_channels,); low goes first.
        target: What must be reached.
        granularity: What may go.
        round_to: Kept channels of every group are a multiple of this, where the dense count allows it.
            ``auto``: of 8, or of a quarter of a small group, or of less where the target would otherwise be
            missed by more than 1 %.
        scope: ``global`` takes the units with the least loss for what they save (MACs, parameters, or both, as
            the target limits them): the greedy solution of the knapsack that a budget is. ``uniform`` ranks within each
            group, so that all groups shrink alike.
        max_ratio: At most this fraction of a group's channels goes.

    Returns:
        A choice that breaks no constraint, at or under every limit.

    Raises:
        TargetError: No choice reaches the target; the message says what can be reached.
    """
    if not np.isfinite(scores).all():
        raise TargetError(
            "the importance scores hold NaN or infinite values; check the weights and the data"
        )
    dense = groups.cost.total()
    target.limits(dense)  # raises where a limited resource was not measured
    if not dense.params and not dense.macs:
        raise TargetError(
            "the program has no parameters and no multiply-accumulates; there is nothing to cut"
        )
    units = find_units(groups, scores, granularity=granularity)
    free = _free(groups, units, max_ratio)
    if round_to != "auto":
        return _choose(groups, units, free, target, scope, lambda size: round_to)
    for limit in AUTO_STEPS:
        step_of = functools.partial(_quarter, limit=limit)
        try:
            choice = _choose(groups, units, free, target, scope, step_of)
        except TargetError:
            if limit == 1:
                raise
            continue  # smaller steps reach further
        if limit == 1 or is_near(choice.cost, target, groups.cost.total()):
            break
    return choice


AUTO_STEPS = (8, 4, 2, 1)
"""Multiples that ``round_to="auto"`` tries: runtimes compute eight channels at a time, and lose time on fractions."""


def _quarter(size: int, *, limit: int) -> int:
    """Return the largest power of two that is at most `limit` and a quarter of `size`, at least 1."""
    return min(limit, 1 << max(0, (size // 4).bit_length() - 1))


def is_near(cost: Cost, target: Target, dense: Cost) -> bool:
    """Tell whether a cost is within 1 % of one of the limits, or has none to land at."""
    limits = target.limits(dense)
    low = [name for name in target.resources if getattr(limits, name) < getattr(dense, name)]
    return not low or any(getattr(cost, n) >= 0.99 * getattr(limits, n) for n in low)


def _choose(
    groups: DependencyGroups,
    units: Units,
    free: Flags,
    target: Target,
    scope: Scope,
    step_of: Callable[[int], int],
) -> Choice:
    """Choose with units bundled by ``step_of(size of their group)``."""
    bundles = _bundles(groups, units, free, step_of)
    while True:
        if target.ratio is not None:
            removed = _by_ratio(units, bundles, target.ratio)
        else:
            removed = _by_limits(
                groups, units, _ordered(groups, units, bundles, target, scope), target
            )
        keep = groups.close(units.without(removed, groups.num_channels))
        if not (broken := groups.broken(keep)):
            break
        bundles = _without_conflicts(groups, units, bundles, broken)
    heads = int(removed[units.is_head].sum())
    return Choice(keep, groups.cost.total(keep), heads)


def _free(groups: DependencyGroups, units: Units, max_ratio: float) -> Flags:
    """Return which units may go: not the best of any tensor dimension, nor a group's best ones."""
    free = np.ones(len(units), np.bool_)
    best = np.full(groups.num_channels, -np.inf)
    np.maximum.at(best, units.channels, units.score[units.owner])
    protected = np.zeros(groups.num_channels, np.bool_)
    for axis in groups.axes:
        scores = best[axis]
        if np.isfinite(scores).all():
            protected[axis[np.argmax(scores)]] = True
    free[units.owner[protected[units.channels]]] = False
    if max_ratio < 1:
        for inside in _by_group(units, np.arange(len(units))):
            least = len(inside) - math.floor(max_ratio * len(inside))
            free[inside[np.argsort(-units.score[inside], kind="stable")[:least]]] = False
    return free


def _by_group(units: Units, chosen: Atoms) -> list[Atoms]:
    """Split unit numbers by dependency group and kind."""
    key = units.group[chosen] * 2 + units.is_head[chosen]
    order = np.argsort(key, kind="stable")
    ends = np.flatnonzero(np.diff(key[order])) + 1
    return [part for part in np.split(chosen[order], ends) if len(part)]


def _bundles(
    groups: DependencyGroups, units: Units, free: Flags, step_of: Callable[[int], int]
) -> Bundles:
    """Bundle units of a group, worst first, so that what is left is a multiple of the group's step."""
    chosen = np.flatnonzero(free)
    totals = np.bincount(units.group[~units.is_head], minlength=len(groups))
    pieces: list[Atoms] = []
    lengths: list[Atoms] = []
    for inside in _by_group(units, chosen):
        ranked = inside[np.argsort(units.score[inside], kind="stable")]
        group = int(units.group[ranked[0]])
        step = 1
        if not units.is_head[ranked[0]]:
            members = units.members(int(ranked[0]))
            width = max(1, int(np.isin(members, groups[group].channels).sum()))
            wanted = step_of(int(totals[group]) * width)
            step = wanted // math.gcd(wanted, width)
        first = int(totals[group]) % step or step
        count = max(0, 1 + (len(ranked) - first) // step)
        sizes = np.full(count, step)
        sizes[:1] = first
        pieces.append(ranked[: int(sizes.sum())])
        lengths.append(sizes)
    return Bundles.of(pieces, lengths)


def _ordered(
    groups: DependencyGroups, units: Units, bundles: Bundles, target: Target, scope: Scope
) -> Bundles:
    """Return the bundles in the order in which they go."""
    if scope == "uniform":
        key = np.empty(len(units))
        for inside in _by_group(units, np.arange(len(units))):
            scores = units.score[inside]
            key[inside] = np.searchsorted(np.sort(scores), scores) / len(inside)
        keys = bundles.means(key)
    else:
        keys = bundles.sums(_losses(units)) / bundles.sums(_savings(groups, units, target))
    return bundles.taken(np.argsort(keys, kind="stable"))


def _losses(units: Units) -> NDArray[np.float64]:
    """Return what is lost with each unit, when those of its group that score less have gone before.

    The first units of a group cost their importance; the last ones more, for they are all that the layer has left:

        loss of unit j = S log(R_j / R_{j+1}),   S = sum of the group's importance, R_j = what is left of it before j

    so that no layer is emptied because its weights are small.
    """
    total = units.score * np.diff(units.starts)
    losses = np.zeros(len(units))
    for inside in _by_group(units, np.arange(len(units))):
        ranked = inside[np.argsort(total[inside], kind="stable")]
        left = total[ranked][::-1].cumsum()[::-1]
        after = np.maximum(np.append(left[1:], 0.0), 1e-12 * left[0])
        losses[ranked] = left[0] * np.log(np.maximum(left, 1e-300) / np.maximum(after, 1e-300))
    return losses


def _savings(groups: DependencyGroups, units: Units, target: Target) -> NDArray[np.float64]:
    """Return the fraction of the limited resources that each unit saves; never zero."""
    dense = groups.cost.total()
    per_channel = np.zeros(groups.num_channels)
    for name in target.resources:
        per_channel += groups.cost.saved(name) / max(1e-12, getattr(dense, name))
    saved = np.bincount(units.owner, weights=per_channel[units.channels], minlength=len(units))
    return np.asarray(np.maximum(saved, 1e-15))


def _by_ratio(units: Units, bundles: Bundles, ratio: float) -> Flags:
    """Remove up to the same fraction of every group, worst first."""
    removed = np.zeros(len(units), np.bool_)
    if not len(bundles):
        return removed
    kind = units.group * 2 + units.is_head
    room = np.floor(ratio * np.bincount(kind) + 1e-9)
    bundle_kind = kind[bundles.units[bundles.starts[:-1]]]
    order = np.lexsort((bundles.means(units.score), bundle_kind))
    taken = np.cumsum(bundles.lengths[order])
    starts = np.flatnonzero(np.diff(bundle_kind[order], prepend=-1))
    before = np.concatenate([[0], taken])[starts]
    taken = taken - np.repeat(before, np.diff([*starts, len(order)]))
    goes = np.zeros(len(bundles), np.bool_)
    goes[order] = taken <= room[bundle_kind[order]]
    removed[bundles.units[goes[bundles.owner]]] = True
    return removed


def _without_conflicts(
    groups: DependencyGroups, units: Units, bundles: Bundles, broken: Sequence[Atoms]
) -> Bundles:
    """Give up bundles that together leave the rows of a nest unequal, or a tensor empty.

    A unit takes equally from every row of a nest, or whole rows of it. Two units that do so alone may fall
    short together where they overlap, and a unit that takes whole rows of one nest may take unequally from
    another. A unit can also take more than itself, blocks and their members. Units that take whole rows give
    way.
    """
    rows, involved = (np.zeros(groups.num_channels, np.bool_) for _ in range(2))
    rows[groups.blocks.rows] = True
    for channels in broken:
        involved[channels] = True
    touching, whole = (np.zeros(len(bundles), np.bool_) for _ in range(2))
    for index in range(len(bundles)):
        removed = np.zeros(len(units), np.bool_)
        removed[bundles[index]] = True
        gone = ~groups.close(units.without(removed, groups.num_channels))
        if gone[involved].any():
            touching[index] = True
            whole[index] = gone[rows].any()
    return bundles.taken(np.flatnonzero(~(whole if whole.any() else touching)))


def _by_limits(groups: DependencyGroups, units: Units, order: Bundles, target: Target) -> Flags:
    """Remove the shortest prefix of `order` that meets the limits, then put back what still fits."""
    dense = groups.cost.total()
    limits = target.limits(dense)
    rank = np.full(len(units), len(order))
    rank[order.units] = order.owner

    def cost(removed: Flags) -> Cost:
        return groups.cost.total(groups.close(units.without(removed, groups.num_channels)))

    def room(removed: Flags) -> float:
        return limits_room(cost(removed), target, dense)

    def fits(found: Cost) -> bool:
        return all(getattr(found, name) <= getattr(limits, name) for name in target.resources)

    if not fits(least := cost(rank < len(order))):
        raise TargetError(unreachable(groups, target, dense, least))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(cost(rank < middle)) else (middle + 1, high)
    removed = _refill(rank < low, order.between(low - REFILL_TRIALS, low), room)
    trials = EXCHANGE_WORK // max(1, groups.num_channels)
    return _exchange(removed, order, low, room, trials)


def _refill(removed: Flags, order: Sequence[Atoms], room: Callable[[Flags], float]) -> Flags:
    """Put back what fits under the limits, the most important first."""
    removed = removed.copy()
    left = room(removed)
    for bundle in reversed(order):
        if left <= SLACK:
            break
        if removed[bundle].all():
            removed[bundle] = False
            if (after := room(removed)) < 0:
                removed[bundle] = True
            else:
                left = after
    return removed


def _exchange(
    removed: Flags, order: Bundles, taken: int, room: Callable[[Flags], float], trials: int
) -> Flags:
    """Exchange a unit on one side of the limit for others on the other side, where that comes nearer to it.

    In a small network a single channel may be worth more than the distance to the limit. Nothing happens in one that is
    near already, and little in a large one: `trials` is how often the cost may be asked for.
    """
    best = room(removed)
    before = order.between(taken - EXCHANGE_TRIALS, taken)
    after = order.between(taken, taken + EXCHANGE_TRIALS)
    bundles = (*after, *reversed(before))
    if not NEAR < best < math.inf or trials < 2 * len(bundles):
        return removed
    saving = [abs(room(_flipped(removed, b)) - best) for b in after]
    for bundle in bundles[: trials // len(bundles)]:
        trial = _flipped(removed, bundle)
        size = abs(room(trial) - best)
        for other, fine in zip(after, saving, strict=True):
            if room(trial) >= 0:
                break
            if fine <= size / 2:
                trial[other] = True
        trial = _refill(trial, before, room)
        if 0 <= (found := room(trial)) < best:
            removed, best = trial, found
            if best <= NEAR:
                break
    return removed


def _flipped(removed: Flags, bundle: Atoms) -> Flags:
    """Return `removed` with a bundle put back, or taken."""
    flipped = removed.copy()
    flipped[bundle] = ~flipped[bundle]
    return flipped


def limits_room(cost: Cost, target: Target, dense: Cost) -> float:
    """Return how far below the nearest limit a cost is, as a fraction of `dense`; negative above it."""
    limits = target.limits(dense)
    rooms = [
        (getattr(limits, name) - getattr(cost, name)) / max(1e-12, getattr(dense, name))
        for name in target.resources
        if getattr(limits, name) < getattr(dense, name)
    ]
    return min(rooms, default=math.inf)


def _asked(target: Target, name: Resource) -> str:
    """Return a limit as it was understood: numbers above 1 are amounts."""
    limit = getattr(target, name)
    units = {"macs": "MACs", "params": "parameters", "size": "bytes", "latency": "ms"}
    is_amount = limit > 1 or name in target.is_amount
    return (
        f"{name}={limit:g} ({limit:g} {units[name]}; a fraction is at most 1)"
        if is_amount
        else f"{name}={limit:g}"
    )


def unreachable(groups: DependencyGroups, target: Target, dense: Cost, least: Cost) -> str:
    """Return the message for a target below the least cost that can be reached."""
    reached = []
    for name in target.resources:
        total, low = getattr(target.whole(dense), name), getattr(least, name)
        reached.append(f"{name}={low / max(1e-12, total):.4f} ({low:,} of {total:,})")
    pinned = sum(len(g) for g in groups if g.pinned)
    asked = ", ".join(_asked(target, name) for name in target.resources)
    advice = "Give a target that is at least that."
    if least == dense:
        advice = (
            "Nothing that this granularity names may go: give another one (channels takes any)."
        )
    return (
        f"target {asked} cannot be reached: with every removable channel gone the program is at {', '.join(reached)}; "
        f"{pinned} of {sum(map(len, groups))} coupled channels are pinned (graphprune inspect says why). "
        f"{advice}"
    )
