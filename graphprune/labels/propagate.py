"""Propagation: run the captured graph once, without data, and carry labels along.

The graph runs on meta tensors under a dispatch mode. In inference mode operators reach the mode whole (``aten.linear``,
``aten.scaled_dot_product_attention``) whatever the device and version, so one table of rules,
`graphprune.labels.rules`, serves both dialects. A rule computes the output's shape and its labels; an operator
without a rule is decomposed where PyTorch can, and otherwise pins whatever reaches it.

    graph node --> aten operator --> rule(trace, call) --> output (meta tensor) + fields
                                       |
                                       +--> AtomTable: unify, pin, block, nest
                                       +--> Consumer: where a channel is summed over (for the proof)
                                       +--> MacTerm: what the node costs, as a product of atom counts (for the budget)

Integer and boolean tensors keep their values (an index table must be known); floating ones have shapes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from graphprune.errors import AnalysisError, GraphpruneError
from graphprune.labels.field import Field
from graphprune.labels.strides import scattered_nodes
from graphprune.labels.trace import NO_RULE, Call, Labels, ModuleCall, Source, TensorInfo, Trace
from graphprune.program import Program

__all__ = ["BATCH", "info_of", "propagate", "settled", "without_view_tracking"]

BATCH = 2
"""Batch size of the labelled run: sizes of one are never labelled, and would hide what meets what."""


class _LabelMode(TorchDispatchMode):
    """Sends every operator to its rule."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from graphprune.labels.rules import find_rule

        trace = self.trace
        rule = find_rule(func)
        kwargs = kwargs or {}
        if rule is None:
            result = self._decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        call = Call(func, args, kwargs)
        call.occurrence = trace.seen[call.name]
        trace.seen[call.name] += 1
        if rule is not None:
            return rule(trace, call)
        return _without_rule(trace, call)

    def _decomposed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator as the parts that PyTorch makes of it; NotImplemented where it has none."""
        try:
            with self:
                return func.decompose(*args, **kwargs)
        except RuntimeError:
            # The parts may ask for values, or for tensors on one device; shapes are all that there is.
            if all(t.is_meta == self.trace.is_meta(t) for t in args if isinstance(t, Tensor)):
                raise
            return NotImplemented


def _without_rule(trace: Trace, call: Call) -> Any:
    """Pin everything that reaches an operator that no rule knows."""
    name = str(call.func)
    labelled = [t for t in call.tensors() if trace.fields(t)]
    if labelled:
        trace.unknown.setdefault(name, []).append(trace.node)
    for tensor in labelled:
        trace.freeze(tensor, NO_RULE.format(name))
    try:
        return trace.run(call)
    except (NotImplementedError, RuntimeError) as error:
        raise AnalysisError(
            f"operator {name} at node {trace.node} has neither a labelling rule nor a shape function, so what comes "
            f"after it cannot be analysed ({str(error).splitlines()[0]}). Register a rule for it with "
            "graphprune.labels.rules.rule."
        ) from error


def info_of(trace: Trace, value: Any) -> Any:
    """Describe a node's output; a source is described when the run is over, so that asking labels nothing."""
    if isinstance(value, Tensor):
        return trace.source(value) or TensorInfo(
            tuple(value.shape), trace.fields(value), value.dtype
        )
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return tuple(info_of(trace, v) for v in value)
    if isinstance(value, dict):
        return {k: info_of(trace, v) for k, v in value.items()}
    return value


def settled(value: Any) -> Any:
    """Replace sources by their labels, as they are at the end of the run."""
    if isinstance(value, Source):
        return TensorInfo(
            value.shape, tuple(Field((d,), a) for d, a in sorted(value.atoms.items()))
        )
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(map(settled, value))
    if isinstance(value, dict):
        return {k: settled(v) for k, v in value.items()}
    return value


def without_view_tracking() -> Any:
    """Keep autograd from giving views of parameters, which are no inference tensors, identities of their own."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def propagate(program: Program, *, batch: int | None = None) -> Labels:
    """Run `program` on labels, or return those of an earlier run where its graph is still the same.

    Args:
        program: What `capture` returned; not changed.
        batch: Size of dim 0 of the inputs, where the program takes any; 2, or that of the earlier run, unless given.

    Returns:
        The labels of every node's output and the facts about atoms.

    Raises:
        AnalysisError: The graph does not run on the shapes of its example inputs.
    """
    fingerprint = program.fingerprint()
    if batch is None and _MEMO in program.memo:
        known, labels = program.memo[_MEMO]
        if known == fingerprint:
            return labels  # type: ignore[no-any-return]
    labels = _propagate(program, batch or BATCH)
    program.memo[_MEMO] = fingerprint, labels
    return labels


_MEMO = "labels"


def _propagate(program: Program, batch: int) -> Labels:
    trace = Trace(program)
    inputs: list[Tensor] = []
    for example in program.example_inputs:
        shape = list(example.shape)
        if program.dynamic_batch and shape:
            shape[0] = batch
        inputs.append(
            torch.empty(shape, dtype=example.dtype, device="meta")
            if example.is_floating_point()
            else program.batch(batch)[len(inputs)]
        )
    samples = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
    if program.calling is not None and program.calling.as_list:
        samples = len(inputs)
    trace.scale = 1.0 / max(1, samples)
    values: dict[str, Any] = {}
    calls: tuple[ModuleCall, ...] = ()
    if program.dialect == "module":
        from graphprune.labels.whole import run_whole

        calls = run_whole(program, trace, values)
    else:
        scattered = scattered_nodes(program)
        with torch.inference_mode(), without_view_tracking(), _LabelMode(trace):
            _run_graph(program.module, inputs, trace, values, scattered)
    return Labels(
        table=trace.table,
        sources=trace.sources(),
        values={name: settled(value) for name, value in values.items()},
        consumers=tuple(trace.consumers),
        terms=tuple(trace.terms),
        unknown={name: tuple(dict.fromkeys(nodes)) for name, nodes in trace.unknown.items()},
        means=frozenset(trace.means),
        batch=batch,
        calls=calls,
    )


_SCATTERED = "read by strides through a part or a transposition of it"


def _run_graph(
    module: fx.GraphModule,
    inputs: list[Tensor],
    trace: Trace,
    values: dict[str, Any],
    scattered: frozenset[str],
) -> None:
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    modules = dict(module.named_modules())
    for node in module.graph.nodes:
        trace.node, trace.target = node.name, node.target
        trace.seen.clear()
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        try:
            result = _run_node(module, modules, node, args, kwargs, feed)
        except GraphpruneError:
            raise
        except Exception as error:
            result = _on_shapes(module, modules, node, (args, kwargs), trace, error)
        if node.op == "output" or node.name in scattered:
            why = "graph output" if node.op == "output" else _SCATTERED
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    trace.freeze(tensor, why)
        env[node] = result
        trace._alive.append(result)
        values[node.name] = info_of(trace, result)


def _on_shapes(
    module: fx.GraphModule,
    modules: Mapping[str, torch.nn.Module],
    node: fx.Node,
    given: Any,
    trace: Trace,
    error: Exception,
) -> Any:
    """Run a node that failed on labels on shapes alone, and pin everything that reaches it.

    Some functions look at their tensors before any operator is called, and refuse weights beside shapes.
    """
    name = str(getattr(node.target, "__name__", node.target))
    try:
        with _disable_current_modes():
            args, kwargs = trace.shapes(given)
            result = _run_node(module, modules, node, args, kwargs, iter(()))
    except (
        Exception
    ):  # any function of a model may fail in any way; what it said first is what is told
        raise AnalysisError(
            f"node {node.name} ({node.op} {node.target}) failed on labels: {error}\n{_window(node)}"
        ) from error
    labelled = [t for t in tree_leaves(given) if isinstance(t, Tensor) and trace.fields(t)]
    for tensor in labelled:
        trace.freeze(tensor, f"{name} fails on labels ({type(error).__name__})")
    if labelled:
        trace.unknown.setdefault(name, []).append(node.name)
    return result


def _run_node(
    module: fx.GraphModule,
    modules: Mapping[str, torch.nn.Module],
    node: fx.Node,
    args: Any,
    kwargs: Any,
    feed: Iterator[Tensor],
) -> Any:
    if node.op == "call_module":
        return modules[str(node.target)](*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    if node.op == "placeholder":
        return next(feed, node.args[0] if node.args else None)
    return args[0]


def _window(node: fx.Node, reach: int = 3) -> str:
    """Return the graph around `node`, for error messages."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    lines = (
        f"{'->' if n is node else '  '} {n.format_node() or n.name}"
        for n in nodes[max(0, at - reach) : at + reach + 1]
    )
    return "\n".join(lines)
