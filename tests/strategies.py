"""Random small networks for property tests.

A network is drawn as a *recipe*, a tuple of plain numbers and names that prints in a failing example, and `build` makes a
module of it: the same recipe and seed give the same weights. Every block takes and returns a tensor of known shape, so
blocks nest freely in residual sums and concatenations. Widths differ wherever they can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from tests.blocks import IMAGE_BLOCKS, TOKEN_BLOCKS, Maker

__all__ = ["Network", "Recipe", "build", "networks"]


@dataclass(frozen=True)
class Recipe:
    """What a network consists of, as text and numbers."""

    rank: int
    """Spatial dimensions of the input: 1, 2 or 3; 0 for tokens."""
    channels: int
    """Channels of the input."""
    blocks: tuple[tuple[str, int], ...]
    """Names of blocks, each with the seed of its own choices."""
    head: str
    """What makes the output of the last block's output."""
    seed: int
    """Seed of weights."""


@dataclass
class _Built:
    blocks: list[nn.Module] = field(default_factory=list)


class Network(nn.Module):
    """Blocks one after the other, then a head."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        """Run all blocks and the head."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)
