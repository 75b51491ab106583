"""The walk over an ONNX graph: every value becomes a graph node, a known tensor, or sizes.

    fx.Node       what the program computes; meta tensors of two batch sizes are carried along
    Tensor        known: an integer initializer, a constant, or what follows from these
    np.ndarray    of objects: integers that follow the batch, each an int or an int-valued fx.Node (a "vector of sizes")

Operators are functions (`graphprune.onnx_import.operators`) that read their inputs from a `Call` and make nodes with
`Builder.call`, which computes at once what is known.
"""

from __future__ import annotations

import operator as python_operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from graphprune.errors import CaptureError, LoadError
from graphprune.lowering.copies import meta_copy
from graphprune.lowering.sized import may_vary, resize
from graphprune.lowering.symbolic import ShapesOnly, erase_dead
from graphprune.onnx_import.file import OnnxModel, to_tensor

__all__ = ["Builder", "Call", "Value", "build_graph", "rows_of_inputs"]

Value = Any
"""An fx.Node, a Tensor, or an object array of sizes."""
_BATCHES = (2, 3)


def build_graph(model: OnnxModel, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return the graph of a file.

    Args:
        model: The file.
        inputs: One tensor per input of the file; dim 0 stays free where the file leaves it free.

    Raises:
        LoadError: The file uses an operator, or a form of one, that cannot be imported.
    """
    is_free = all(spec.is_batched for spec in model.inputs) and may_vary(tuple(inputs))
    builder = Builder(model.weights, model.opset, str(model.path))
    for spec, tensor in zip(model.inputs, inputs, strict=True):
        builder.input(spec.name, tensor, is_free=is_free)
    builder.walk(model.graph.node)
    results = [builder.as_node(builder.values[name]) for name in model.outputs]
    if len(results) == 1:
        builder.graph.output(results[0])
    else:
        builder.graph.output(dict(zip(map(str, model.outputs), results, strict=True)))
    module = fx.GraphModule(builder.root, builder.graph, class_name="OnnxModel").eval()
    erase_dead(module.graph, module)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


class Call:
    """One ONNX node, with its inputs."""

    def __init__(self, builder: Builder, node: onnx.NodeProto) -> None:
        self.builder = builder
        self.node = node
        self.opset = builder.opset
        self.attributes: Mapping[str, Any] = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
        }

    def __len__(self) -> int:
        """Return the number of inputs, those left out included."""
        return len(self.node.input)

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as str, sequences as lists."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, position: int) -> bool:
        """Whether the input is given."""
        return position < len(self.node.input) and bool(self.node.input[position])

    def value(self, position: int) -> Value:
        """Return an input as it is known."""
        return self.builder.values[self.node.input[position]]

    def tensor(self, position: int, default: Any = None) -> Any:
        """Return an input to compute with: a node, or a known tensor; a weight becomes a node."""
        return self.builder.operand(self.value(position)) if self.has(position) else default

    def known(self, position: int) -> Tensor | None:
        """Return an input whose values are known, else None."""
        value = self.value(position) if self.has(position) else None
        return value if isinstance(value, Tensor) else self.builder.weight_of(value)

    def const(self, position: int, default: Any = None) -> Any:
        """Return an input whose values must be known, as nested lists or one number."""
        if not self.has(position):
            return default
        found = self.known(position)
        if found is None:
            raise self.refuse(
                f"input {position} is computed; it can only be imported as a constant"
            )
        return found.tolist()

    def sizes(self, position: int) -> list[Any] | None:
        """Return a vector of ints and int-valued nodes, or None where the input is left out."""
        if not self.has(position):
            return None
        value = self.value(position)
        if isinstance(value, np.ndarray):
            return list(value.ravel())
        found = self.known(position)
        if found is None:
            raise self.refuse(f"input {position} holds sizes that depend on values")
        return [int(v) for v in found.ravel().tolist()]

    def axes(self, position: int = 1, name: str = "axes") -> list[int] | None:
        """Return axes that are an attribute in old files and an input in new ones."""
        found = self.attr(name)
        if found is None and self.has(position):
            found = self.const(position)
        if isinstance(found, (int, float)):  # one axis, as a number
            found = [found]
        return None if found is None else [int(a) for a in found]

    def shape(self, position: int = 0) -> list[Any]:
        """Return the shape of an input: ints, and nodes where it follows the batch."""
        return self.builder.shape(self.value(position))

    def rank(self, position: int = 0) -> int:
        """Return the number of dimensions of an input."""
        return len(self.builder.meta(self.value(position))[0].shape)

    def refuse(self, why: str) -> LoadError:
        """Return an error that names the node."""
        name = self.node.name or ", ".join(self.node.output)
        return LoadError(
            f"{self.builder.source}: operator {self.node.op_type} (node {name}, opset {self.opset}): {why}"
        )


class Builder:
    """The graph so far."""

    def __init__(self, weights: Mapping[str, Tensor], opset: int, source: str) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.opset = opset
        self.source = source
        self.values: dict[str, Value] = {}
        self.batched: dict[fx.Node, tuple[Any, Any]] = {}
        """What each node computes for either batch size: meta tensors, or numbers."""
        self._weights: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._known: dict[fx.Node, Tensor] = {}
        self._taken: set[str] = set(dir(fx.GraphModule)) | {"graph", "code", "training"}
        for name, tensor in weights.items():
            self.values[name] = tensor
            self._weights[name] = tensor
        self._names = {id(t): n for n, t in self._weights.items()}

    # -- values ---------------------------------------------------------------------------------------------------

    def input(self, name: str, example: Tensor, *, is_free: bool) -> None:
        """Add an input of the program."""
        safe = re.sub(r"\W", "_", name)
        node = self.graph.placeholder(f"input_{safe}" if not safe[:1].isalpha() else safe)
        meta = torch.empty_like(example, device="meta")
        pair = tuple(resize(meta, b) for b in _BATCHES) if is_free else (meta, meta)
        self.batched[node] = (pair[0], pair[1])
        self.values[name] = node

    def operand(self, value: Value) -> Any:
        """Return what to compute with: known scalars as tensors, floating weights as nodes."""
        if isinstance(value, np.ndarray):
            return self._stacked(value)
        if isinstance(value, Tensor) and id(value) in self._names and value.is_floating_point():
            if value.numel() > 1:
                return self.as_node(value)
        return value

    def as_node(self, value: Value, *, is_buffer: bool = False) -> fx.Node:
        """Return the node of a value; a known tensor becomes a parameter or a buffer of the program."""
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, np.ndarray):
            stacked: fx.Node = self._stacked(value)
            return stacked
        if id(value) not in self._nodes:
            name = self._names.get(id(value))
            is_weight = name is not None and value.is_floating_point() and not is_buffer
            is_weight = is_weight and bool(value.isfinite().all())  # else it is a mask
            path = self._register(name or "constant", value, is_weight)
            node = self.graph.get_attr(path)
            self.batched[node] = (value.to("meta"), value.to("meta"))
            self._known[node] = value  # also keeps it alive, so that no other tensor gets its id
            self._nodes[id(value)] = node
        return self._nodes[id(value)]

    def weight_of(self, value: Value) -> Tensor | None:
        """Return the tensor of a node that reads a weight."""
        return self._known.get(value) if isinstance(value, fx.Node) else None

    def meta(self, value: Value) -> tuple[Any, Any]:
        """Return what a value is for either batch size."""
        if isinstance(value, fx.Node):
            return self.batched[value]
        if isinstance(value, np.ndarray):
            return (torch.empty(value.shape, dtype=torch.int64, device="meta"),) * 2
        return (value, value)

    def shape(self, value: Value) -> list[Any]:
        """Return sizes: ints, and nodes where they follow the batch."""
        first, second = self.meta(value)
        return [
            a if a == b else self.call("size", value, dim)
            for dim, (a, b) in enumerate(zip(first.shape, second.shape, strict=True))
        ]

    # -- making nodes ---------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """Call a function, or a method of the first argument: now where everything is known, else in the graph."""
        leaves: list[Any] = []
        map_aggregate((args, kwargs), leaves.append)
        if not any(isinstance(a, fx.Node) for a in leaves):
            run = getattr(args[0], target) if isinstance(target, str) else target
            return run(*args[1:] if isinstance(target, str) else args, **kwargs)

        def to_node(value: Any) -> Any:
            return self.as_node(value) if isinstance(value, (Tensor, np.ndarray)) else value

        args, kwargs = map_aggregate((args, kwargs), to_node)
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        pair = (self._run(node, 0), self._run(node, 1))
        self.batched[node] = pair
        if isinstance(pair[0], (bool, int, float)) and pair[0] == pair[1]:
            self.graph.erase_node(node)
            return pair[0]
        return node

    def call_module(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Call a module that has been added to the root."""
        args = map_aggregate(args, lambda a: self.as_node(a) if isinstance(a, Tensor) else a)
        node = self.graph.call_module(name, args)
        twin = meta_copy(module, {})
        first = twin(*fx.map_arg(args, lambda n: self.batched[n][0]))
        second = twin(*fx.map_arg(args, lambda n: self.batched[n][1]))
        self.batched[node] = (first, second)
        return node

    def items(self, node: Any, count: int) -> tuple[Any, ...]:
        """Return the parts of a node that computes several tensors."""
        if isinstance(node, fx.Node):
            return tuple(self.call(python_operator.getitem, node, i) for i in range(count))
        return tuple(node[:count])

    def both(self, size: Any) -> tuple[Any, Any]:
        """Return a size for either batch."""
        return self.batched[size] if isinstance(size, fx.Node) else (size, size)

    def _run(self, node: fx.Node, which: int) -> Any:
        args = fx.map_arg(node.args, lambda n: self.batched[n][which])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.batched[n][which])
        with ShapesOnly(), torch.device("meta"):  # what is made anew has a shape only, too
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _stacked(self, sizes: np.ndarray[Any, Any]) -> Any:
        """Return sizes that follow the batch as a tensor of the graph."""
        flat = [self.call(torch.full, (1,), size, dtype=torch.int64) for size in sizes.ravel()]
        joined = self.call(torch.cat, flat) if len(flat) > 1 else flat[0]
        return self.call(torch.reshape, joined, sizes.shape)

    def _register(self, name: str, tensor: Tensor, is_weight: bool) -> str:
        """Add a tensor to the modules under its own name, as far as attributes can be called so."""
        parts = [re.sub(r"\W", "_", part) for part in name.split(".") if part] or ["constant"]
        if not is_weight and name == "constant":
            parts = [f"constant_{len(self._nodes)}"]
        parts = [f"_{p}" if p in self._taken else p for p in parts]
        # torch's exporter numbers its own values so, and would give a name twice.
        parts = [re.sub(r"^val_(?=\d+$)", "value_", part) for part in parts]
        holder = self.root
        for position, part in enumerate(parts[:-1]):
            found = getattr(holder, part, None)
            if found is None:
                holder.add_module(part, nn.Module())
                found = getattr(holder, part)
            if not isinstance(
                found, nn.Module
            ):  # a tensor is called so: what is left becomes one name
                parts = [*parts[:position], "_".join(parts[position:])]
                break
            holder = found
        last = parts[-1]
        while hasattr(holder, last):
            last += "_"
        data = tensor.detach().clone()
        if is_weight:
            holder.register_parameter(last, nn.Parameter(data))
        else:
            holder.register_buffer(last, data)
        return ".".join([*parts[:-1], last])

    # -- the walk -------------------------------------------------------------------------------------------------

    def walk(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Import nodes in their order."""
        from graphprune.onnx_import.operators import find_operator

        for node in nodes:
            call = Call(self, node)
            convert = find_operator(node.op_type)
            if convert is None:
                raise call.refuse(
                    "there is no importer for this operator. Register one with graphprune.onnx_import.operator, "
                    "or compile the PyTorch model that the file was made from"
                )
            try:
                result = convert(self, call)
            except (LoadError, CaptureError):
                raise
            # Shapes that do not fit, arguments that torch refuses: the file's node is what the user needs to see.
            except Exception as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise call.refuse(f"{type(error).__name__}: {lines[0] if lines else ''}") from error
            results = result if isinstance(result, tuple) else (result,)
            for name, value in zip(node.output, results, strict=False):
                if name:
                    self.values[name] = self._settled(value)

    def _settled(self, value: Value) -> Value:
        """Return sizes as a known tensor where all of them are numbers."""
        if isinstance(value, np.ndarray):
            if all(isinstance(v, (bool, int, float)) for v in value.ravel()):
                return torch.tensor(value.tolist())
            return value
        if isinstance(value, (bool, int, float)):
            return torch.tensor(value)
        if isinstance(value, fx.Node) and isinstance(self.batched[value][0], (int, float)):
            return np.array(value, dtype=object)
        return value


def rows_of_inputs(module: fx.GraphModule) -> list[int]:
    """Return for every input of a graph how many rows the tables have that it picks from; 1 where it picks none."""
    rows = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            tables = [
                u.args[1] for u in node.users if u.target is F.embedding and u.args[0] is node
            ]
            sizes = [
                module.get_parameter(str(t.target)).shape[0] for t in tables if t.op == "get_attr"
            ]
            rows.append(min(sizes, default=1))
    return rows


def constant(attribute: onnx.AttributeProto) -> Tensor:
    """Return the tensor of a Constant node's attribute."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return to_tensor(value)
    kind = torch.float32 if attribute.name.startswith("value_float") else torch.int64
    return torch.tensor(value, dtype=kind)
