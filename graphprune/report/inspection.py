"""Inspection: what the analysis of a program found, for people who want to know before they cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphprune.cost import NodeCost
from graphprune.groups import DependencyGroup, analyze
from graphprune.outcome import Kept
from graphprune.program import Program
from graphprune.report.text import TABLE_BOX
from graphprune.residual import ResidualBlock, find_residual_blocks, outermost

__all__ = ["Inspection"]

MOST_ROWS = 15
"""Rows of a table; ``--json`` has them all."""

MOST_PLACES = 3
"""Places shown for a group."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Groups, costs and refusals of one program."""

    program: Program
    """What was analysed."""
    params: int
    """Elements of all parameters."""
    macs: int
    """Multiply-accumulates for one sample."""
    groups: tuple[DependencyGroup, ...]
    """The dependency groups in graph order."""
    costs: tuple[NodeCost, ...]
    """What every node costs, in graph order."""
    blocks: tuple[ResidualBlock, ...]
    """The residual blocks in graph order."""
    kept: tuple[Kept, ...]
    """What cannot go, and why."""

    @classmethod
    def of(cls, program: Program) -> Inspection:
        """Analyse a program."""
        groups = analyze(program)
        return cls(
            program=program,
            params=groups.cost.params,
            macs=groups.cost.macs,
            groups=tuple(groups),
            costs=tuple(groups.cost.per_node()),
            blocks=find_residual_blocks(program, groups),
            kept=groups.kept,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as plain data."""
        return {
            "model": self.program.source,
            "dialect": self.program.dialect,
            "dynamic_batch": self.program.dynamic_batch,
            "inputs": [list(t.shape) for t in self.program.example_inputs],
            "params": self.params,
            "macs": self.macs,
            "groups": [
                {
                    "name": group.name,
                    "channels": len(group),
                    "places": [str(place) for place in group.places],
                    "pinned": group.pinned,
                }
                for group in self.groups
            ],
            "nodes": [{"node": c.node, "params": c.params, "macs": c.macs} for c in self.costs],
            "blocks": [
                {"name": b.name, "sum": b.sum, "params": b.params, "macs": b.macs}
                for b in self.blocks
            ],
            "kept": [{"what": kept.what, "why": kept.why} for kept in self.kept],
        }

    def show(self, console: Console) -> None:
        """Print the inspection on a console."""
        batch = "dynamic" if self.program.dynamic_batch else "fixed"
        inputs = ", ".join("x".join(map(str, t.shape)) for t in self.program.example_inputs)
        console.print(f"[bold]{escape(self.program.source)}[/bold]")
        console.print(
            f"captured by {self.program.dialect}, inputs {inputs} ({batch} batch), "
            f"{self.params:,} parameters, {self.macs:,} MACs for one sample"
        )
        free = [group for group in self.groups if not group.pinned]
        channels = sum(map(len, free))
        console.print(
            f"{len(self.groups)} dependency groups; {len(free)} of them with {channels:,} channels can be cut"
        )
        if self.blocks:
            macs = sum(block.macs for block in outermost(self.blocks))
            share = f" with {100 * macs / self.macs:.0f} % of the MACs" if self.macs else ""
            first, last = self.blocks[0].name, self.blocks[-1].name
            console.print(
                f"{len(self.blocks)} residual blocks{share} can be removed whole, "
                f"{escape(first)} to {escape(last)} (granularity blocks)"
            )
        console.print(self._groups_table(free))
        console.print(self._costs_table())
        for why, count in Counter(kept.why for kept in self.kept).most_common(MOST_ROWS):
            first = next(kept.what for kept in self.kept if kept.why == why)
            more = f" and {count - 1} more" if count > 1 else ""
            console.print(f"pinned: {escape(first)}{more}: {escape(why)}")

    def _groups_table(self, free: list[DependencyGroup]) -> Table:
        table = Table(box=TABLE_BOX, pad_edge=False)
        table.add_column(f"largest groups (of {len(free)})", overflow="fold")
        table.add_column("channels", justify="right")
        table.add_column("places", justify="right")
        table.add_column("also lives in", overflow="fold")
        for group in sorted(free, key=lambda g: -len(g))[:MOST_ROWS]:
            others = ", ".join(map(str, group.places[1 : 1 + MOST_PLACES]))
            dots = ", ..." if len(group.places) > 1 + MOST_PLACES else ""
            table.add_row(
                escape(group.name), f"{len(group):,}", str(len(group.places)), escape(others + dots)
            )
        return table

    def _costs_table(self) -> Table:
        table = Table(box=TABLE_BOX, pad_edge=False)
        table.add_column(f"most expensive nodes (of {len(self.costs)})")
        for heading in ("parameters", "MACs", "share of MACs (%)"):
            table.add_column(heading, justify="right")
        for cost in sorted(self.costs, key=lambda c: -c.macs)[:MOST_ROWS]:
            share = f"{100 * cost.macs / self.macs:.1f}" if self.macs else ""
            table.add_row(escape(cost.node), f"{cost.params:,}", f"{cost.macs:,}", share)
        return table
