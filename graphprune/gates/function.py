"""Trainable gates: numbers that are exactly 0 or 1 forward, and that gradients move all the same.

The trainable gate function of Kim et al. 2019 is a step plus a sawtooth of height 1/M in a chosen *gradient shape* g:

    TG(w) = b(w) + s(w) g(w),   b(w) = 1[w >= 0],   s(w) = (M w - floor(M w)) / M

Its value tends to b(w) and its derivative to g(w) as M grows. `trainable_gate` is that limit, written down as it is:
b forward, g backward; so nothing is lost in bfloat16, where ``M w`` has no fraction left.

`Gates` holds one number per removal unit and hands out one gate per coupled channel. `GateCost` is the cost model of
a program in these gates: counts become sums of gates, and so it can be differentiated.

Source: Kim et al. 2019, "Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks" (arXiv 1904.10921),
section 3. The step at ``w >= 0`` and the range of ``w`` are our reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.cost import CostModel, Products, Resource
from graphprune.units import Units

__all__ = ["LIMIT", "SHAPES", "GateCost", "Gates", "Shape", "trainable_gate"]

Shape = Literal["one", "triangle", "sech2", "gaussian", "tanh"]

LIMIT = 0.5
"""Gates stay within this distance of the step, so that one that has been shut for long can open again."""


def _tanh(w: Tensor) -> Tensor:
    # Kim's later code has its step at 0.5 and g = tanh; shifted by 1 it is positive wherever our gates are.
    return torch.tanh(w + 1.0)


SHAPES: Mapping[Shape, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "triangle": lambda w: (1.0 - w.abs()).clamp(min=0.0),
    "sech2": lambda w: 1.0 - torch.tanh(w).square(),
    "gaussian": lambda w: torch.exp(-0.5 * w.square()),
    "tanh": _tanh,
}
"""Gradient shapes g(w) by name; the paper asks for a bounded function with a bounded derivative. "one" is the straight-
through estimator. Widths are our reconstruction."""


class _TrainableGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(w)
        ctx.shape = shape
        return (w >= 0).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return SHAPES[cast("Shape", ctx.shape)](w) * grad, None


def trainable_gate(w: Tensor, shape: Shape = "one") -> Tensor:
    """Return 1 where ``w >= 0`` and 0 elsewhere; the gradient of `w` is ``g(w)`` times that of the result.

    Source: Kim et al. 2019, the trainable gate function as M goes to infinity.
    """
    gates: Tensor = _TrainableGate.apply(w, shape)
    return gates


class Gates(nn.Module):
    """One trainable number per removal unit; calling it returns the gate of every coupled channel, exactly 0 or 1."""

    unit_of: Tensor
    """The units of every coupled channel, one per row; the number of units where there is no other."""
    keep: Tensor
    """What the gates are once they are frozen."""

    def __init__(
        self, units: Units, num_channels: int, *, start: Tensor, shape: Shape = "one"
    ) -> None:
        """Open all gates.

        Args:
            units: What the gates open and shut; several may hold the same channel.
            num_channels: How many coupled channels there are.
            start: Positive numbers to start from, shape (len(units),).
            shape: Gradient shape.
        """
        super().__init__()
        self.weight = nn.Parameter(start.clamp(0.0, LIMIT))
        self.shape: Shape = shape
        # Row k holds the k-th unit of each channel.
        order = np.argsort(units.channels, kind="stable")
        channels = units.channels[order]
        first = np.searchsorted(channels, channels)
        rank = np.arange(len(channels)) - first
        rows = np.full((int(rank.max(initial=0)) + 1, num_channels), len(units), np.int64)
        rows[rank, channels] = units.owner[order]
        self.register_buffer("unit_of", torch.from_numpy(rows))
        self.register_buffer("keep", torch.ones(num_channels, dtype=start.dtype))
        self.is_frozen = False

    def forward(self) -> Tensor:
        """Return the gate of every coupled channel, shape (num_channels,)."""
        if self.is_frozen:
            return self.keep
        gates = trainable_gate(self.weight, self.shape)
        found = torch.cat([gates, gates.new_ones(1)])[self.unit_of]
        return found[0] if len(found) == 1 else found.prod(0)

    @torch.no_grad()
    def levels(self) -> Tensor:
        """Return for every coupled channel the lowest number that decides on it; infinite where none does."""
        padded = torch.cat([self.weight, self.weight.new_full((1,), torch.inf)])
        return padded[self.unit_of].amin(0)

    @torch.no_grad()
    def open_units(self, channels: Tensor) -> None:
        """Open the units of some coupled channels, at the threshold; `channels` is a flag per channel."""
        lifted = torch.zeros(len(self.weight) + 1, device=self.weight.device)
        for row in self.unit_of:
            lifted.index_add_(0, row, channels.to(lifted.dtype))
        self.weight.copy_(torch.where(lifted[:-1] > 0, self.weight.clamp(min=0.0), self.weight))

    @torch.no_grad()
    def freeze(self, keep: Tensor) -> None:
        """Make the gates those of a choice, from now on."""
        self.keep.copy_(keep)
        self.is_frozen = True


class GateCost(nn.Module):
    """Cost of a program as a function of gates; 0 and 1 give the cost that `graphprune.cost` counts.

    Source: Kim et al. 2019, the loss of section 3: FLOPs as products of sums of gates.
    """

    def __init__(self, cost: CostModel, resources: Sequence[Resource]) -> None:
        """Take the products of a cost model."""
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: _SumOfProducts(cost.products(name)) for name in resources}
        )

    def forward(self, gates: Tensor) -> Tensor:
        """Return the fraction of every resource that is left, in float64; shape (resources,)."""
        return torch.stack([part(gates) for part in self.parts.values()])


class _SumOfProducts(nn.Module):
    """Sum over terms of ``constant * product of sums of gates``, as a fraction of its value when all gates are open."""

    channels: Tensor
    factor_of: Tensor
    table: Tensor
    constants: Tensor

    def __init__(self, products: Products) -> None:
        super().__init__()
        owners, self.number = products.owners, len(products.owners)
        lengths = np.diff([*products.starts, len(products.channels)])
        each = np.bincount(owners, minlength=len(products.constants))
        # A row per term, its factors side by side; places that are left over point to a factor of one.
        table = np.full((len(products.constants), max(1, each.max(initial=1))), self.number)
        position = np.arange(self.number)
        table[owners, position - (np.cumsum(each) - each)[owners]] = position
        whole = products.values(np.ones(products.channels.max(initial=-1) + 1, np.bool_)).sum()
        self.register_buffer("channels", torch.from_numpy(products.channels))
        self.register_buffer("factor_of", torch.from_numpy(position.repeat(lengths)))
        self.register_buffer("table", torch.from_numpy(table))
        self.register_buffer("constants", torch.from_numpy(products.constants / max(1e-12, whole)))

    def forward(self, gates: Tensor) -> Tensor:
        """Return the fraction of the cost that is left, a scalar in float64."""
        found = gates.double()[self.channels]
        counts = found.new_zeros(self.number).index_add(0, self.factor_of, found)
        factors = torch.cat([counts, counts.new_ones(1)])[self.table]
        return (self.constants * factors.prod(1)).sum()
