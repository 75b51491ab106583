"""Residual blocks: the branch of a sum that a shortcut goes around, and the program without it.

    x + f(x)  ->  x

A sum of two tensors of equal shape is a residual block where one of them, the shortcut, is something that the other,
the branch, was computed from. What nothing else needs of the branch goes with it. The proof runs the same program with
zeros in place of what the branch returns.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from graphprune.errors import PlanError
from graphprune.groups import DependencyGroups
from graphprune.labels.trace import TensorInfo
from graphprune.lowering.symbolic import is_impure
from graphprune.program import Origin, Program

__all__ = [
    "ResidualBlock",
    "bypass",
    "find_residual_blocks",
    "named_blocks",
    "sharing",
    "with_silent_blocks",
    "without_blocks",
]

_SUMS = frozenset(
    (
        operator.add,
        operator.iadd,
        torch.add,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add_.Tensor,
        "add",
        "add_",
    )
)
"""Functions, operators and methods that add two tensors."""


@dataclass(frozen=True)
class ResidualBlock:
    """A branch that its shortcut can stand in for."""

    name: str
    """What people call it: the module that holds all of it if that holds no other block, or the one that holds most."""
    module: str
    """The innermost module that holds all of it, and maybe others."""
    sum: str
    """The node that adds branch and shortcut."""
    shortcut: str
    """The node that stays."""
    branch: str
    """The node that goes."""
    nodes: frozenset[str]
    """All nodes that go with it, without the sum."""
    params: int
    """Parameters that go."""
    macs: int
    """Multiply-accumulates of one sample that go."""

    def __str__(self) -> str:
        """Return what people call it."""
        return self.name


def find_residual_blocks(program: Program, groups: DependencyGroups) -> tuple[ResidualBlock, ...]:
    """Return every residual block with a cost, in graph order; a block inside a branch is one of its own.

    Args:
        program: A program.
        groups: Its analysis, for shapes and costs.
    """
    graph = program.module.graph
    costs = {cost.node: cost for cost in groups.cost.per_node()}
    found: list[ResidualBlock] = []
    for node in graph.nodes:
        for branch, shortcut in _operands(node, groups):
            gone = _needed_by(branch, node, program.module)
            paid = [costs[n.name] for n in gone if n.name in costs]
            if not paid or not _comes_from(branch, _behind_identities(shortcut, program.module)):
                continue
            module = _common_module(_held(gone, program.module))
            found.append(
                ResidualBlock(
                    name=module,
                    module=module,
                    sum=node.name,
                    shortcut=shortcut.name,
                    branch=branch.name,
                    nodes=frozenset(n.name for n in gone),
                    params=sum(cost.params for cost in paid),
                    macs=sum(cost.macs for cost in paid),
                )
            )
            break
    for name in (_heaviest_module, _module_and_sum):
        found = [
            replace(b, name=name(b, program.module)) if _is_vague(b, found) else b for b in found
        ]
    return tuple(found)


def named_blocks(
    program: Program, groups: DependencyGroups, names: Iterable[str]
) -> tuple[ResidualBlock, ...]:
    """Return the residual blocks of these names, in graph order.

    Args:
        program: A program.
        groups: Its analysis.
        names: Of blocks, of sums, or of modules, which stand for all blocks that they hold.

    Raises:
        PlanError: The program has no such residual block.
    """
    blocks = find_residual_blocks(program, groups)
    chosen = set[ResidualBlock]()
    for name in map(str.strip, names):
        exact = {block for block in blocks if name in (block.name, block.sum)}
        meant = exact or {block for block in blocks if _is_inside(block.module, name)}
        if not meant:
            first = ", ".join(block.name for block in blocks[:8]) + (", ..." if blocks[8:] else "")
            raise PlanError(
                f"{program.source} has no residual block {name!r}; known: {first or 'none'}"
            )
        chosen |= meant
    return tuple(block for block in blocks if block in chosen)


def without_blocks(
    program: Program,
    groups: DependencyGroups,
    blocks: Sequence[ResidualBlock],
    *,
    step: str = "without residual blocks",
) -> Program:
    """Return a program whose sums are their shortcuts; it shares nothing with the one that came in.

    Args:
        program: A program.
        groups: Its analysis.
        blocks: What goes.
        step: What the new program's history says.
    """
    module = copy.deepcopy(program.module)
    before = _tensors_read(module.graph)
    bypass(module.graph, blocks)
    for name in before - _tensors_read(module.graph):
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
    module.delete_all_unused_submodules()
    module.recompile()
    origin = program.origin or Origin(params=groups.cost.params, macs=groups.cost.macs)
    names = (*origin.blocks, *(block.name for block in blocks))
    return program.evolve(module, step=step, origin=replace(origin, blocks=names))


def with_silent_blocks(program: Program, blocks: Sequence[ResidualBlock]) -> Program:
    """Return a program that adds zeros where it added these branches: what `without_blocks` has to equal."""

    def silence(graph: fx.Graph) -> None:
        nodes = {node.name: node for node in graph.nodes}
        for block in blocks:
            total, branch = nodes[block.sum], nodes[block.branch]
            with graph.inserting_before(total):
                zeros = graph.call_function(torch.zeros_like, (branch,))
            total.replace_input_with(branch, zeros)

    return program.evolve(sharing(program.module, silence))


def sharing(module: fx.GraphModule, change: Callable[[fx.Graph], object]) -> fx.GraphModule:
    """Return a module with a changed graph that holds the same submodules and tensors."""
    graph = copy.deepcopy(module.graph)
    change(graph)
    return fx.GraphModule(module, graph, class_name=type(module).__name__).eval()


def bypass(graph: fx.Graph, blocks: Sequence[ResidualBlock]) -> None:
    """Let every sum be its shortcut, and erase what nothing needs any more."""
    nodes = {node.name: node for node in graph.nodes}
    inside = {name for block in blocks for name in block.nodes}
    by_sum = {block.sum: block for block in blocks if block.sum not in inside}
    stands_for: dict[str, str] = {}
    for name in [name for name in nodes if name in by_sum]:
        shortcut = by_sum[name].shortcut
        # It may be the sum of a block that has just gone.
        stands_for[name] = stands_for.get(shortcut, shortcut)
        nodes[name].replace_all_uses_with(nodes[stands_for[name]])
        graph.erase_node(nodes[name])
    for node in reversed(graph.nodes):
        if node.name in inside:
            graph.erase_node(node)


def _operands(node: fx.Node, groups: DependencyGroups) -> list[tuple[fx.Node, fx.Node]]:
    """Return the two ways to call a sum's operands branch and shortcut; none where it is no sum of two tensors."""
    if node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
        return []
    one, other = node.args
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return []
    values: Mapping[str, object] = groups.labels.values
    infos = [values.get(n.name) for n in (node, one, other)]
    shapes = {info.shape for info in infos if isinstance(info, TensorInfo)}
    if len(shapes) != 1 or not all(isinstance(info, TensorInfo) for info in infos):
        return []
    return [(one, other), (other, one)]


def _needed_by(branch: fx.Node, total: fx.Node, root: nn.Module) -> set[fx.Node]:
    """Return the nodes that nothing needs but a sum, through this branch; none where they write into what stays."""
    gone: set[fx.Node] = set()
    if set(branch.users) != {total}:
        return gone
    gone.add(branch)
    for node in reversed(branch.graph.nodes):
        if node.op != "placeholder" and node.users and set(node.users) <= gone:
            gone.add(node)
    if any(is_impure(n, root) and not set(n.all_input_nodes[:1]) <= gone for n in gone):
        return set()
    return gone


def _comes_from(branch: fx.Node, shortcut: fx.Node) -> bool:
    """Tell whether a branch was computed from its shortcut."""
    seen, waiting = set[fx.Node](), [branch]
    while waiting:
        node = waiting.pop()
        if node is shortcut:
            return True
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _behind_identities(node: fx.Node, root: nn.Module) -> fx.Node:
    """Return what a node hands through: some models put an identity where another size has a projection."""
    while node.op == "call_module" and isinstance(
        root.get_submodule(str(node.target)), nn.Identity
    ):
        node = node.all_input_nodes[0]
    return node


def _held(nodes: Iterable[fx.Node], root: nn.Module) -> dict[str, int]:
    """Return the modules whose parameters some nodes use, with the number of these."""
    held: Counter[str] = Counter()
    for node in nodes:
        path = str(node.target)
        if node.op == "call_module":
            held[path] += sum(p.numel() for p in root.get_submodule(path).parameters())
        elif node.op == "get_attr":
            owner, _, name = path.rpartition(".")
            value = getattr(root.get_submodule(owner), name)
            held[owner] += value.numel() if isinstance(value, nn.Parameter) else 0
    return {path: count for path, count in held.items() if count}


def _common_module(paths: Iterable[str]) -> str:
    """Return the innermost module that all of these are, or are in."""
    split = [path.split(".") for path in paths]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join(parts[0] for parts in same)


def _heaviest_module(block: ResidualBlock, module: fx.GraphModule) -> str:
    """Return the innermost module with modules inside that holds most of a block's parameters."""
    held: Counter[str] = Counter()
    for path, count in _held(_nodes(module, block.nodes), module).items():
        parts = path.split(".")
        for length in range(1, len(parts)):
            held[".".join(parts[:length])] += count
    most = (path for path, count in held.items() if 2 * count > block.params)
    return max(most, key=len, default=block.module)


def _nodes(module: fx.GraphModule, names: Collection[str]) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.name in names]


def _module_and_sum(block: ResidualBlock, *_: object) -> str:
    return f"{block.module}:{block.sum}" if block.module else block.sum


def _is_vague(block: ResidualBlock, blocks: Iterable[ResidualBlock]) -> bool:
    """Tell whether a block's name is no name, or that of a module with another block that is not a part of it."""
    others = (b for b in blocks if b.sum != block.sum and b.sum not in block.nodes)
    return not block.name or any(_is_inside(other.module, block.name) for other in others)


def _is_inside(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")


def _tensors_read(graph: fx.Graph) -> set[str]:
    """Return the tensors that nodes read one by one."""
    return {str(node.target) for node in graph.find_nodes(op="get_attr")}
