"""Remove residual blocks: every sum that loses its branch is its shortcut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.groups import DependencyGroups
from graphprune.outcome import Removed
from graphprune.pipeline import Context, Facts, Pass, SurgeryResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.residual import named_blocks, with_silent_blocks, without_blocks

__all__ = ["RemoveBlocks"]


@dataclass(frozen=True, kw_only=True)
class RemoveBlocks(Pass):
    """Remove the residual blocks that the plan names, or that you name.

    The result equals the program that came in with zeros in place of what their branches return; the driver proves it.
    """

    name: ClassVar[str] = "remove-blocks"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    names: str = ""
    """Residual blocks, several with commas: "layer1.3,layer2.5"; empty: those of the plan."""

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Return the program without them."""
        groups = context.need(DependencyGroups)
        names = self.names.split(",") if self.names else context.need(Plan).blocks
        blocks = named_blocks(program, groups, names)
        if not blocks:
            return SurgeryResult(program=program, modified=False)
        step = f"{self.name}: {', '.join(block.name for block in blocks)}"
        return SurgeryResult(
            program=without_blocks(program, groups, blocks, step=step),
            modified=True,
            removed=Removed(blocks=tuple(block.name for block in blocks)),
            reference=with_silent_blocks(program, blocks),
        )
