"""Find coupled channels, dependency groups, constraints and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.contract import Context, Pass
from graphprune.groups import DependencyGroups, analyze
from graphprune.program import Program

__all__ = ["FindDependencyGroups"]


@dataclass(frozen=True, kw_only=True)
class FindDependencyGroups(Pass):
    """Find out which channels must go together, what forbids it, and what each of them costs."""

    name: ClassVar[str] = "dependency-groups"

    def run(self, program: Program, context: Context) -> DependencyGroups:
        """Return the dependency groups of `program`."""
        return analyze(program)
