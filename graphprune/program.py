"""Program: the unit that every pass takes and returns.

A Program is a torch.fx GraphModule with the example inputs that it was captured with, where it came from, and which
surgeries it has been through. It is frozen: a pass that changes something returns a new Program.

Two dialects share everything downstream. ``fx`` comes from ``torch.fx.symbolic_trace``: it calls modules and torch
functions, and computes sizes while it runs. ``export`` comes from ``torch.export``: it calls ATen operators only, and
holds sizes as literals.

A model that no tracer captures whole is a program all the same, of the dialect ``module``: a graph of one node that
calls the model itself (`WholeModel`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from graphprune.calling import Calling

__all__ = ["Dialect", "Origin", "Program", "Slices", "WholeModel", "compose"]

Dialect = Literal["fx", "export", "module"]

Slices = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Parameter or buffer -> dimension -> kept indices, ascending, for everything that is cut."""


class WholeModel(fx.GraphModule):
    """A graph of one node that calls a model whole; tensors are named as in the model."""

    CHILD: ClassVar[str] = "model"
    """The attribute that holds the model."""

    @classmethod
    def of(cls, model: nn.Module, num_inputs: int) -> WholeModel:
        """Return the graph ``output = model(input_0, input_1, ...)``."""
        graph = fx.Graph()
        inputs = [graph.placeholder(f"input_{i}") for i in range(num_inputs)]
        graph.output(graph.call_module(cls.CHILD, tuple(inputs)))
        root = nn.Module()
        root.add_module(cls.CHILD, model)
        return cls(root, graph, class_name=type(model).__name__).eval()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters under the names that they have in the model."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.removeprefix(f"{self.CHILD}."), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield buffers under the names that they have in the model."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield name.removeprefix(f"{self.CHILD}."), buffer


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a program was before anything of it went, and what has gone since, however many surgeries that took."""

    params: int
    """Parameters that it had; targets are fractions of this, and of the MACs."""
    macs: int
    """Multiply-accumulates that it did for one sample."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of its parameters and buffers."""
    blocks: tuple[str, ...] = ()
    """Residual blocks that have gone since, in the order in which they went."""
    sums: tuple[str, ...] = ()
    """The node of each block's sum: unlike a block's name, a cut does not change it."""
    slices: Slices = field(default_factory=dict)
    """What is left of its tensors."""
    stranger: str = ""
    """A tensor of a size that `slices` do not explain: somebody else has cut it. Empty: none."""

    @classmethod
    def of(cls, program: Program, *, params: int, macs: int) -> Origin:
        """Return the origin of a program of which nothing has gone."""
        shapes = {name: tuple(tensor.shape) for name, tensor in program.named_tensors()}
        return cls(params=params, macs=macs, shapes=shapes)

    def checked(self, program: Program) -> Origin:
        """Return this with a note of the first tensor of `program` that has not the size that it should have."""
        for name, tensor in program.named_tensors():
            if not self.stranger and name in self.shapes:
                dims = self.slices.get(name, {})
                size = tuple(len(dims.get(d, range(n))) for d, n in enumerate(self.shapes[name]))
                if size != tuple(tensor.shape):
                    return dataclasses.replace(self, stranger=name)
        return self

    def cut(self, slices: Slices) -> Origin:
        """Return this after one more cut, in indices of what was left."""
        return dataclasses.replace(self, slices=compose(self.slices, slices))

    def without(self, blocks: Mapping[str, str], renamed: Mapping[str, str]) -> Origin:
        """Return this after residual blocks have gone.

        Args:
            blocks: Name -> the node of its sum.
            renamed: Tensors that are known by another name now: tied ones, whose first holder has gone.
        """
        return dataclasses.replace(
            self,
            blocks=(*self.blocks, *blocks),
            sums=(*self.sums, *blocks.values()),
            shapes={renamed.get(name, name): shape for name, shape in self.shapes.items()},
            slices={renamed.get(name, name): dims for name, dims in self.slices.items()},
        )


def compose(first: Slices, second: Slices) -> Slices:
    """Return the indices that two cuts leave, the second in what the first has left, in those of before both."""
    both = {name: dict(dims) for name, dims in first.items()}
    for name, dims in second.items():
        mine = both.setdefault(name, {})
        for dim, kept in dims.items():
            before = mine.get(dim)
            mine[dim] = (
                kept if before is None else tuple(before[i] for i in kept if i < len(before))
            )
    return both


@dataclass(frozen=True, kw_only=True)
class Program:
    """A captured model: graph, parameters, example inputs and origin."""

    module: fx.GraphModule
    """The graph and its parameters, in evaluation mode; parameter names are those of the model that went in."""
    example_inputs: tuple[Tensor, ...]
    """One tensor per graph input; dim 0 is the batch where `dynamic_batch` holds."""
    dialect: Dialect
    """Which tracer made the graph."""
    dynamic_batch: bool
    """Whether dim 0 of every input may take any size."""
    source: str
    """What the user called the model: a file, ``torchvision:NAME``, a class name."""
    calling: Calling | None = None
    """How the model that went in is called with the same inputs; None where just so."""
    untraced: tuple[str, ...] = ()
    """Why no tracer captured the model, where the dialect is ``module``."""
    fixed: frozenset[tuple[str, str, int]] = frozenset()
    """Operators of such a model, by module, name and occurrence, before which its own code holds sizes as numbers."""
    origin: Origin | None = None
    """What it was before anything of it went; None: nothing did."""
    history: tuple[str, ...] = ()
    """Text form of every surgery that has changed this program, oldest first."""
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was found out about this very graph and need not be found out again; a clone gets it, others do not."""

    def evolve(
        self, module: fx.GraphModule, *, step: str | None = None, origin: Origin | None = None
    ) -> Program:
        """Return this program with another module, and `step` added to its history."""
        history = self.history if step is None else (*self.history, step)
        return dataclasses.replace(
            self, module=module, history=history, origin=origin or self.origin
        )

    @property
    def fixed_batch(self) -> int | None:
        """The only number of samples that it takes; None where it takes any, or nobody knows: it runs whole."""
        is_known = not self.dynamic_batch and self.dialect != "module"
        return int(self.example_inputs[0].shape[0]) if is_known else None

    @property
    def lost_blocks(self) -> tuple[str, ...]:
        """Residual blocks that have gone, in the order in which they went."""
        return () if self.origin is None else self.origin.blocks

    def clone(self) -> Program:
        """Return a program that shares no parameter, buffer, module or graph node with this one."""
        clone = dataclasses.replace(self, module=copy.deepcopy(self.module))
        clone.memo.update(self.memo)
        return clone

    def fingerprint(self) -> tuple[Any, ...]:
        """Return what labels and costs depend on, to tell whether the graph has been changed: all but float values."""
        nodes = [
            (n.op, n.name, str(n.target), str(n.args), str(n.kwargs))
            for n in self.module.graph.nodes
        ]
        modules = [
            (name, type(m).__name__, m.extra_repr())
            for name, m in self.module.named_modules()
            if name
        ]
        tensors = [
            (name, t.shape, None if t.is_floating_point() or t.is_meta else t.tolist())
            for name, t in self.named_tensors()
        ]
        inputs = [(t.shape, t.dtype) for t in self.example_inputs]
        return nodes, modules, tensors, inputs, self.dynamic_batch

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and buffer once, tied ones under their first name."""
        yield from self.module.named_parameters()
        yield from self.module.named_buffers()

    def batch(
        self, size: int, *, seed: int = 0, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Return random inputs of the example's kind with `size` samples (the example's own size if it is fixed).

        Floating inputs are standard normal; integer and boolean inputs repeat the example's values.
        """
        generator = torch.Generator().manual_seed(seed)
        batch = []
        for example in self.example_inputs:
            shape = list(example.shape)
            if self.dynamic_batch and shape:
                shape[0] = size
            if example.is_floating_point():
                batch.append(torch.randn(shape, generator=generator, dtype=dtype or example.dtype))
            else:
                repeats = -(-shape[0] // max(1, example.shape[0])) if shape else 1
                repeated = example.repeat(repeats, *[1] * (example.dim() - 1)) if shape else example
                batch.append(repeated[: shape[0]].clone() if shape else repeated.clone())
        return tuple(batch)

    def map_floating(self, function: Callable[[Tensor], Tensor]) -> Program:
        """Return a clone whose floating parameters, buffers and example inputs went through `function`."""
        clone = self.clone()
        clone.module._apply(lambda t: function(t) if t.is_floating_point() else t)
        inputs = tuple(function(t) if t.is_floating_point() else t for t in self.example_inputs)
        return dataclasses.replace(clone, example_inputs=inputs)

    def __str__(self) -> str:
        """Print the program as stable text: one line per node, the same for the same graph on every machine."""
        inputs = ", ".join(_tensor_text(t) for t in self.example_inputs)
        batch = "dynamic" if self.dynamic_batch else "fixed"
        lines = [f"program {self.source} ({self.dialect}, {batch} batch) inputs [{inputs}]"]
        modules = dict(self.module.named_modules())
        lines += [f"  {_node_text(node, modules, self.module)}" for node in self.module.graph.nodes]
        lines += [f"  after {step}" for step in self.history]
        return "\n".join(lines)


def _tensor_text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"


def _node_text(node: fx.Node, modules: dict[str, nn.Module], root: nn.Module) -> str:
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "output":
        return f"return {_value_text(node.args[0])}"
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        kind = _tensor_text(value) if isinstance(value, Tensor) else type(value).__name__
        return f"%{node.name} = attribute {node.target} : {kind}"
    arguments = [_value_text(a) for a in node.args]
    arguments += [f"{k}={_value_text(v)}" for k, v in node.kwargs.items()]
    call = ", ".join(arguments)
    if node.op == "call_module":
        module = modules[str(node.target)]
        return f"%{node.name} = {node.target}({call}) : {str(module).splitlines()[0]}"
    if node.op == "call_method":
        return f"%{node.name} = .{node.target}({call})"
    return f"%{node.name} = {_target_text(node.target)}({call})"


def _target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None) or ""
    module = {"_operator": "operator", "torch._VariableFunctionsClass": "torch"}.get(module, module)
    name = getattr(target, "__name__", repr(target))
    return f"{module}.{name}" if module else name


def _value_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_value_text, value))
        return (
            f"[{inner}]"
            if isinstance(value, list)
            else f"({inner}{',' if len(value) == 1 else ''})"
        )
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"{_value_text(value.start)}:{_value_text(value.stop)}:{_value_text(value.step)}"
    return repr(value)
