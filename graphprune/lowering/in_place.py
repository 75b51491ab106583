"""Assignments such as ``y += x``, which torch.fx would trace as ``y = y + x``.

To a tensor the two differ: the first one changes whatever else shares its memory, a list that holds ``y`` or the tensor
that ``y`` is a part of. So they are traced as what they are, and become plain arithmetic again where nothing else can
see the difference: for numbers, and for a result that nobody else has.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import Proxy

__all__ = ["InPlaceProxy", "settle_in_place"]


class InPlaceProxy(Proxy):
    """A graph value that notes when it is changed in place."""


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
"""In place -> what gives the same value anew."""


def _noting(function: Callable[..., Any]) -> Callable[[Proxy, Any], Any]:
    def method(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in _PLAIN:
    setattr(InPlaceProxy, f"__{_function.__name__}__", _noting(_function))


def settle_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Write ``y += x`` as ``y + x`` where `y` is a number, or a tensor that nothing else can reach."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _PLAIN:
            changed = node.args[0]
            is_own = set(changed.users) == {node} and _is_new(changed, root)
            if is_own or _is_number(changed):
                node.target = _PLAIN[node.target]
                node.name = graph._graph_namespace.create_name(
                    getattr(node.target, "__name__", "plain").rstrip("_"), None
                )


_NEW_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._AvgPoolNd,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softmax,
)
"""Modules whose output is a tensor of its own, unless they are told to work in place."""
_NEW_FUNCTIONS = frozenset(
    {
        *_PLAIN.values(),
        operator.matmul,
        operator.neg,
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.cat,
        torch.stack,
        torch.matmul,
        torch.bmm,
        torch.relu,
        torch.sigmoid,
        torch.tanh,
        torch.exp,
        torch.softmax,
        F.gelu,
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
    }
)
_NEW_METHODS = frozenset(
    "add sub mul div matmul bmm neg pow exp relu sigmoid tanh softmax clone mean sum".split()
)


def _is_new(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a node makes a tensor of its own, and neither hands on nor shares what it was given."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return isinstance(module, _NEW_MODULES) and not getattr(module, "inplace", False)
    if node.op == "call_method":
        return node.target in _NEW_METHODS
    is_function = node.op == "call_function"
    return is_function and (node.target in _NEW_FUNCTIONS or _is_activation(node))


def _is_activation(node: fx.Node) -> bool:
    """Say whether a node is an activation function that is not told to work in place."""
    is_one = node.target in (F.relu, F.silu, F.leaky_relu, F.hardswish, F.elu, F.mish, F.relu6)
    return is_one and not any(a is True for a in (*node.args, *node.kwargs.values()))


def _is_number(node: Any) -> bool:
    """Say whether a node is computed from sizes alone, which are numbers of Python."""
    if not isinstance(node, fx.Node):
        return isinstance(node, (int, float))
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "nelement", "ndimension", "item")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if node.target is operator.getitem:
        return _is_number(node.args[0])
    is_arithmetic = node.target in _PLAIN or node.target in _PLAIN.values()
    return is_arithmetic and all(_is_number(a) for a in node.args)
