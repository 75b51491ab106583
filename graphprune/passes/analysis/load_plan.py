"""Replay: take the plan from a file instead of choosing one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.contract import Context, Facts, Pass
from graphprune.groups import DependencyGroups
from graphprune.plan import Plan
from graphprune.program import Program

__all__ = ["LoadPlan"]


@dataclass(frozen=True, kw_only=True)
class LoadPlan(Pass):
    """Read a plan and check that it fits the program."""

    name: ClassVar[str] = "load-plan"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    path: str
    """The plan.json that an earlier compile wrote."""

    def run(self, program: Program, context: Context) -> Plan:
        """Return the plan of the file."""
        plan = Plan.load(self.path)
        plan.keep(program, context.need(DependencyGroups))
        return plan
