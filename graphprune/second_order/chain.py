"""Chains: networks whose layers stand one behind the other, so that errors of layers bound the error of the output.

Source: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", theorem
3.2, for linear layers and ReLU. For convolutions, our extension: with E the mean squared change of one place of the
output, the whole output changes by the number of places times E; and a change of the input reaches every patch that
overlaps it, so that the gain is the weight's Frobenius norm times the root of the most patches an element is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from graphprune.program import Program
from graphprune.second_order.layers import Layer, layers
from graphprune.second_order.layerwise import LayerOutcome
from graphprune.second_order.weights import error_bound

__all__ = ["bound_of", "chain_of"]

_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Identity,
    nn.LeakyReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Tanh,
    nn.Unflatten,
)
"""Modules that bring no two inputs further apart; pooling is looked at more closely."""

_NAMES = frozenset(
    "relu relu_ dropout flatten view reshape tanh sigmoid squeeze unsqueeze contiguous clone "
    "_unsafe_view permute transpose".split()
)
"""Functions, methods and ATen operators of that kind."""


def chain_of(program: Program) -> tuple[Layer, ...] | None:
    """Return the layers of a program from input to output, or None where it is not a chain.

    It is one where every layer reads the layer before, the first the input, and the output the last, with nothing but
    operators in between that stretch no distances.
    """
    found = layers(program)
    if not found or len(program.example_inputs) != 1:
        return None
    known = {layer.node: layer for layer in found}
    nodes = {node.name: node for node in program.module.graph.nodes}
    (output,) = (node for node in nodes.values() if node.op == "output")
    results = output.all_input_nodes
    if len(results) != 1:
        return None
    chain: list[Layer] = []
    node: fx.Node | None = results[0]
    while node is not None and node.op != "placeholder":
        if node.name in known:
            layer = known[node.name]
            if layer.padding_mode != "constant":
                return None
            chain.append(layer)
            node = nodes[layer.input]
        else:
            node = _before(node, program.module)
    if node is None or len(chain) != len(found):
        return None
    return tuple(reversed(chain))


def bound_of(program: Program, pruned: Program, outcomes: Sequence[LayerOutcome]) -> float | None:
    """Return the bound on the root mean square change of the output, per element of the batch; None if not a chain."""
    chain = chain_of(program)
    if chain is None:
        return None
    by_node = {layer.node: outcome for outcome in outcomes for layer in outcome.layers}
    tensors = dict(pruned.module.named_parameters())
    errors, gains = [], []
    for layer in chain:
        outcome = by_node.get(layer.node)
        if outcome is not None and len(outcome.layers) > 1:
            return None  # the error of a weight that is used twice is a mean
        errors.append(0.0 if outcome is None else outcome.error * outcome.places)
        gains.append(float(tensors[layer.weight].detach().norm()) * math.sqrt(_overlap(layer)))
    return error_bound(errors, gains)


def _overlap(layer: Layer) -> int:
    """Return the number of patches that an element of the input is in, at most."""
    return math.prod(-(-k // s) for k, s in zip(layer.kernel_size, layer.stride, strict=True))


def _before(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the node that `node` reads, if that is all it does; None if it may stretch distances."""
    sources = [one for one in node.all_input_nodes if one.op != "get_attr"]
    if not sources or (len({*sources[1:]} - {sources[0]}) > 0 and not _is_shaping(node)):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, _MODULES) and getattr(module, "negative_slope", 0.0) <= 1:
            return source
        pooling = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d)
        if isinstance(module, pooling):
            return source if _is_disjoint(module.kernel_size, module.stride) else None
        return None
    if node.target in (F.max_pool2d, F.max_pool1d, torch.ops.aten.max_pool2d.default):
        given: dict[str, Any] = {
            **dict(zip(("input", "kernel_size", "stride"), node.args, strict=False)),
            **node.kwargs,
        }
        return source if _is_disjoint(given["kernel_size"], given.get("stride")) else None
    return source if _name(node) in _NAMES else None


def _is_shaping(node: fx.Node) -> bool:
    return _name(node) in ("view", "reshape")


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).split("::")[-1]
    return str(getattr(node.target, "__name__", node.target))


def _is_disjoint(kernel: Any, stride: Any) -> bool:
    kernels = kernel if isinstance(kernel, (tuple, list)) else (kernel,)
    strides = (stride or kernel) if isinstance(stride or kernel, (tuple, list)) else (stride,)
    pairs = zip(kernels, strides * len(kernels) if len(strides) == 1 else strides, strict=True)
    return all(k <= s for k, s in pairs)
