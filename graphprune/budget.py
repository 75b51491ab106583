"""Budget: target + scores + constraints + cost -> which coupled channels stay.

Units (`graphprune.units`) are taken in order of importance until every target is met, and the last ones are put back
where the target allows it. The best unit of every tensor dimension is protected, so nothing becomes empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graphprune.cost import Cost, Keep
from graphprune.errors import TargetError
from graphprune.groups import DependencyGroups
from graphprune.units import Granularity, Unit, find_units

__all__ = ["Choice", "Target", "choose", "parse_target"]

Scope = Literal["global", "uniform"]
SLACK = 0.002
"""Land at most this fraction of the dense model below the target, where units are fine enough."""
REFILL_TRIALS = 4000
"""How many units are tried, one by one, when the budget left over is filled up."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Target:
    """Limits that must all hold; or, alone, the fraction of every group's channels to remove."""

    macs: float | None = None
    """Most MACs for one sample, as a fraction of the dense program where `macs` <= 1."""
    params: float | None = None
    """Most parameters, as a fraction of the dense program where `params` <= 1."""
    ratio: float | None = None
    """Fraction of each group's channels to remove."""

    def limits(self, dense: Cost) -> Cost:
        """Return the limits as amounts."""
        return Cost(params=_amount(self.params, dense.params), macs=_amount(self.macs, dense.macs))


def _amount(limit: float | None, dense: int) -> int:
    if limit is None:
        return dense
    return math.floor(limit * dense) if limit <= 1 else math.floor(limit)


def parse_target(text: str) -> Target:
    """Parse ``macs=0.5``, ``params=0.4,macs=0.5``, ``macs=1.2G`` or ``ratio=0.3``.

    Raises:
        TargetError: The text is not of this form, or a number is out of range.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        key, equals, raw = (p.strip() for p in part.partition("="))
        if not equals or key not in ("macs", "params", "ratio"):
            raise TargetError(
                f"target {text!r}: {part.strip()!r} is not understood. Expected macs=, params= (a fraction such as 0.5, "
                "or an amount such as 1.2G) or ratio= (a fraction), several with commas."
            )
        if key in values:
            raise TargetError(f"target {text!r} gives {key}= twice")
        values[key] = _number(text, key, raw)
    if "ratio" in values and len(values) > 1:
        raise TargetError(f"target {text!r}: ratio= stands alone; it says itself how much goes")
    return Target(**values)


def _number(text: str, key: str, raw: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)([kmgt]?)", raw.lower())
    if not match:
        raise TargetError(f"target {text!r}: {raw!r} is not a number such as 0.5 or 1.2G")
    value = float(match.group(1)) * _UNITS[match.group(2)]
    if key == "ratio" and not 0 <= value < 1:
        raise TargetError(f"target {text!r}: ratio must be at least 0 and less than 1, not {raw}")
    if value <= 0 and key != "ratio":
        raise TargetError(f"target {text!r}: {key} must be more than 0, not {raw}")
    return value


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
    round_to: int = 1,
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
        scope: Compare scores over the whole network (each group scaled to mean 1), or by rank within each group, so
            that all groups shrink alike.
        max_ratio: At most this fraction of a group's channels goes.

    Returns:
        A choice that breaks no constraint, at or under every limit.

    Raises:
        TargetError: No choice reaches the target; the message says what can be reached.
    """
    if not np.isfinite(scores).all():
        raise TargetError("the importance scores hold NaN or infinite values; check the weights and the data")
    units = find_units(groups, scores, granularity=granularity)
    allowed = _protect(groups, units, max_ratio)
    bundles = _bundles(groups, [u for u, free in zip(units, allowed, strict=True) if free], units, round_to)
    if target.ratio is not None:
        taken = _by_ratio(bundles, units, target.ratio)
    else:
        order = _ordered(groups, bundles, units, scope)
        taken = _by_limits(groups, order, target)
    keep = _without(groups, taken)
    heads = sum(u.kind == "heads" for bundle in taken for u in bundle)
    return Choice(keep, groups.cost.total(keep), heads)


Bundle = tuple[Unit, ...]


def _protect(groups: DependencyGroups, units: list[Unit], max_ratio: float) -> list[bool]:
    """Return which units may go: not the best of any tensor dimension, nor a group's last ones."""
    at: dict[int, list[int]] = {}
    for position, unit in enumerate(units):
        for channel in unit.channels.tolist():
            at.setdefault(channel, []).append(position)
    score = np.full(groups.num_channels, -np.inf)
    for unit in units:
        score[unit.channels] = np.maximum(score[unit.channels], unit.score)
    removable = np.isfinite(score)
    allowed = [True] * len(units)
    for axis in groups.axes:
        if removable[axis].all():
            best = int(axis[np.argmax(score[axis])])
            for position in at[best]:
                allowed[position] = False
    by_group: dict[tuple[int, str], list[int]] = {}
    for position, unit in enumerate(units):
        by_group.setdefault((unit.group, unit.kind), []).append(position)
    for positions in by_group.values():
        least = len(positions) - math.floor(max_ratio * len(positions))
        for position in sorted(positions, key=lambda p: -units[p].score)[:least]:
            allowed[position] = False
    return allowed


def _bundles(groups: DependencyGroups, free: list[Unit], units: list[Unit], round_to: int) -> list[Bundle]:
    """Bundle units of a group, worst first, so that what is left is a multiple of `round_to`."""
    if round_to <= 1:
        return [(u,) for u in free]
    totals: dict[tuple[int, str], int] = {}
    for unit in units:
        totals[unit.group, unit.kind] = totals.get((unit.group, unit.kind), 0) + 1
    members: dict[tuple[int, str], list[Unit]] = {}
    for unit in sorted(free, key=lambda u: u.score):
        members.setdefault((unit.group, unit.kind), []).append(unit)
    bundles: list[Bundle] = []
    for key, ranked in members.items():
        if key[1] == "heads":
            bundles += [(u,) for u in ranked]
            continue
        inside = set(groups[key[0]].channels.tolist())
        width = max(1, sum(c in inside for c in ranked[0].channels.tolist()))
        step = round_to // math.gcd(round_to, width)
        first = totals[key] % step or step
        cuts = [0, *range(first, len(ranked) + 1, step)]
        bundles += [tuple(ranked[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return bundles


def _ordered(
    groups: DependencyGroups, bundles: list[Bundle], units: list[Unit], scope: Scope
) -> list[Bundle]:
    by_group: dict[int, list[float]] = {}
    for unit in units:
        by_group.setdefault(unit.group, []).append(unit.score)
    if scope == "uniform":
        ranks = {g: np.sort(s) for g, s in by_group.items()}

        def key(bundle: Bundle) -> float:
            group = ranks[bundle[0].group]
            return float(np.mean([np.searchsorted(group, u.score) for u in bundle]) / len(group))
    else:
        mean = {g: max(float(np.mean(s)), 1e-30) for g, s in by_group.items()}

        def key(bundle: Bundle) -> float:
            return float(np.mean([u.score for u in bundle])) / mean[bundle[0].group]

    return sorted(bundles, key=lambda b: (key(b), b[0].group, int(b[0].channels[0])))


def _by_ratio(bundles: list[Bundle], units: list[Unit], ratio: float) -> list[Bundle]:
    totals: dict[int, int] = {}
    for unit in units:
        totals[unit.group] = totals.get(unit.group, 0) + 1
    gone: dict[int, int] = {}
    taken = []
    for bundle in sorted(bundles, key=lambda b: b[0].score):
        group = bundle[0].group
        if gone.get(group, 0) + len(bundle) <= math.floor(ratio * totals[group] + 1e-9):
            gone[group] = gone.get(group, 0) + len(bundle)
            taken.append(bundle)
    return taken


def _without(groups: DependencyGroups, bundles: Sequence[Bundle]) -> Keep:
    keep = groups.cost.everything()
    if bundles:
        keep[np.concatenate([u.channels for b in bundles for u in b])] = False
    return groups.close(keep)


def _by_limits(groups: DependencyGroups, order: list[Bundle], target: Target) -> list[Bundle]:
    """Take the shortest prefix of `order` that meets the limits, then put back what still fits."""
    dense = groups.cost.total()
    limits = target.limits(dense)

    def fits(taken: Sequence[Bundle]) -> bool:
        cost = groups.cost.total(_without(groups, taken))
        return cost.macs <= limits.macs and cost.params <= limits.params

    if not fits(order):
        raise TargetError(_unreachable(groups, target, dense, groups.cost.total(_without(groups, order))))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(order[:middle]) else (middle + 1, high)
    return _refill(groups, order[:low], limits, dense)


def _refill(groups: DependencyGroups, taken: list[Bundle], limits: Cost, dense: Cost) -> list[Bundle]:
    """Put units back, the most important first, as long as the limits hold."""
    kept_back: set[int] = set()

    def cost_of() -> Cost:
        return groups.cost.total(_without(groups, [b for i, b in enumerate(taken) if i not in kept_back]))

    def room(cost: Cost) -> float:
        return min(
            (limits.macs - cost.macs) / max(1, dense.macs) if limits.macs < dense.macs else math.inf,
            (limits.params - cost.params) / max(1, dense.params) if limits.params < dense.params else math.inf,
        )

    if not taken or room(cost_of()) <= SLACK:
        return taken
    for position in reversed(range(max(0, len(taken) - REFILL_TRIALS), len(taken))):
        kept_back.add(position)
        cost = cost_of()
        if cost.macs > limits.macs or cost.params > limits.params:
            kept_back.discard(position)
        elif room(cost) <= SLACK:
            break
    return [b for i, b in enumerate(taken) if i not in kept_back]


def _unreachable(groups: DependencyGroups, target: Target, dense: Cost, least: Cost) -> str:
    reached = []
    for name in ("macs", "params"):
        if getattr(target, name) is not None:
            total, low = getattr(dense, name), getattr(least, name)
            reached.append(f"{name}={low / max(1, total):.4f} ({low:,} of {total:,})")
    pinned = sum(len(g) for g in groups if g.pinned)
    asked = ", ".join(f"{n}={v:g}" for n, v in vars(target).items() if v is not None)
    return (
        f"target {asked} cannot be reached: with every removable channel gone the program is at {', '.join(reached)}; "
        f"{pinned} of {sum(map(len, groups))} coupled channels are pinned (graphprune inspect says why). "
        "Give a target that is at least that."
    )


