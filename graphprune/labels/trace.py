"""Trace: the state of one labelled run, the verbs that rules use, and what the run notes down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from graphprune.labels.atoms import Atoms, AtomTable
from graphprune.labels.field import Field, Fields, fix, settle
from graphprune.program import Program

__all__ = [
    "NO_RULE",
    "Call",
    "Consumer",
    "Labels",
    "MacTerm",
    "ModuleCall",
    "Rule",
    "Source",
    "TensorInfo",
    "Trace",
    "tensor_infos",
]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and labels of a tensor that a graph node produced."""

    shape: tuple[int, ...]
    fields: Fields
    dtype: torch.dtype | None = None
    """None for a parameter or buffer."""

    def field_of(self, dim: int) -> Field | None:
        """Return the field that labels `dim`, if any."""
        return next((f for f in self.fields if dim in f.dims), None)


def tensor_infos(value: object) -> list[TensorInfo]:
    """Return what is known of every tensor in what one node, or several, produced."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, TensorInfo)]


NO_RULE = "operator {} has no labelling rule"
"""Why an operator that no rule knows pins what reaches it."""


@dataclass(frozen=True)
class Consumer:
    """A channel dimension of an operator's input that the operator sums or takes statistics over."""

    node: str
    operator: str
    """Name of the operator, as in ``aten::linear``."""
    occurrence: int
    """Which of the operators of this name under this node: 0 for the first."""
    slot: int
    """Position among the operator's tensor arguments."""
    field: Field


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, in a model that runs whole."""

    path: str
    """Where the module stands in the model."""
    key: str
    """The path, with the number of the call from the second one on: ``head.conv@2``."""
    before: TensorInfo | None
    """Its first input, if that is a tensor."""
    after: Any
    """What it returned, as in `Labels.values`."""


@dataclass(frozen=True)
class MacTerm:
    """Multiply-accumulates of one contraction for one sample: `constant` times the number of kept atoms per factor."""

    node: str
    constant: float
    factors: tuple[Atoms, ...]


@dataclass
class Source:
    """A tensor that brings its own atoms, along each dimension on demand: a parameter, a buffer, a constant fill."""

    name: str
    shape: tuple[int, ...]
    table: AtomTable
    atoms: dict[int, Atoms] = field(default_factory=dict)
    held: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Dimensions that keep their size, those included that nothing has asked for yet: why, and at which node."""
    counts: Atoms | None = None
    """For whole numbers that count along a dimension of another tensor: the atoms of that dimension."""

    def axis(self, dim: int) -> Atoms | None:
        """Return the atoms along `dim`, which exist from the first call on; None for a size of one."""
        if self.shape[dim] <= 1:  # nothing was found: a model that runs whole makes empty tensors
            return None
        if dim not in self.atoms:
            self.atoms[dim] = self.table.axis(self.shape[dim], id(self))
            if dim in self.held:
                self.table.pin(self.atoms[dim], *self.held[dim])
        return self.atoms[dim]

    def fields(self) -> Fields:
        """Return one field per dimension."""
        axes = ((dim, self.axis(dim)) for dim in range(len(self.shape)))
        return tuple(Field((dim,), atoms) for dim, atoms in axes if atoms is not None)

    def hold(self, dims: Iterable[int], why: str, node: str) -> None:
        """Pin dimensions, those included that nothing has asked for yet."""
        for dim in dims:
            if dim in self.atoms:
                self.table.pin(self.atoms[dim], why, node)
            self.held[dim] = (why, node)
        if self.counts is not None:
            self.table.pin(self.counts, why, node)

    def count_along(self, atoms: Atoms) -> bool:
        """Note that the values are numbers of `atoms`, and change with them; False where they cannot."""
        if self.held or (self.counts is not None and len(self.counts) != len(atoms)):
            return False
        if self.counts is not None:
            self.table.unify(self.counts, atoms)
        self.counts = atoms
        return True

    def renumbered(self, values: Tensor, keep: NDArray[np.bool_]) -> Tensor:
        """Return values of this tensor as they are when only the atoms in `keep` are left."""
        if self.counts is None:
            return values
        places = torch.from_numpy(np.cumsum(keep[self.counts]) - 1).to(values.device)
        return places[values.long() % len(places)].to(values.dtype)


@dataclass(frozen=True)
class Labels:
    """What propagation found: the facts about atoms, and where they live."""

    table: AtomTable
    sources: Mapping[str, Source]
    """Parameters and buffers that carry labels, by the name that they have in the program."""
    values: Mapping[str, Any]
    """What each node produced: `TensorInfo` for a tensor, the value itself for a number, nested as the node's
    output is."""
    consumers: tuple[Consumer, ...]
    terms: tuple[MacTerm, ...]
    unknown: Mapping[str, tuple[str, ...]]
    """Operators without a rule that pinned something -> the nodes where they stand."""
    batch: int
    """Size of dim 0 of the inputs in the labelled run, where the program takes any."""
    means: frozenset[str] = frozenset()
    """Nodes that take a mean over channels whose divisor keeps its old value."""
    calls: tuple[ModuleCall, ...] = ()
    """Calls of modules, inner ones first, where the model runs whole."""


@dataclass
class Call:
    """One dispatched operator."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    occurrence: int = 0
    """Which of the operators of this name under the current node."""

    @property
    def name(self) -> str:
        """Return the operator's name, as in ``aten::linear``."""
        return str(self.func._schema.name)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """Return the tensor arguments in order."""
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found += [v for v in value if isinstance(v, Tensor)]
        return found


class Trace:
    """The state of one propagation, and the verbs that rules use."""

    def __init__(self, program: Program) -> None:
        self.table = AtomTable()
        self.node = "?"
        self.scale = 1.0
        self.consumers: list[Consumer] = []
        self.terms: list[MacTerm] = []
        self.unknown: dict[str, list[str]] = {}
        self.seen: Counter[str] = Counter()
        self.target: Any = None
        """What the current node calls."""
        self.means: set[str] = set()
        """Nodes that take a mean over channels whose divisor is a scale."""
        self.squares: set[int] = set()
        """Identities of tensors that hold squares: their mean is a norm's statistic."""
        self._fields: dict[int, Fields] = {}
        self._sources: dict[int, Source] = {}
        self._twins: dict[int, Tensor] = {}
        self._alive: list[Any] = []
        for name, tensor in program.named_tensors():
            self._sources[id(tensor)] = Source(name, tuple(tensor.shape), self.table)
        for name, tensor in _plain_attributes(program.module):
            self._sources.setdefault(id(tensor), Source(name, tuple(tensor.shape), self.table))

    def sources(self) -> dict[str, Source]:
        """Return the labelled tensors of the program by name, in the order of their first use."""
        labelled = (s for s in self._sources.values() if s.name and s.atoms)
        # Atoms are numbered as the graph asks for them.
        first_used = sorted(labelled, key=lambda s: min(int(a[0]) for a in s.atoms.values()))
        return {s.name: s for s in first_used}

    def source(self, tensor: Tensor) -> Source | None:
        """Return the source that `tensor` is, if it is one."""
        return self._sources.get(id(tensor))

    # -- reading ------------------------------------------------------------------------------------------------

    def fields(self, tensor: Tensor) -> Fields:
        """Return all label fields of `tensor`."""
        source = self._sources.get(id(tensor))
        return source.fields() if source else self._fields.get(id(tensor), ())

    def axis(self, tensor: Tensor, dim: int) -> Atoms | None:
        """Return the atoms along `dim`, if it is labelled; the label must not vary along another dimension too."""
        source = self._sources.get(id(tensor))
        if source:
            return source.axis(dim)
        for one in self._fields.get(id(tensor), ()):
            if one.dims == (dim,):
                return one.atoms
        return None

    def is_joint(self, tensor: Tensor) -> bool:
        """Whether a label of `tensor` varies along several dimensions at once."""
        return any(len(f.dims) > 1 for f in self._fields.get(id(tensor), ()))

    def operand(self, tensor: Tensor, rank: int) -> tuple[Fields, frozenset[int]]:
        """Return fields and extents of `tensor`, its last dimension aligned with the last of `rank` dimensions."""
        shift = rank - tensor.dim()
        fields = self.fields(tensor)
        if shift:
            fields = tuple(Field(tuple(d + shift for d in f.dims), f.atoms) for f in fields)
        return fields, frozenset(d + shift for d, n in enumerate(tensor.shape) if n > 1)

    # -- noting -------------------------------------------------------------------------------------------------

    def unify(self, a: Atoms, b: Atoms) -> None:
        """Note that two arrays of atoms are the same channels."""
        self.table.unify(a, b)

    def pin(self, atoms: Atoms, why: str) -> None:
        """Note that atoms may never be removed."""
        self.table.pin(atoms, why, self.node)

    def fix(self, field_: Field, dim: int, why: str) -> None:
        """Forbid removals that change the size along `dim`."""
        fix(self.table, field_, dim, why, self.node)

    def settle(self, field_: Field, dims: Iterable[int], why: str) -> Field | None:
        """Forbid removals that change the sizes along `dims`; return the label over the other dimensions."""
        return settle(self.table, field_, dims, why, self.node)

    def plain(self, tensor: Tensor, dims: Iterable[int], why: str) -> Tensor:
        """Return `tensor` as one that is labelled along each of `dims` on its own, and nowhere else.

        A parameter is so already, but for dimensions that other operators label; what the graph computes from
        parameters may not be.
        """
        wanted = set(dims)
        if source := self._sources.get(id(tensor)):
            source.hold((d for d in range(tensor.dim()) if d not in wanted), why, self.node)
            return tensor
        found: dict[int, Atoms] = {}
        for one in self._fields.get(id(tensor), ()):
            inside = [d for d in one.dims if d in wanted]
            lost = [d for d in one.dims if d not in inside[:1]]
            left = self.settle(one, lost, why) if lost else one
            if left is not None and left.dims[0] in found:
                self.unify(found[left.dims[0]], left.atoms)
            elif left is not None:
                found[left.dims[0]] = left.atoms
        return self.new(tensor.shape, tensor, tuple(Field((d,), a) for d, a in found.items()))

    def freeze(self, tensor: Tensor, why: str) -> None:
        """Pin everything that `tensor` carries."""
        if source := self._sources.get(id(tensor)):
            source.hold(range(len(source.shape)), why, self.node)
            return
        for one in self._fields.get(id(tensor), ()):
            self.pin(one.atoms, why)

    def consume(self, call: Call, tensor: Tensor, field_: Field) -> None:
        """Note that `call` sums over the channels of `field_`, a label of its argument `tensor`."""
        slot = next((i for i, t in enumerate(call.tensors()) if t is tensor), None)
        if slot is not None:
            self.consumers.append(Consumer(self.node, call.name, call.occurrence, slot, field_))

    def count(self, constant: float, *factors: Atoms | None) -> None:
        """Note multiply-accumulates of this node: `constant` (at the run's batch) times the atoms of each factor."""
        known = tuple(f for f in factors if f is not None)
        self.terms.append(MacTerm(self.node, constant * self.scale, known))

    def apply(self, func: torch._ops.OpOverload, *args: Any) -> Any:
        """Apply the rule of another operator, as a part of the one at work."""
        from graphprune.labels.rules import find_rule

        found = find_rule(func)
        assert found is not None, f"{func} has no rule"
        return found(self, Call(func, args, {}))

    # -- making -------------------------------------------------------------------------------------------------

    def new(self, shape: tuple[int, ...] | torch.Size, like: Tensor, fields: Fields = ()) -> Tensor:
        """Return an output of `shape` with `fields`."""
        return self.label(torch.empty(shape, dtype=like.dtype, device="meta"), fields)

    def label(self, tensor: Tensor, fields: Fields) -> Tensor:
        """Attach `fields` to `tensor`; a label over several dimensions becomes a constraint."""
        self._alive.append(tensor)
        self._sources.pop(id(tensor), None)
        self._fields[id(tensor)] = fields
        for one in fields:
            if len(one.dims) > 1:
                self.table.nest(one.atoms, self.node)
        return tensor

    def relabel(self, tensor: Tensor, fields: Fields) -> Tensor:
        """Give `tensor` the labels of what was written into it; a parameter keeps its own, which have met them."""
        source = self._sources.get(id(tensor))
        if source and source.name:
            return tensor
        return self.label(tensor, fields)

    def fill(self, tensor: Tensor) -> Tensor:
        """Make `tensor`, a constant fill, a source: its dimensions take the label of what they meet."""
        self._alive.append(tensor)
        self._sources[id(tensor)] = Source("", tuple(tensor.shape), self.table)
        return tensor

    def is_meta(self, tensor: Tensor) -> bool:
        """Whether `tensor` stands for floating data whose values are not known."""
        return tensor.is_meta or (id(tensor) in self._sources and tensor.is_floating_point())

    def run(self, call: Call) -> Any:
        """Run the operator itself: on values where all are known, else on shapes."""
        if any(self.is_meta(t) for t in call.tensors()):
            args, kwargs = self.shapes((call.args, call.kwargs))
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
            return call.func(*args, **kwargs)
        if str(call.kwargs.get("device")) == "meta":
            call.kwargs["device"] = torch.device("cpu")
        for tensor in call.tensors():
            if tensor.dim():
                self.freeze(tensor, "its values are computed with")
        return call.func(*call.args, **call.kwargs)

    def shapes(self, values: Any) -> Any:
        """Return nested `values` with a tensor that has a shape only in place of every tensor."""
        return tree_map(self._to_meta, values)

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        if id(value) not in self._twins:
            self._alive.append(value)
            self._twins[id(value)] = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device="meta"
            )
        return self._twins[id(value)]


def _plain_attributes(module: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that get_attr nodes read and that are neither parameters nor buffers."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                yield str(node.target), value


Rule = Callable[[Trace, Call], Any]
"""What a rule is: it gets the state of the run and the operator, and returns the output."""
