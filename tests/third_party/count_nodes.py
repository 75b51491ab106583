"""A pass of a third party, as a stranger would write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.contract import Context, Facts, Pass
from graphprune.program import Program


@dataclass(frozen=True)
class NodeCount(Facts):
    """How many nodes the graph has."""

    count: int


@dataclass(frozen=True, kw_only=True)
class CountNodes(Pass):
    """Count the nodes of the graph."""

    name: ClassVar[str] = "count-nodes"

    inputs_too: bool = True
    """Whether inputs count."""

    def run(self, program: Program, context: Context) -> NodeCount:
        """Count the nodes."""
        nodes = program.module.graph.nodes
        return NodeCount(sum(1 for n in nodes if self.inputs_too or n.op != "placeholder"))
