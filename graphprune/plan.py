"""Plan: what to remove, as data that anyone can check and replay.

A plan names, for every parameter and buffer that is cut, the indices that stay along each dimension, in the
names of the model that went in. That is enough to redo the cut: on the same model, the slices say which coupled
channels went.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.contract import Facts
from graphprune.cost import Keep
from graphprune.errors import PlanError
from graphprune.files import write_atomic
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.outcome import Removed
from graphprune.program import Program, Slices
from graphprune.residual import ResidualBlock, find_residual_blocks, without_blocks

__all__ = ["Plan", "fingerprint"]

VERSION = 1


def fingerprint(program: Program) -> str:
    """Return a short hash of the names and shapes of a program's parameters and buffers."""
    text = ";".join(f"{n}:{tuple(t.shape)}" for n, t in sorted(program.named_tensors()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Plan(Facts):
    """What to remove from one model."""

    slices: Slices
    """Parameter or buffer -> dimension -> kept indices, for everything that is cut."""
    blocks: tuple[str, ...] = ()
    """Residual blocks that go before anything is sliced."""
    model: str
    """What the user called the model."""
    fingerprint: str
    """Hash of the model's parameter names and shapes, once its blocks have gone; a plan fits no other model."""
    method: str = ""
    """The importance that ranked the channels."""
    target: str = ""
    """What was asked for."""
    seed: int = 0
    removed: Removed = Removed()
    """How many channels and heads go."""

    @classmethod
    def of(
        cls,
        program: Program,
        groups: DependencyGroups,
        keep: Keep,
        *,
        method: str = "",
        target: str = "",
        seed: int = 0,
        heads: int = 0,
    ) -> Plan:
        """Build the plan that keeps the coupled channels in `keep`.

        Raises:
            PlanError: The choice breaks a constraint.
        """
        if wrong := groups.violations(keep):
            raise PlanError(
                f"the choice of channels breaks {len(wrong)} constraints: {'; '.join(wrong[:3])}"
            )
        removed = sum(int((~keep[g.channels]).sum()) for g in groups)
        return cls(
            slices=groups.slices(keep),
            blocks=program.lost_blocks,
            model=program.source,
            fingerprint=fingerprint(program),
            method=method,
            target=target,
            seed=seed,
            removed=Removed(channels=removed, heads=heads),
        )

    @classmethod
    def between(
        cls,
        dense: Program,
        groups: DependencyGroups,
        smaller: Program,
        *,
        method: str = "",
        target: str = "",
        seed: int = 0,
        heads: int = 0,
    ) -> Plan:
        """Build the plan of all that went on the way from one program to another, in however many surgeries.

        Args:
            dense: What came in.
            groups: Its analysis.
            smaller: What is left of it.
            method: How channels were chosen, the last time.
            target: What was asked for then.
            seed: The run's.
            heads: How many attention heads went.

        Raises:
            PlanError: No plan can tell it: something else than the compiler has cut, or what is left is not what the
                couplings of `dense` leave.
        """
        origin = groups.cost.origin_of(smaller).checked(smaller)
        blocks: list[ResidualBlock] = []
        if origin.blocks:
            by_sum = {block.sum: block for block in find_residual_blocks(dense, groups)}
            for name, total in zip(origin.blocks, origin.sums, strict=True):
                if total not in by_sum:
                    raise PlanError(f"{name} is a residual block only once something else has gone")
                blocks.append(by_sum[total])
            dense = without_blocks(dense, groups, blocks)
            groups = analyze(dense)
        shapes = {name: tuple(tensor.shape) for name, tensor in dense.named_tensors()}
        before = (name for name, shape in shapes.items() if origin.shapes.get(name, shape) != shape)
        if stranger := origin.stranger or next(before, ""):
            raise PlanError(
                f"a surgery of somebody else's has cut {stranger}, and left no note of it"
            )
        left = {
            place: origin.slices[place.name][place.dim]
            for place in groups.places
            if place.dim in origin.slices.get(place.name, {})
        }
        keep = groups.cost.everything()
        for place, kept in left.items():
            keep[np.delete(groups.channels_of(place), kept)] = False
        keep = groups.close(keep)
        plan = cls.of(dense, groups, keep, method=method, target=target, seed=seed, heads=heads)
        for place, kept in left.items():
            if plan.slices.get(place.name, {}).get(place.dim) != kept:
                raise PlanError(
                    f"more of {place} is left than the couplings of {dense.source} leave"
                )
        return dataclasses.replace(plan, blocks=tuple(block.name for block in blocks))

    def keep(self, program: Program, groups: DependencyGroups) -> Keep:
        """Return which coupled channels of `program` the plan keeps.

        Raises:
            PlanError: The plan was made for another model, or contradicts itself.
        """
        if self.blocks and not program.lost_blocks:
            raise PlanError(
                f"the plan is for {self.model!r} without residual blocks {_shorten(', '.join(self.blocks))}, and "
                f"{program.source!r} has all of its; put remove-blocks and dependency-groups before"
            )
        if (found := fingerprint(program)) != self.fingerprint:
            raise PlanError(
                f"the plan was made for {self.model!r} with parameters {self.fingerprint}, but {program.source!r} has "
                f"{found}: names or shapes of parameters differ. Give the model that the plan was made for."
            )
        keep = groups.cost.everything()
        for name, dims in self.slices.items():
            for dim, kept in dims.items():
                channels = self._channels(groups, Place(name, dim), kept)
                mask = np.zeros(len(channels), np.bool_)
                mask[list(kept)] = True
                keep[channels[~mask]] = False
        keep = groups.close(keep)
        replayed = Plan.of(program, groups, keep).slices
        if replayed != self.slices:
            name = next(
                n for n in {*replayed, *self.slices} if replayed.get(n) != self.slices.get(n)
            )
            raise PlanError(
                f"the plan contradicts itself at {name}: its channels are coupled with others, which asks for "
                f"{_shorten(replayed.get(name))} where the plan says {_shorten(self.slices.get(name))}."
            )
        return keep

    def _channels(self, groups: DependencyGroups, place: Place, kept: tuple[int, ...]) -> Any:
        if place not in groups.places:
            known = [str(p) for p in groups.places if p.name == place.name]
            raise PlanError(
                f"the plan cuts {place}, which holds no removable channels; known there: {', '.join(known) or 'none'}"
            )
        channels = groups.channels_of(place)
        if not kept or min(kept) < 0 or max(kept) >= len(channels):
            raise PlanError(
                f"the plan keeps indices {_shorten(kept)} of {place}, which has {len(channels)}"
            )
        return channels

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "target": self.target,
            "seed": self.seed,
            "removed": {"channels": self.removed.channels, "heads": self.removed.heads},
            "blocks": list(self.blocks),
            "slices": {
                n: {str(d): list(k) for d, k in ds.items()} for n, ds in self.slices.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str = "plan") -> Plan:
        """Build a plan from plain data.

        Raises:
            PlanError: Something is missing or of the wrong kind.
        """
        try:
            if data["version"] != VERSION:
                raise PlanError(
                    f"{where}: version {data['version']!r}, this graphprune reads version {VERSION}"
                )
            return cls(
                slices={
                    str(n): {int(d): tuple(map(int, k)) for d, k in ds.items()}
                    for n, ds in data["slices"].items()
                },
                blocks=tuple(map(str, data.get("blocks", ()))),
                model=str(data["model"]),
                fingerprint=str(data["fingerprint"]),
                method=str(data.get("method", "")),
                target=str(data.get("target", "")),
                seed=int(data.get("seed", 0)),
                removed=_removed(data.get("removed", {})),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"{where}: not a plan ({type(error).__name__}: {error}). Expected the plan.json that compile writes, "
                'with at least "version", "model", "fingerprint" and "slices".'
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        with write_atomic(Path(path)) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: The file is missing or holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return cls.from_json(data, where=str(path))


def _removed(counts: Mapping[str, Any]) -> Removed:
    return Removed(channels=int(counts.get("channels", 0)), heads=int(counts.get("heads", 0)))


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
