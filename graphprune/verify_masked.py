"""Masked runs: a program with removed channels zero at their consumers, and its statistics over the kept ones alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from graphprune.cost import Keep
from graphprune.groups import DependencyGroups
from graphprune.labels.rules import find_rule
from graphprune.labels.trace import Consumer
from graphprune.verify_statistics import STATISTICS

__all__ = ["MaskMode", "Masked", "Promote", "run_under"]


@dataclass(frozen=True)
class Masked:
    """Reference of a channel removal: the program that came in, with removed channels zero at their consumers."""

    groups: DependencyGroups
    keep: Keep

    @property
    def atoms(self) -> NDArray[np.bool_]:
        """Which atoms stay."""
        return self.keep[self.groups.channel_of]


def run_under(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], mode: Promote
) -> Iterator[tuple[fx.Node, Any]]:
    """Run a graph under `mode`, yielding every node with its value; values are dropped after their last use."""
    interpreter = fx.Interpreter(module)
    feed = iter(inputs)
    env: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        mode.enter(node.name)
        with mode:
            if node.op == "placeholder":
                env[node] = next(feed, node.args[0] if node.args else None)
            else:
                env[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        # In-place operators write into their input, so both programs are compared right after each node.
        yield node, env[node]
        for used in interpreter.user_to_last_uses.get(node, ()):
            env.pop(used, None)


_UNDEFINED = frozenset(
    """empty empty_like empty_strided empty_permuted new_empty new_empty_strided rand rand_like randn randn_like
    bernoulli normal_ uniform_ bernoulli_""".split()
)
"""Operators whose values are those of no channel, and other ones at every run."""


def _defined(func: Any, result: Any) -> Any:
    """Return what an operator returned, filled with one number where its values mean nothing."""
    name = func._schema.name.removeprefix("aten::")
    if name in _UNDEFINED and isinstance(result, Tensor):
        result.fill_(0.5 if result.is_floating_point() else 0)
    return result


def _in_any_precision(func: Any) -> Any:
    """Return an operator, or one that does the same where its kernel lacks float64."""
    return _grouped_mm if func._schema.name == "aten::_grouped_mm" else func


def _grouped_mm(
    x: Tensor, weights: Tensor, ends: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    ends = named.pop("offs", ends)
    if x.dtype != torch.float64 or ends is None or (x.dim(), weights.dim()) != (2, 3):
        return torch._grouped_mm(x, weights, ends, *rest, **named)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    rows = x[: sum(sizes)].split(sizes)
    found = torch.cat([one @ matrix for one, matrix in zip(rows, weights, strict=True)])
    return F.pad(found, (0, 0, 0, len(x) - len(found)))


class Promote(TorchDispatchMode):
    """Keeps the whole computation at one precision: casts to a lower one become casts to this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = self.promoted(args, kwargs or {})
        return _defined(func, _in_any_precision(func)(*args, **kwargs))

    def enter(self, node: str) -> None:
        """Start a node."""

    def taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator without a rule as the parts that PyTorch makes of it; NotImplemented for any other."""
        if find_rule(func) is not None:
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def promoted(self, args: Any, kwargs: Any) -> Any:
        """Replace lower floating types among the arguments."""
        low = (torch.float16, torch.bfloat16, torch.float32)
        return tree_map(
            lambda v: self.dtype if isinstance(v, torch.dtype) and v in low else v, (args, kwargs)
        )


class MaskMode(Promote):
    """Runs the original program with removed channels zero at their consumers.

    Operators are told apart as `graphprune.labels.propagate` does: by node, name, and occurrence.
    """

    def __init__(self, dtype: torch.dtype, reference: Masked) -> None:
        super().__init__(dtype)
        self.atoms = reference.atoms
        self.node = ""
        self.seen: Counter[str] = Counter()
        self.means = reference.groups.labels.means
        self.consumers: dict[tuple[str, str, int], list[Consumer]] = {}
        for one in reference.groups.labels.consumers:
            if not self.atoms[one.field.atoms].all():
                self.consumers.setdefault((one.node, one.operator, one.occurrence), []).append(one)

    def enter(self, node: str) -> None:
        """Start to count the operators of a node."""
        self.node = node
        self.seen.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = self.promoted(args, kwargs or {})
        if (result := self.taken_apart(func, args, kwargs)) is not NotImplemented:
            return result
        name = func._schema.name
        consumers = self.consumers_of(name)
        if not consumers:
            return _defined(func, _in_any_precision(func)(*args, **kwargs))
        if name in STATISTICS and not (name == "aten::mean" and self.node in self.means):
            return STATISTICS[name](args, kwargs, self._mask(consumers, args[0]))
        slots = iter(range(1 << 30))

        def masked(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            slot = next(slots)
            here = [c for c in consumers if c.slot == slot]
            return torch.where(self._mask(here, value), value, 0) if here else value

        args, kwargs = tree_map(masked, (args, kwargs))
        return func(*args, **kwargs)

    def consumers_of(self, name: str) -> list[Consumer] | None:
        """Count an operator; return where the removed channels are among its arguments."""
        occurrence = self.seen[name]
        self.seen[name] += 1
        return self.consumers.get((self.node, name, occurrence))

    def _mask(self, consumers: Sequence[Consumer], value: Tensor) -> Tensor:
        """Return what stays of `value`, which several labels may say."""
        masks = [torch.from_numpy(self.atoms[c.field.over(value.dim())]) for c in consumers]
        return functools.reduce(torch.logical_and, masks)
