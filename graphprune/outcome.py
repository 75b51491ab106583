"""What a surgery removed, and what it could have removed and did not: plain data for the report."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Kept", "Removed"]


@dataclass(frozen=True)
class Kept:
    """An opportunity that was refused."""

    what: str
    """The group, layer or parameter that stays."""
    why: str
    """The reason, with the node or operator that caused it."""


@dataclass(frozen=True)
class Removed:
    """Everything that was cut out of a program."""

    channels: int = 0
    """Coupled channels: one that lives in five layers counts once."""
    heads: int = 0
    """Attention heads."""
    layers: tuple[str, ...] = ()
    """Names of the layers that became the identity."""
    blocks: tuple[str, ...] = ()
    """Names of the residual blocks that were bypassed."""
    branches: tuple[str, ...] = ()
    """Names of the operands that left a sum or a concatenation."""

    def __add__(self, other: Removed) -> Removed:
        """Join what two surgeries removed, the first one's names first."""
        return Removed(
            channels=self.channels + other.channels,
            heads=self.heads + other.heads,
            layers=self.layers + other.layers,
            blocks=self.blocks + other.blocks,
            branches=self.branches + other.branches,
        )

    def __bool__(self) -> bool:
        """Tell whether anything was removed."""
        return self != Removed()
