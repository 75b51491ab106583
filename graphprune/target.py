"""Target: what a model may cost, as people type it and in amounts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from graphprune.cost import RESOURCES, Cost, Resource
from graphprune.errors import TargetError
from graphprune.groups import DependencyGroups
from graphprune.program import Program

__all__ = ["Target", "parse_target"]

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS = {
    "ratio": {"": 1.0},
    "size": {"": 1.0, **{f"{k}b": v for k, v in _COUNTS.items()}, "kib": 2**10, "mib": 2**20},
    "latency": {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3},
}
"""Unit -> its worth: counts, bytes, milliseconds."""
_EXAMPLES = {"ratio": "0.3", "size": "0.5 or 500KB", "latency": "0.5 or 3ms"}


@dataclass(frozen=True)
class Target:
    """Limits that must all hold; or, alone, the fraction of every group's channels to remove."""

    macs: float | None = None
    """Most MACs for one sample; this and the next: a fraction of the model that came in up to 1, an amount above."""
    params: float | None = None
    """Most parameters."""
    size: float | None = None
    """Most bytes of the exported file; needs measured costs."""
    latency: float | None = None
    """Most milliseconds for one sample in ONNX Runtime; needs measured costs."""
    ratio: float | None = None
    """Fraction of each group's channels to remove, of those that the program that is cut has."""
    is_amount: frozenset[Resource] = frozenset()
    """Limits of at most 1 that are amounts all the same: ``latency=0.8ms``."""
    base: Cost | None = None
    """What fractions are of, where that is not the program itself; see `of`."""

    @property
    def resources(self) -> tuple[Resource, ...]:
        """What the target limits."""
        return tuple(name for name in RESOURCES if getattr(self, name) is not None)

    @property
    def needs_measuring(self) -> bool:
        """Whether a limit is on something that the graph alone does not say."""
        return self.size is not None or self.latency is not None

    def of(self, program: Program, groups: DependencyGroups) -> Target:
        """Return the target for a program that may have lost something: fractions are of what it was before."""
        return self if program.origin is None else replace(self, base=groups.cost.before(program))

    def whole(self, dense: Cost) -> Cost:
        """Return what fractions are of; `dense` is what the program has that is to be cut."""
        return dense if self.base is None else self.base

    def limits(self, dense: Cost) -> Cost:
        """Return the limits as amounts.

        Raises:
            TargetError: A resource is limited that nobody has measured.
        """
        for name in self.resources:
            if not getattr(dense, name) and name in ("size", "latency"):
                raise TargetError(
                    f"target {name}= needs measured costs; put the pass measure-costs after dependency-groups"
                )
        amounts = {name: self._amount(name, dense) for name in RESOURCES}
        whole = {name: math.floor(amounts[name]) for name in RESOURCES if name != "latency"}
        return Cost(**whole, latency=amounts["latency"])

    def _amount(self, name: Resource, dense: Cost) -> float:
        limit: float | None = getattr(self, name)
        if limit is None:
            return float(getattr(dense, name))
        is_amount = limit > 1 or name in self.is_amount
        return limit if is_amount else limit * float(getattr(self.whole(dense), name))


def parse_target(text: str) -> Target:
    """Parse ``macs=0.5``, ``params=0.4,macs=0.5``, ``macs=1.2G``, ``size=500KB``, ``latency=3ms`` or ``ratio=0.3``.

    Raises:
        TargetError: The text is not of this form, or a number is out of range.
    """
    values: dict[str, Any] = {}
    amounts: set[Resource] = set()
    for part in text.split(","):
        key, equals, raw = (p.strip() for p in part.partition("="))
        if not equals or key not in (*RESOURCES, "ratio"):
            raise TargetError(
                f"target {text!r}: {part.strip()!r} is not understood. Expected macs=, params=, size=, latency= "
                "(a fraction such as 0.5, or an amount such as 1.2G, 500KB or 3ms) or ratio= (a fraction), "
                "several with commas."
            )
        if key in values:
            raise TargetError(f"target {text!r} gives {key}= twice")
        values[key], is_amount = _number(text, key, raw)
        if is_amount and values[key] <= 1:
            amounts |= {name for name in RESOURCES if name == key}
    if "ratio" in values and len(values) > 1:
        raise TargetError(f"target {text!r}: ratio= stands alone; it says itself how much goes")
    return Target(**values, is_amount=frozenset(amounts))


def _number(text: str, key: str, raw: str) -> tuple[float, bool]:
    """Return a number, and whether its unit says that it is an amount."""
    units = _UNITS.get(key, _COUNTS)
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-zµ]*)", raw.lower())
    if not match or match.group(2) not in units:
        known = ", ".join(unit for unit in units if unit)
        raise TargetError(
            f"target {text!r}: {raw!r} is not a number such as {_EXAMPLES.get(key, '0.5 or 1.2G')}"
            + (f"; units are {known}" if known else "")
        )
    number, unit = float(match.group(1)), match.group(2)
    value = number * units[unit]
    if key == "ratio" and not 0 <= value < 1:
        raise TargetError(f"target {text!r}: ratio must be at least 0 and less than 1, not {raw}")
    if value <= 0 and key != "ratio":
        raise TargetError(f"target {text!r}: {key} must be more than 0, not {raw}")
    if key == "latency" and value > 1 and not unit:
        raise TargetError(
            f"target {text!r}: a latency of more than the dense program's; give a fraction, or a unit: {raw}ms"
        )
    return value, bool(unit)
