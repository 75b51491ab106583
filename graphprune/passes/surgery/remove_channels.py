"""Remove channels: slice every parameter that a coupled channel lives in, and correct every size that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.contract import Context, Facts, Pass, SurgeryResult
from graphprune.cut import cut_program
from graphprune.groups import DependencyGroups
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.verify import Masked

__all__ = ["RemoveChannels"]


@dataclass(frozen=True, kw_only=True)
class RemoveChannels(Pass):
    """Remove the channels that the plan names.

    The result equals the program that came in with those channels zero at their consumers; the driver proves it.
    """

    name: ClassVar[str] = "remove-channels"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups, Plan)

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Return the cut program."""
        groups, plan = context.need(DependencyGroups), context.need(Plan)
        keep = plan.keep(program, groups)
        if not plan.slices:
            return SurgeryResult(program=program, modified=False, kept=groups.kept)
        cut = cut_program(
            program, groups, keep, step=f"{self.spec()}: {plan.removed.channels} channels"
        )
        return SurgeryResult(
            program=cut.program,
            modified=True,
            removed=plan.removed,
            kept=groups.kept,
            reference=Masked(groups, keep),
        )
