"""The symbolic tracer with known sizes, for models that compute with shapes or call functions wrapped from tracing.

Every value that the plain tracer leaves unknown is carried along twice, as meta tensors of two batch sizes. A size or
a number that is the same in both is a constant of the model, and Python code may branch on it; one that differs
depends on the batch and stays a node of the graph. Functions that `torch.fx.wrap` hides are traced through. Tensors
that depend on no input (attention masks, grids) are computed once and become constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Attribute, Proxy, TraceError

from graphprune.lowering.copies import meta_copy, meta_tensor
from graphprune.lowering.in_place import InPlaceProxy
from graphprune.lowering.symbolic import ShapesOnly, SymbolicTracer, run_tracer

__all__ = ["may_vary", "resize", "trace"]

_BATCHES = (5, 7)
_FACTORIES = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"})
_SCALARS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, type(None))


def trace(model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool) -> fx.GraphModule:
    """Trace `model`, which is in evaluation mode; sizes beyond the batch become literals of the graph.

    Args:
        model: A module that takes positional tensors.
        inputs: One tensor per input.
        dynamic: Whether dim 0 of every input stays free.

    Raises:
        TraceError: The model branches on a number that depends on the batch, or on the values of a tensor.
        Exception: Whatever the model's own code raises on symbolic values.
    """
    tracer = _SizedTracer(inputs, batches=_BATCHES if dynamic else None)
    with _unwrapped_functions(), torch.no_grad():
        return run_tracer(tracer, model)


def may_vary(inputs: tuple[Tensor, ...]) -> bool:
    """Say whether the inputs can share a free batch size: each has a dim 0, all of one size."""
    return all(t.dim() > 0 for t in inputs) and len({t.shape[0] for t in inputs}) == 1


def resize(tensor: Tensor, batch: int) -> Tensor:
    """Repeat the samples of `tensor` up to `batch` of them."""
    repeats = -(-batch // max(1, tensor.shape[0]))
    return tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:batch]


@contextmanager
def _unwrapped_functions() -> Iterator[None]:
    """Within the context, the tracer does not stop at Python functions that `torch.fx.wrap` was told of."""
    registry = _symbolic_trace._wrapped_fns_to_patch
    hidden = {
        key: scope for key, scope in registry.items() if hasattr(scope.get(key[1]), "__code__")
    }
    for key in hidden:
        del registry[key]
    try:
        yield
    finally:
        registry.update(hidden)


class _SizedProxy(InPlaceProxy):
    """A graph value whose shape, type and length are known where they do not depend on the batch."""

    tracer: _SizedTracer

    def __getattr__(self, k: str) -> Any:
        value = self.tracer.values[self.node][0]
        if isinstance(value, Tensor):
            if k == "device" or k.startswith("is_"):
                real = getattr(self.tracer.reference, k)
                if not callable(real):
                    return real
            elif not callable(getattr(value, k)):
                return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return Attribute(self, k)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        sizes = [len(value) for value in self.tracer.values[self.node]]
        if sizes[0] != sizes[1]:
            raise TraceError(f"len({self.node.name}) depends on the batch size")
        return sizes[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))  # type: ignore[index]

    def __bool__(self) -> bool:
        raise TraceError(
            f"the model branches on {self.node.name}, a value that it computes from its inputs"
        )


class _SizedTracer(SymbolicTracer):
    """Runs every node, as it is made, on meta tensors of two batch sizes."""

    def __init__(self, inputs: tuple[Tensor, ...], *, batches: tuple[int, int] | None) -> None:
        super().__init__(num_inputs=len(inputs))
        self.reference = inputs[0]
        self.pending = [_pair(tensor, batches) for tensor in inputs]
        self.values: dict[fx.Node, tuple[Any, Any]] = {}
        self.is_running = False
        self.metas: dict[int, Tensor] = {}
        self.modules: dict[int, nn.Module] = {}

    def proxy(self, node: fx.Node) -> Proxy:
        return _SizedProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return (
            attr_val if self.is_running else super().getattr(attr, attr_val, parameter_proxy_cache)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        return (
            forward(*args, **kwargs)
            if self.is_running
            else super().call_module(m, forward, args, kwargs)
        )

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> Any:
        if kind == "call_method" and target in _FACTORIES and not _has_proxy((args[1:], kwargs)):
            like = torch.empty(0, dtype=args[0].dtype, device=self.reference.device)
            return getattr(like, target)(*args[1:], **kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        return self._known(proxy, *self.values[proxy.node])

    def _known(self, proxy: Any, first: Any, second: Any) -> Any:
        """Return the Python value of a node where it is one at every batch size, else something made of proxies."""
        if isinstance(first, (tuple, list)) and len(first) == len(second):
            items = [
                self._item(proxy, i, a, b)
                for i, (a, b) in enumerate(zip(first, second, strict=True))
            ]
            return items if isinstance(first, list) else tuple(items)
        if isinstance(first, _SCALARS):
            if type(first) is type(second) and first == second:
                return first
            if isinstance(first, bool):
                raise TraceError(f"{proxy.node.name} is a condition that depends on the batch size")
        return proxy

    def _item(self, proxy: Any, index: int, first: Any, second: Any) -> Any:
        if isinstance(first, _SCALARS) and type(first) is type(second) and first == second:
            return first
        return self.create_proxy("call_function", operator.getitem, (proxy, index), {})

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        # The tracer's hooks on module calls and attributes must not record what is run here.
        was_running, self.is_running = self.is_running, True
        try:
            if kind == "placeholder":
                self.values[node] = self.pending.pop(0)
            elif kind == "get_attr":
                value = operator.attrgetter(target)(self.root)
                meta = meta_tensor(value, self.metas) if isinstance(value, Tensor) else value
                self.values[node] = (meta, meta)
            elif kind != "output":
                self.values[node] = (self._run(node, 0), self._run(node, 1))
        finally:
            self.is_running = was_running
        return node

    def _run(self, node: fx.Node, which: int) -> Any:
        args = fx.map_arg(node.args, lambda n: self.values[n][which])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.values[n][which])
        with ShapesOnly():
            if node.op == "call_module":
                return self._meta_module(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _meta_module(self, target: str) -> nn.Module:
        module = self.root.get_submodule(target)
        if id(module) not in self.modules:
            self.modules[id(module)] = meta_copy(module, self.metas)
        return self.modules[id(module)]


def _pair(tensor: Tensor, batches: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    meta = torch.empty_like(tensor, device="meta")
    return (meta, meta) if batches is None else (resize(meta, batches[0]), resize(meta, batches[1]))


def _has_proxy(value: Any) -> bool:
    found: list[Proxy] = []
    fx.node.map_aggregate(
        value, lambda leaf: found.append(leaf) if isinstance(leaf, Proxy) else None
    )
    return bool(found)
