"""Remove residual blocks: every sum that loses its branch is its shortcut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.contract import Context, Facts, Pass, SurgeryResult
from graphprune.groups import DependencyGroups
from graphprune.outcome import Kept, Removed
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.residual import (
    find_residual_blocks,
    named_blocks,
    no_blocks,
    with_silent_blocks,
    without_blocks,
)

__all__ = ["RemoveBlocks"]


@dataclass(frozen=True, kw_only=True)
class RemoveBlocks(Pass):
    """Remove the residual blocks that the plan names, or that you name.

    The result equals the program that came in with zeros in place of what their branches return; the driver proves it.
    """

    name: ClassVar[str] = "remove-blocks"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    names: tuple[str, ...] = ()
    """Residual blocks, or modules that hold some: (layer1.3,layer2); none: those of the plan."""

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Return the program without them."""
        groups = context.need(DependencyGroups)
        # A plan names those that have gone before as well.
        names = self.names or context.need(Plan).blocks[len(program.lost_blocks) :]
        blocks = named_blocks(program, groups, names)
        if not blocks:
            known = find_residual_blocks(program, groups)
            kept = () if known else (Kept("residual blocks", no_blocks(program)),)
            return SurgeryResult(program=program, modified=False, kept=kept)
        step = f"{self.name}: {', '.join(block.name for block in blocks)}"
        return SurgeryResult(
            program=without_blocks(program, groups, blocks, step=step),
            modified=True,
            removed=Removed(blocks=tuple(block.name for block in blocks)),
            reference=with_silent_blocks(program, blocks),
        )
