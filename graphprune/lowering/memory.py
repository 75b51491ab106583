"""Shared memory: which nodes of a graph hand on or write into the tensor of another.

ATen operators say it in their schemas. Of modules, functions and methods those are known that usually do; any other is
taken to make a tensor of its own, and the proof of a surgery finds out where that was wrong.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from graphprune.lowering.symbolic import is_impure

__all__ = ["Memory", "is_alias", "written_by"]

_HANDED_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
"""Modules that return what they are given, or a view of it, in evaluation mode."""
_VIEWS = frozenset(
    """view view_as reshape reshape_as flatten ravel unflatten squeeze unsqueeze permute transpose t swapaxes
    swapdims movedim moveaxis expand expand_as broadcast_to narrow select split split_with_sizes tensor_split chunk
    unbind getitem __getitem__ getattr contiguous to type type_as float half double bfloat16 detach as_strided real
    imag diagonal unfold view_as_real view_as_complex adjoint dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout positive""".split()
)
"""Functions and methods of the same kind."""


def is_alias(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether what a node returns may be, or share memory with, its first input."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if is_impure(node, root):
        return True
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _HANDED_ON)
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema  # one that may return its input as it is says nothing of it
        is_view = any(value.alias_info is not None for value in schema.returns)
        return is_view or schema.name.removeprefix("aten::") in _VIEWS
    return getattr(node.target, "__name__", str(node.target)) in _VIEWS


def written_by(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the node into whose tensor another one writes; None where it writes into none."""
    if node.op in ("placeholder", "output") or not is_impure(node, root):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    return next(iter(node.all_input_nodes), None)


class Memory:
    """The nodes of a graph by the memory that they may share, as the graph was when it was looked at."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        """Look at every node of `graph`; `root` holds the modules that it calls."""
        self.order = list(graph.nodes)
        self.position = {node: number for number, node in enumerate(self.order)}
        self.written: dict[fx.Node, fx.Node] = {}
        """Node -> the node into whose tensor it writes."""
        self._shared: dict[fx.Node, set[fx.Node]] = {node: {node} for node in self.order}
        for node in self.order:
            if (written := written_by(node, root)) is not None:
                self.written[node] = written
                self.join(node, written)
            elif is_alias(node, root) and node.all_input_nodes:
                self.join(node, node.all_input_nodes[0])

    def join(self, one: fx.Node, other: fx.Node) -> None:
        """Take it that two nodes share memory."""
        both = self._shared[one] | self._shared[other]
        for node in both:
            self._shared[node] = both

    def sharing(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes that may share memory with one, itself included."""
        return self._shared[node]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return what writes into memory that is shared with a node, in graph order."""
        return [writer for writer, written in self.written.items() if written in self._shared[node]]

    def after(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes that come after one."""
        return set(self.order[self.position[node] + 1 :])

    def is_given(self, node: fx.Node) -> bool:
        """Tell whether a node may share memory with an input, a parameter or a buffer."""
        return any(other.op in ("placeholder", "get_attr") for other in self._shared[node])

    def add(self, node: fx.Node, *, before: fx.Node) -> None:
        """Take a new tensor in that is made right before a node."""
        self.position[node] = self.position[before]
        self._shared[node] = {node}
