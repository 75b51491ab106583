"""Cost: parameters and multiply-accumulates, exact for any choice of channels without cutting anything.

Both are sums of products of counts. A parameter with labels along its dimensions holds ``product over dims
(kept indices)`` elements; a contraction noted during propagation does ``constant * product over factors (kept
atoms)`` multiply-accumulates for one sample. Biases, normalisations and elementwise operations are not counted,
as in ``torch.utils.flop_counter``. FLOPs = 2 x MACs.

Bytes and milliseconds of the exported file are sums of the same form, once they have been measured
(`graphprune.measured`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphprune.flow import first_users
from graphprune.labels.atoms import Atoms
from graphprune.labels.trace import Labels
from graphprune.program import Origin, Program

__all__ = [
    "RESOURCES",
    "Cost",
    "CostModel",
    "Keep",
    "NodeCost",
    "Products",
    "Resource",
    "element_term",
]

Keep = NDArray[np.bool_]

Resource = Literal["macs", "params", "size", "latency"]
RESOURCES: tuple[Resource, ...] = ("macs", "params", "size", "latency")
"""What a target can limit."""


@dataclass(frozen=True)
class Cost:
    """Totals of a program for one sample."""

    params: int
    macs: int
    size: int = 0
    """Bytes of the exported file; 0 where they were not measured."""
    latency: float = 0.0
    """Milliseconds of one sample in ONNX Runtime, as a model of measurements has it; 0 where none were taken."""


@dataclass(frozen=True)
class NodeCost:
    """What one node of the graph costs for one sample."""

    node: str
    params: int
    macs: int


@dataclass(frozen=True)
class Products:
    """A list of ``constant * product of counts``, evaluated at once."""

    constants: NDArray[np.float64]
    channels: Atoms
    """All factors behind one another, as coupled channels."""
    starts: NDArray[np.int64]
    """Where each factor starts in `channels`."""
    owners: NDArray[np.int64]
    """Which product each factor belongs to."""

    @classmethod
    def sum_of(cls, parts: Sequence[tuple[float, Products]], constant: float = 0.0) -> Products:
        """Return the products of a weighted sum of sums, and a constant."""
        terms = np.cumsum([0, *(len(p.constants) for _, p in parts)])
        factors = np.cumsum([0, *(len(p.channels) for _, p in parts)])
        nothing = np.zeros(0, np.int64)
        return cls(
            constants=np.array([*(c for w, p in parts for c in w * p.constants), constant]),
            channels=np.concatenate([nothing, *(p.channels for _, p in parts)]),
            starts=np.concatenate(
                [nothing, *(p.starts + at for (_, p), at in zip(parts, factors, strict=False))]
            ),
            owners=np.concatenate(
                [nothing, *(p.owners + at for (_, p), at in zip(parts, terms, strict=False))]
            ),
        )

    @classmethod
    def of(cls, terms: Sequence[tuple[float, Sequence[Atoms]]], channel_of: Atoms) -> Products:
        """Build the products ``(constant, factors in atoms)``."""
        factors = [(i, channel_of[f].ravel()) for i, (_, fs) in enumerate(terms) for f in fs]
        lengths = [len(f) for _, f in factors]
        return cls(
            constants=np.array([c for c, _ in terms], dtype=np.float64),
            channels=np.concatenate([f for _, f in factors]) if factors else np.zeros(0, np.int64),
            starts=np.cumsum([0, *lengths[:-1]]) if factors else np.zeros(0, np.int64),
            owners=np.array([i for i, _ in factors], dtype=np.int64),
        )

    def values(self, keep: Keep) -> NDArray[np.float64]:
        """Return every product when the channels in `keep` are left."""
        result = self.constants.copy()
        if len(self.channels):
            counts = np.add.reduceat(keep[self.channels].astype(np.float64), self.starts)
            np.multiply.at(result, self.owners, counts)
        return result

    def marginal(self, num_channels: int) -> NDArray[np.float64]:
        """Return what the dense sum loses, to first order, with each channel."""
        result = np.zeros(num_channels)
        if len(self.channels):
            lengths = np.diff([*self.starts, len(self.channels)])
            totals = self.values(np.ones(num_channels, np.bool_))
            np.add.at(result, self.channels, np.repeat(totals[self.owners] / lengths, lengths))
        return result


@dataclass(frozen=True)
class CostModel:
    """Parameters and MACs of a program as functions of the channels that are kept."""

    num_channels: int
    nodes: tuple[str, ...]
    """The node of each contraction."""
    param_names: tuple[str, ...]
    param_nodes: Mapping[str, str]
    """Parameter -> the first node that uses it."""
    _macs: Products
    _params: Products
    measured: Mapping[Resource, Products] = field(default_factory=lambda: MappingProxyType({}))
    """What was measured besides, in bytes and milliseconds."""
    measured_before: Mapping[Resource, float] = field(default_factory=lambda: MappingProxyType({}))
    """The same of the model that came in, where the program is what is left of one."""

    @classmethod
    def build(
        cls, program: Program, labels: Labels, channel_of: Atoms, num_channels: int
    ) -> CostModel:
        """Build the model from propagated labels.

        Args:
            program: The labelled program.
            labels: Its labels.
            channel_of: Atom -> coupled channel.
            num_channels: How many coupled channels there are.
        """
        parameters = dict(program.module.named_parameters())
        terms = [element_term(name, p, labels) for name, p in parameters.items()]
        return cls(
            num_channels=num_channels,
            nodes=tuple(t.node for t in labels.terms),
            param_names=tuple(parameters),
            param_nodes=first_users(program, parameters),
            _macs=Products.of([(t.constant, t.factors) for t in labels.terms], channel_of),
            _params=Products.of(terms, channel_of),
        )

    def everything(self) -> Keep:
        """Return the choice that keeps every channel."""
        return np.ones(self.num_channels, dtype=np.bool_)

    def total(self, keep: Keep | None = None) -> Cost:
        """Return what the program costs when the channels in `keep` are left (all of them by default)."""
        keep = self.everything() if keep is None else keep
        found = {name: float(p.values(keep).sum()) for name, p in self.measured.items()}
        return Cost(
            params=round(self._params.values(keep).sum()),
            macs=round(self._macs.values(keep).sum()),
            size=round(found.get("size", 0.0)),
            latency=found.get("latency", 0.0),
        )

    def saved(self, resource: Resource) -> NDArray[np.float64]:
        """Return how much of a resource the dense program saves, to first order, with each channel."""
        return self.products(resource).marginal(self.num_channels)

    def products(self, resource: Resource) -> Products:
        """Return the products whose sum is the amount of a resource: one per contraction, or per parameter.

        Raises:
            KeyError: Nobody has measured it.
        """
        known = {"macs": self._macs, "params": self._params, **self.measured}
        return known[resource]

    def with_measured(self, resource: Resource, products: Products) -> CostModel:
        """Return the model with one more resource."""
        return replace(self, measured=MappingProxyType({**self.measured, resource: products}))

    @property
    def params(self) -> int:
        """Parameters of the dense program."""
        return self.total().params

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense program for one sample."""
        return self.total().macs

    def origin_of(self, program: Program) -> Origin:
        """Return what the program, which costs this, was before anything of it went."""
        return program.origin or Origin.of(program, params=self.params, macs=self.macs)

    def before(self, program: Program) -> Cost:
        """Return what the program, which costs this, cost before anything of it went."""
        origin, now = self.origin_of(program), self.total()
        return Cost(
            params=origin.params,
            macs=origin.macs,
            size=round(self.measured_before.get("size", now.size)),
            latency=self.measured_before.get("latency", now.latency),
        )

    def per_node(self, keep: Keep | None = None) -> list[NodeCost]:
        """Return what every node costs, in graph order; shared parameters count at their first user."""
        keep = self.everything() if keep is None else keep
        macs: dict[str, float] = {}
        for node, value in zip(self.nodes, self._macs.values(keep), strict=True):
            macs[node] = macs.get(node, 0.0) + value
        params: dict[str, float] = {}
        for name, value in zip(self.param_names, self._params.values(keep), strict=True):
            node = self.param_nodes.get(name, name)
            params[node] = params.get(node, 0.0) + value
        nodes = dict.fromkeys([*macs, *params])
        return [NodeCost(n, round(params.get(n, 0)), round(macs.get(n, 0))) for n in nodes]


def element_term(name: str, tensor: Tensor, labels: Labels) -> tuple[float, list[Atoms]]:
    """Return the elements of a parameter or buffer as ``constant * product of counts``."""
    source = labels.sources.get(name)
    axes = dict(source.atoms) if source else {}
    constant = math.prod(n for d, n in enumerate(tensor.shape) if d not in axes)
    return float(constant), list(axes.values())
