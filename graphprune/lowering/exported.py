"""`torch.export`: an nn.Module or an ExportedProgram to a plain torch.fx GraphModule of ATen calls."""

from __future__ import annotations

import contextlib
import inspect
import io
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.lowering.attention import lowered_attention
from graphprune.lowering.symbolic import erase_dead

__all__ = ["export", "flatten_program", "has_dynamic_batch"]

_CHECKS = (
    "aten._assert_",
    "aten.sym_constrain",
    "aten._functional_assert",
    "aten._functional_sym_constrain",
    "aten._foobar",
    "profiler.",
)
_CONSTANT = "aten.lift_fresh_copy.default"
"""A constant that the code makes anew in every call."""
_PASS_THROUGH = {
    _CONSTANT,
    "aten.lift_fresh.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.detach_.default",
}
_KEPT_META = ("nn_module_stack",)


_OWN_WEIGHTS = r"The tensor attributes? self\.\S*(_flat_weights|weight)\b.* assigned during export"


def export(model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool) -> ExportedProgram:
    """Export `model`, which is in evaluation mode; `dynamic` makes dim 0 of every input symbolic.

    Args:
        model: Any module that takes positional tensors.
        inputs: With `dynamic`, at least two samples each, since a size of one is taken for a constant.
        dynamic: Whether the batch size stays free.

    Raises:
        Exception: Whatever `torch.export` raises for a module that it cannot trace.
    """
    shapes: Any = None
    if dynamic:
        batch = Dim("batch")
        shapes = tuple({0: batch} for _ in inputs)
        signature_is_variadic = _takes_varargs(model)
        if signature_is_variadic:
            shapes = (shapes,)
    # Where tracing fails, torch prints the graph so far on stderr; the error says enough.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with lowered_attention(), torch.no_grad(), quiet, warnings.catch_warnings():
        # Recurrent modules list their parameters anew, and hooks compute a weight out of others: no state is lost.
        warnings.filterwarnings("ignore", _OWN_WEIGHTS, UserWarning)
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def _takes_varargs(model: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return bool(kinds) and kinds[0] is inspect.Parameter.VAR_POSITIONAL


def has_dynamic_batch(program: ExportedProgram) -> bool:
    """Say whether dim 0 of every tensor input of `program` is symbolic."""
    names = set(program.graph_signature.user_inputs)
    values = [
        n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names
    ]
    tensors = [v for v in values if isinstance(v, Tensor)]
    return bool(tensors) and all(
        t.dim() > 0 and isinstance(t.shape[0], torch.SymInt) for t in tensors
    )


def flatten_program(
    program: ExportedProgram, *, class_name: str, prefix: str = ""
) -> fx.GraphModule:
    """Return `program` as a GraphModule with positional inputs, no guards, no assertions and the model's own names.

    Parameters and buffers are those of `program`, not copies.

    Args:
        program: What `torch.export` made.
        class_name: The name of the GraphModule's class.
        prefix: What to take off the front of parameter names, for a model that was wrapped to be exported.
    """
    if any(_is_vmap(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # as if each operator took the batch itself
    source = program.module(check_guards=False)
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    root: dict[str, Any] = {}
    out_spec = source.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    has_writes = any(map(_is_write, source.graph.nodes))
    for node in source.graph.nodes:
        if node.op == "output":
            flat = fx.map_arg(node.args[0], lambda n: values[n])
            graph.output(_plain(pytree.tree_unflatten(list(flat), out_spec)))
        elif _is_check(node):
            continue
        elif str(node.target) == _CONSTANT and has_writes:
            constant = values[node.args[0]]
            values[node] = graph.call_function(torch.ops.aten.clone.default, (constant,))
        elif str(node.target) in _PASS_THROUGH:
            values[node] = values[node.args[0]]
        else:
            copied = graph.node_copy(node, lambda n: values[n])
            copied.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
            values[node] = copied
            if node.op in ("get_attr", "call_module"):
                copied.target = str(node.target).removeprefix(prefix)
                root[copied.target] = _attribute(source, str(node.target))
    erase_dead(graph, source)
    used = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
    module = fx.GraphModule(
        {k: v for k, v in root.items() if k in used}, graph, class_name=class_name
    )
    module.eval()
    return module


def _attribute(root: nn.Module, target: str) -> Any:
    return operator.attrgetter(target)(root)


def _is_vmap(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _is_check(node: fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target).endswith("_guards_fn")
    if node.op != "call_function":
        return False
    return str(node.target).startswith(_CHECKS) or node.target in (torch._check, torch._assert)


def _is_write(node: fx.Node) -> bool:
    """Say whether a node changes a tensor that it is given."""
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    return is_operator and node.target._schema.is_mutable and str(node.target) not in _PASS_THROUGH  # type: ignore[union-attr]


def _plain(value: Any) -> Any:
    """Return a nested output whose mappings are dicts, which is what a graph can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_plain(v) for v in value)
            if type(value) in (list, tuple)
            else tuple(map(_plain, value))
        )
    return value
