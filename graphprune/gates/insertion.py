"""Gate insertion: a program in which every removal unit has a gate, and a gate of 0 is the removal.

A removal is exact when its channels are zero at their *consumers*, wherever an operator sums over them. There the
gates go, one gate per unit, shared by all its consumers:

    linear, convolution       W x: the columns of W that read the channel are multiplied; W is small, x is not
    matrix product, attention, sum            the operand is multiplied
    layer, RMS, group norm    mean and variance are taken over the open channels

Channels that something else sums over stay, with the reason. The result is a `Program` of its own, with copies of the
parameters under the same names, and the gates as one more parameter: what trains a program trains it with its gates.

Source: Kim et al. 2019, "Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks", section 3 (the trainable
gate layer). Gates at the consumers, on weights, and inside normalisations are our own.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from graphprune.gates.function import Gates, Shape
from graphprune.gates.layers import (
    GatedLayer,
    GatedNorm,
    Mask,
    can_gate_layer,
    can_gate_norm,
    gated_group_norm,
    gated_layer_norm,
    gated_rms_norm,
    weight_index,
)
from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms
from graphprune.labels.trace import Consumer, TensorInfo
from graphprune.outcome import Kept
from graphprune.program import Program
from graphprune.scores import Scores
from graphprune.units import Granularity, Units, find_units

__all__ = ["PREFIX", "Gated", "insert_gates"]

PREFIX = "graphprune_gates"
"""Under this name a gated program holds what it has besides the program that it was made of."""


@dataclass(frozen=True, kw_only=True)
class Gated:
    """A program with gates."""

    program: Program
    """Holds copies of the parameters under the names that they had."""
    original: Program
    """What gates were inserted into; it stays as it is."""
    gates: Gates
    groups: DependencyGroups
    """The analysis that came in, with the channels that cannot be gated pinned."""
    units: Units
    """What each gate opens and shuts."""
    kept: tuple[Kept, ...]
    """What cannot be gated, and why."""

    def to_original(self, program: Program) -> None:
        """Copy the values of the parameters and buffers into the program that gates were inserted into."""
        mine = dict(self.program.named_tensors())
        with torch.no_grad():
            for name, tensor in program.named_tensors():
                tensor.copy_(mine[name])


def insert_gates(
    program: Program,
    groups: DependencyGroups,
    scores: Scores,
    *,
    granularity: Sequence[Granularity] = ("channels",),
    shape: Shape = "one",
) -> Gated:
    """Return a program with one gate per removal unit, all open; it computes what `program` does.

    Args:
        program: Stays as it is.
        groups: Its analysis.
        scores: Ties channels to units where rows must keep equal counts, and says which gates start near the step.
        granularity: What has gates.
        shape: Gradient shape of the gates.
    """
    sites, kept, pinned = _find_sites(program, groups)
    groups = dataclasses.replace(groups, pinned=pinned)
    units = find_units(groups, scores.values, granularity=granularity)
    dtype = next((t.dtype for _, t in program.named_tensors() if t.is_floating_point()), None)
    start = torch.from_numpy(_start(units)).to(dtype or torch.float32)
    gates = Gates(units, groups.num_channels, start=start, shape=shape)
    module = copy.deepcopy(program.module)
    module.add_submodule(PREFIX, gates)
    mine = np.zeros(groups.num_channels, np.bool_)
    mine[units.channels] = True
    _Inserter(module).insert([s for s in sites if mine[s.index].any()])
    return Gated(
        program=program.evolve(module),
        original=program,
        gates=gates,
        groups=groups,
        units=units,
        kept=kept,
    )


def _start(units: Units) -> np.ndarray:
    """Return where each gate starts: nearer to the step, the less its unit's score is for its group."""
    totals = np.bincount(units.group, weights=units.score)
    means = totals / np.maximum(1, np.bincount(units.group))
    relative = units.score / np.maximum(means[units.group], 1e-300)
    rank = np.argsort(np.argsort(relative, kind="stable"), kind="stable")
    start: np.ndarray = (0.1 + 0.3 * (rank + 1) / max(1, len(units))).astype(np.float64)
    return start


# -- where gates go -----------------------------------------------------------------------------------------------

_Rewrite = Callable[["_Inserter", fx.Node, fx.Node], None]


@dataclass(frozen=True)
class _Site:
    """One place where gates are multiplied."""

    node: str
    index: Atoms
    """The coupled channel of every entry of the mask."""
    rewrite: _Rewrite


@dataclass(frozen=True)
class _Refused:
    why: str


def _find_sites(
    program: Program, groups: DependencyGroups
) -> tuple[list[_Site], tuple[Kept, ...], np.ndarray]:
    """Return where gates go, what cannot have any, and which channels are pinned in the end."""
    nodes = {node.name: node for node in program.module.graph.nodes}
    consumers = [(one, groups.channel_of[one.field.atoms]) for one in groups.labels.consumers]
    relevant = [(one, ch) for one, ch in consumers if not groups.pinned[ch].all()]
    number = {
        node: sum(one.node == node for one, _ in relevant)
        for node in {one.node for one, _ in relevant}
    }
    sites: list[_Site] = []
    pinned = groups.pinned.copy()
    kept: dict[str, Kept] = {}
    for one, channels in relevant:
        node = nodes[one.node]
        found = _Look(program, groups, node, one).site(number[one.node])
        if isinstance(found, _Site):
            sites.append(found)
            continue
        pinned[channels] = True
        for group in groups:
            if not group.pinned and np.isin(group.channels, channels).any():
                what = f"{group.name} ({len(group)} channels)"
                kept.setdefault(what, Kept(what, found.why))
    return sites, tuple(kept.values()), pinned


_ATEN = torch.ops.aten
_LINEAR = {F.linear, _ATEN.linear.default}
_CONV = {
    *(F.conv1d, F.conv2d, F.conv3d, _ATEN.convolution.default),
    *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default),
    *(_ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding),
}
_CONV_TRANSPOSED = {
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input),
}
_OPERANDS = {
    *(torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.sum),
    *(torch.einsum, _ATEN.einsum.default),
    *(_ATEN.matmul.default, _ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default),
    *(_ATEN.baddbmm.default, _ATEN.sum.default, _ATEN.sum.dim_IntList),
    *(F.scaled_dot_product_attention, _ATEN.scaled_dot_product_attention.default),
}
"""Functions that are one operator, whose tensors are its own in the same order."""
_OPERANDS_OF_OTHERS = {"transformers.grouped_mm_fallback.default"}
"""The same, of libraries that may not be there."""
_OPERAND_METHODS = {"matmul", "mm", "bmm", "sum", "__matmul__"}
_NORMS: Mapping[Any, Callable[..., Tensor]] = {
    F.layer_norm: gated_layer_norm,
    torch.layer_norm: gated_layer_norm,
    _ATEN.layer_norm.default: gated_layer_norm,
    F.rms_norm: gated_rms_norm,
    torch.rms_norm: gated_rms_norm,
    _ATEN.rms_norm.default: gated_rms_norm,
    F.group_norm: gated_group_norm,
    torch.group_norm: gated_group_norm,
    _ATEN.group_norm.default: gated_group_norm,
}


@dataclass(frozen=True)
class _Look:
    """One consumer, looked at to find out how gates get there."""

    program: Program
    groups: DependencyGroups
    node: fx.Node
    consumer: Consumer

    def site(self, number: int) -> _Site | _Refused:
        """Return where the gates of the consumer go; `number` is how many consumers its node has."""
        node = self.node
        if self.consumer.occurrence == 0:
            if node.op == "call_module":
                module = self.program.module.get_submodule(str(node.target))
                if can_gate_layer(module) and self.consumer.slot == 0:
                    return self._layer(module)
                if can_gate_norm(module) and number == 1:
                    return self._shaped(node.args or tuple(node.kwargs.values()), _norm_module)
            elif node.op == "call_function":
                target: Any = node.target
                if target in _LINEAR | _CONV | _CONV_TRANSPOSED and self.consumer.slot == 0:
                    return self._function()
                if target in _OPERANDS or str(target) in _OPERANDS_OF_OTHERS:
                    return self._operand()
                if target in _NORMS and number == 1 and node.args:
                    return self._shaped(node.args, _norm_function)
            elif node.op == "call_method" and node.target in _OPERAND_METHODS:
                return self._operand()
        return _Refused(
            f"{self.consumer.operator} at node {node.name} sums over it, in a way that no gate can stand for"
        )

    def _layer(self, module: nn.Module) -> _Site | _Refused:
        weight: Any = module.weight
        given = (*self.node.args, *self.node.kwargs.values())
        groups = int(getattr(module, "groups", 1))
        is_transposed = bool(getattr(module, "transposed", False))
        return self._weight(
            given, tuple(weight.shape), groups, is_transposed=is_transposed, rewrite=_layer_module
        )

    def _function(self) -> _Site | _Refused:
        node = self.node
        given: dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
        weight = self._info(given.get("weight", given.get(1)))
        is_whole = node.target is _ATEN.convolution.default
        groups = given.get("groups", given.get(8 if is_whole else 6, 1))
        transposed = node.target in _CONV_TRANSPOSED or (is_whole and bool(given[6]))
        if weight is None or not isinstance(groups, int):
            return self._operand()
        return self._weight(
            node.args,
            weight.shape,
            1 if node.target in _LINEAR else groups,
            is_transposed=transposed,
            rewrite=_layer_function,
        )

    def _weight(
        self,
        given: Sequence[Any],
        weight: tuple[int, ...],
        groups: int,
        *,
        is_transposed: bool,
        rewrite: _Rewrite,
    ) -> _Site | _Refused:
        """Gate the columns of a weight; the input where its label is not the channel's alone."""
        x = self._info(given[0]) if given else None
        dims, atoms = self.consumer.field.dims, self.consumer.field.atoms
        channel = None if x is None else len(x.shape) - max(1, len(weight) - 1)
        if dims != (channel,):
            return self._operand()
        index = weight_index(
            self.groups.channel_of[atoms], weight, groups=groups, transposed=is_transposed
        )
        return _Site(self.node.name, index, rewrite)

    def _operand(self) -> _Site | _Refused:
        flat, tree = tree_flatten(self.node.args)
        places = [p for p, a in enumerate(flat) if self._info(a) is not None]
        slot = self.consumer.slot
        if slot >= len(places):
            return _Refused(
                f"{self.consumer.operator} at node {self.node.name} takes it as a named argument"
            )
        place = places[slot]

        def rewrite(inserter: _Inserter, node: fx.Node, mask: fx.Node) -> None:
            given = tree_leaves(node.args)  # other gates may be on it by now
            given[place] = inserter.product(node, given[place], mask)
            node.args = tree_unflatten(given, tree)

        return self._shaped((flat[place],), rewrite)

    def _shaped(self, given: Sequence[Any], rewrite: _Rewrite) -> _Site | _Refused:
        """Gate a whole tensor, the first of those given."""
        x = self._info(given[0])
        assert x is not None
        index = self.groups.channel_of[self.consumer.field.over(len(x.shape))]
        return _Site(self.node.name, index, rewrite)

    def _info(self, value: Any) -> TensorInfo | None:
        info = self.groups.labels.values.get(value.name) if isinstance(value, fx.Node) else None
        return info if isinstance(info, TensorInfo) else None


# -- how they get there ---------------------------------------------------------------------------------------------


class _Inserter:
    """Edits the graph of a module that holds `Gates`."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        first = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        with self.graph.inserting_before(first):
            self.gates = self.graph.call_module(PREFIX)
        self.masks: dict[tuple[bytes, tuple[int, ...]], fx.Node] = {}
        self.count = 0

    def insert(self, sites: Sequence[_Site]) -> None:
        nodes = {node.name: node for node in self.graph.nodes}
        for site in sites:
            site.rewrite(self, nodes[site.node], self.mask(site.index))
        self.graph.lint()
        self.module.recompile()

    def mask(self, index: Atoms) -> fx.Node:
        """Return the node of a mask; equal ones are made once."""
        key = index.tobytes(), index.shape
        if key not in self.masks:
            name = self.add("mask", Mask(index))
            with self.graph.inserting_after(self.gates):
                self.masks[key] = self.graph.call_module(name, (self.gates,))
        return self.masks[key]

    def add(self, kind: str, module: nn.Module) -> str:
        """Put a module into the tree and return its name."""
        name = f"{PREFIX}_{kind}_{self.count}"
        self.count += 1
        self.module.add_submodule(name, module)
        return name

    def product(self, node: fx.Node, value: fx.Node, mask: fx.Node) -> fx.Node:
        with self.graph.inserting_before(node):
            return self.graph.call_function(torch.mul, (value, mask))


def _layer_module(inserter: _Inserter, node: fx.Node, mask: fx.Node) -> None:
    layer = inserter.module.get_submodule(str(node.target))
    node.target = inserter.add("layer", GatedLayer(layer))
    node.args = (mask, *node.args)


def _norm_module(inserter: _Inserter, node: fx.Node, mask: fx.Node) -> None:
    layer = inserter.module.get_submodule(str(node.target))
    node.target = inserter.add("norm", GatedNorm(layer))
    node.args = (mask, *node.args)


def _norm_function(inserter: _Inserter, node: fx.Node, mask: fx.Node) -> None:
    target: Any = node.target
    node.target = _NORMS[target]
    node.args = (mask, *node.args)


def _layer_function(inserter: _Inserter, node: fx.Node, mask: fx.Node) -> None:
    weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    assert isinstance(weight, fx.Node)
    product = inserter.product(node, weight, mask)
    if "weight" in node.kwargs:
        node.update_kwarg("weight", product)
    else:
        node.update_arg(1, product)
