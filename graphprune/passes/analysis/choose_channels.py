"""Choose which channels go: scores, constraints and cost against a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graphprune.budget import Choice, choose, parse_round_to
from graphprune.contract import Context, Facts, Pass
from graphprune.groups import DependencyGroups
from graphprune.measured import Measurements, land
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.scores import Scores
from graphprune.target import parse_target
from graphprune.units import parse_granularity

__all__ = ["ChooseChannels"]


@dataclass(frozen=True, kw_only=True)
class ChooseChannels(Pass):
    """Choose the least important channels whose removal reaches a target."""

    name: ClassVar[str] = "choose-channels"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups, Scores)

    target: str = "macs=0.5"
    """Limits such as ``macs=0.5``, ``params=5M,latency=3ms`` or ``size=0.3``, or ``ratio=0.3`` of every group."""
    granularity: str = "channels"
    """What may go: ``channels``, ``heads``, or both with a comma."""
    round_to: str = "auto"
    """Kept channels of a group are a multiple of this number, where the dense count allows it; ``auto``: of 8, or less
    where groups are small or the target would be missed."""
    scope: Literal["global", "uniform"] = "global"
    """``global``: least importance for what it saves goes first; ``uniform``: all groups shrink alike."""
    max_ratio: float = 1.0
    """At most this fraction of a group's channels goes."""

    def run(self, program: Program, context: Context) -> Plan:
        """Return the plan."""
        groups, scores = context.need(DependencyGroups), context.need(Scores)
        target = parse_target(self.target).of(program, groups)

        def decide(costs: DependencyGroups) -> Choice:
            return choose(
                costs,
                scores.values,
                target,
                granularity=parse_granularity(self.granularity),
                round_to=parse_round_to(self.round_to),
                scope=self.scope,
                max_ratio=self.max_ratio,
            )

        choice = land(
            program,
            groups,
            target,
            decide,
            device=context.runtime_device,
            seed=context.seed,
            measurements=Measurements(self.spec(), program, context),
        )
        return Plan.of(
            program,
            groups,
            choice.keep,
            method=scores.method,
            target=self.target,
            seed=context.seed,
            heads=choice.heads,
        )
