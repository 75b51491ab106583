"""The table of one-pattern networks: how a pattern is written down, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PATTERNS", "Net", "Pattern", "conv", "lin", "pattern", "rand"]


class Net(nn.Module):
    """Runs a function of itself and its inputs; parts, parameters and buffers are attributes."""

    def __init__(
        self, run: Callable[..., Any], *, shape: tuple[int, ...] = (3, 6, 5), **parts: Any
    ) -> None:
        super().__init__()
        self.run = run
        self.example: tuple[Tensor, ...] = (torch.randn(1, *shape),)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)

    def on(self, *example: Tensor) -> Net:
        """Set the example input."""
        self.example = example
        return self


class Pair(Net):
    """A `Net` of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.run(self, x, y)


@dataclass(frozen=True)
class Pattern:
    """One way in which people write a network."""

    name: str
    make: Callable[[], Net]
    cut: tuple[str, ...]
    """Parameter dimensions that lose channels when half of the channels go."""
    kept: tuple[str, ...] = ()
    """Parameter dimensions that cannot, though the next layer would take fewer: what holds them back is in `why`."""
    why: str = ""
    """A part of the reason that the report gives for `kept`."""
    zeros: bool = True
    """Whether zeros in all removed slices of the original's parameters must give the cut network's outputs. So
    it is unless a removed channel is summed over or normalised without a weight of its own."""


PATTERNS: dict[str, Pattern] = {}


def pattern(
    cut: str, *, kept: str = "", why: str = "", zeros: bool = True
) -> Callable[[Callable[[], Net]], Callable[[], Net]]:
    """Register a maker of a network, with what must be cut of it.

    Args:
        cut: Names: a module stands for dim 0 of its weight, ``a.weight[1]`` for another dimension.
        kept: Names of what is pinned.
        why: A part of the reason.
        zeros: See `Pattern.zeros`.
    """

    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split())

    def register(make: Callable[[], Net]) -> Callable[[], Net]:
        name = make.__name__
        assert name not in PATTERNS, f"two patterns {name}"
        PATTERNS[name] = Pattern(name, make, names(cut), names(kept), why, zeros)
        return make

    return register


def conv(ins: int, outs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the spatial size."""
    return nn.Conv2d(ins, outs, size, **{"padding": size // 2, **options})


def lin(ins: int, outs: int, **options: Any) -> nn.Linear:
    """Return a linear layer."""
    return nn.Linear(ins, outs, **options)


def rand(*sizes: int) -> nn.Parameter:
    """Return a parameter of numbers between 0.5 and 1.5."""
    return nn.Parameter(torch.rand(*sizes) + 0.5)
