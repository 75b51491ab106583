"""The symbolic tracer: an nn.Module to a plain torch.fx GraphModule that holds no opaque Python function."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphprune.lowering.attention import LOWERINGS, can_lower
from graphprune.lowering.copies import copy_structure
from graphprune.lowering.in_place import InPlaceProxy, settle_in_place

__all__ = [
    "OpaqueFunctionError",
    "ShapesOnly",
    "SymbolicTracer",
    "erase_dead",
    "run_tracer",
    "tensors_of",
    "trace",
]

_TRANSPARENT = ("torch", "operator", "_operator", "math", "builtins")
_THROUGH = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerDecoder,
    nn.Transformer,
)
_COMPOSITE = {"torch.nn.functional.multi_head_attention_forward"}


class OpaqueFunctionError(RuntimeError):
    """A traced graph calls a Python function or a TorchScript module, which may hide sizes."""


class SymbolicTracer(fx.Tracer):
    """Traces a module on as many inputs as the example has; attention becomes visible operations."""

    def __init__(self, *, num_inputs: int) -> None:
        super().__init__()
        self.num_inputs = num_inputs

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a value that notes when it is changed in place."""
        return InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether the graph calls `m` instead of showing what it does."""
        if can_lower(m) or type(m) in _THROUGH:
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace through the lowered form of a module that has one."""
        if can_lower(m):
            lowered = LOWERINGS[type(m)]
            return super().call_module(m, lambda *a, **k: lowered(m, *a, **k), args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder per example input; parameters beyond them keep their Python defaults."""
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]
        names: list[str] = []
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}_{i}" for i in range(self.num_inputs - len(names))]
        inputs = [
            self.create_proxy("placeholder", name, (), {}) for name in names[: self.num_inputs]
        ]
        return root_fn, [self.root, *inputs]


def trace(model: nn.Module, *, num_inputs: int) -> fx.GraphModule:
    """Trace `model`, which is in evaluation mode, on `num_inputs` positional tensors.

    The result shares the model's tensors but none of its module objects, so that the model's owner may go on using
    its training flags and attributes.

    Raises:
        OpaqueFunctionError: The graph calls a Python function from outside torch.
        Exception: Whatever Python control flow over symbolic values raises in the model's own code.
    """
    return run_tracer(SymbolicTracer(num_inputs=num_inputs), model)


def run_tracer(tracer: SymbolicTracer, model: nn.Module) -> fx.GraphModule:
    """Trace `model` with `tracer` and clean the graph; `model` is copied first, so that no trace of it stays there."""
    # Models cache values and the tracer stores constants: both would leave symbolic values on the caller's module.
    model = copy_structure(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        graph = tracer.trace(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    _clean(graph, model)
    used = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    root = {str(node.target): _attribute(model, node) for node in used}
    # torch.save keeps the code of a graph and traces that when it loads it: plainly, not with this tracer.
    graph._tracer_cls = None
    module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    module.eval()
    return module


def _attribute(root: nn.Module, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(root)


def _clean(graph: fx.Graph, root: nn.Module) -> None:
    """Remove what means nothing in evaluation mode; refuse what hides sizes."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and not isinstance(_attribute(root, node), Tensor):
            raise OpaqueFunctionError(
                f"node {node.name} hands on {node.target}, which is not a tensor"
            )
        if node.op != "call_function":
            continue
        owner = getattr(node.target, "__module__", None) or "torch"
        name = f"{owner}.{getattr(node.target, '__name__', node.target)}"
        if name == "torchvision.ops.stochastic_depth.stochastic_depth":
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            graph.erase_node(node)
        elif name == "torchvision.utils._log_api_usage_once" or node.target in (
            torch._assert,
            torch._check,
        ):
            graph.erase_node(node)
        elif owner.split(".")[0] not in _TRANSPARENT or name in _COMPOSITE:
            raise OpaqueFunctionError(f"node {node.name} calls the Python function {name}")
    settle_in_place(graph, root)
    erase_dead(graph, root)
    for node in graph.nodes:
        written = node.args[0] if node.args and is_impure(node, root) else None
        if isinstance(written, fx.Node) and str(written.target).startswith("_tensor_constant"):
            raise OpaqueFunctionError(
                f"node {node.name} writes into a tensor that forward makes anew in every call"
            )


def erase_dead(graph: fx.Graph, root: nn.Module) -> None:
    """Erase every node without users that does not write to a tensor; `root` holds the modules that it calls."""
    for node in reversed(graph.nodes):
        if not node.users and not is_impure(node, root):
            graph.erase_node(node)


def is_impure(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a node without users must stay: inputs, outputs, and everything that writes to a tensor."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__",)
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return bool(node.target._schema.is_mutable)
        name = getattr(node.target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        writes = (
            node.target is operator.setitem or name in _IN_PLACE_OPERATORS or "out" in node.kwargs
        )
        return (
            in_place
            or writes
            or bool(node.kwargs.get("inplace", False))
            or True in _inplace_args(node)
        )
    return False


_IN_PLACE_OPERATORS = frozenset(
    n for n in dir(operator) if n.startswith("i") and hasattr(operator, f"__{n}__")
)


def _inplace_args(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of functional activations, where `inplace` may be given by position."""
    owner = getattr(node.target, "__module__", None)
    return (
        tuple(a for a in node.args if isinstance(a, bool)) if owner == "torch.nn.functional" else ()
    )


class ShapesOnly(TorchFunctionMode):
    """Answers the shape of common operations at once; their meta kernels cost more than all others together."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return a tensor of the right shape where a rule knows it, and the operation's own result elsewhere."""
        rule = _SHAPE_RULES.get(func)
        known = rule(*args) if rule is not None and len(args) > 0 else None
        return func(*args, **(kwargs or {})) if known is None else known


def _same(x: Tensor, *_: Any) -> Tensor:
    return x


def _same_normalised(x: Tensor, mean: Tensor | None = None, *_: Any) -> Tensor | None:
    return x if x.dim() > 1 and mean is not None and mean.shape[0] == x.shape[1] else None


def _elementwise(x: Any, y: Any = None, *_: Any) -> Tensor | None:
    if not isinstance(x, Tensor):
        return None
    if isinstance(y, Tensor):
        return x if x.shape == y.shape and x.dtype == y.dtype else None
    return x if isinstance(y, (int, float)) and x.is_floating_point() else None


def _linear(x: Tensor, weight: Tensor | None = None, *_: Any) -> Tensor | None:
    if weight is None or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_SHAPE_RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: _same_normalised,
    **dict.fromkeys(
        (F.layer_norm, F.group_norm, F.gelu, F.silu, F.hardswish, F.dropout, F.softmax), _same
    ),
    **dict.fromkeys((torch.add, torch.mul, torch.sub, torch.div), _elementwise),
    **dict.fromkeys((Tensor.add, Tensor.mul, Tensor.sub, Tensor.div), _elementwise),
    **dict.fromkeys(
        (Tensor.__add__, Tensor.__mul__, Tensor.__sub__, Tensor.__truediv__), _elementwise
    ),
    F.linear: _linear,
}


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    leaves: list[Any] = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
