"""Residual blocks: the branch of a sum that a shortcut goes around, and the program without it.

    x + f(x)  ->  x

A sum of two tensors is a residual block where one of them, the shortcut, has its shape and type, and the other, the
branch, was computed from it. What nothing else needs of the branch goes with it. The proof runs the same program with
zeros in place of what the branch returns.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from graphprune.cost import Cost
from graphprune.errors import PlanError
from graphprune.groups import DependencyGroups
from graphprune.labels.trace import TensorInfo, tensor_infos
from graphprune.lowering.memory import Memory
from graphprune.lowering.symbolic import erase_dead
from graphprune.program import Program

__all__ = [
    "ResidualBlock",
    "cost_of",
    "find_residual_blocks",
    "named_blocks",
    "no_blocks",
    "outermost",
    "sharing_without",
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
    module = program.module
    memory = Memory(module.graph, module)
    users = _tensor_users(module)
    macs = {cost.node: cost.macs for cost in groups.cost.per_node()}
    found: list[ResidualBlock] = []
    for node in module.graph.nodes:
        for branch, shortcut in _operands(node, groups):
            gone = _needed_by(branch, node, memory)
            block = ResidualBlock(
                name="",
                module=_common_module(_held(gone, module)),
                sum=node.name,
                shortcut=shortcut.name,
                branch=branch.name,
                nodes=frozenset(n.name for n in gone),
                params=_parameters(tensor for tensor, nodes in users.items() if nodes <= gone),
                macs=sum(macs.get(n.name, 0) for n in gone),
            )
            begin = _behind_identities(shortcut, module)
            if (block.params or block.macs) and _comes_from(branch, begin, groups):
                found.append(block)
                break
    return _with_names(found, module)


def outermost(blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """Return the blocks that are not inside others."""
    inside = {name for block in blocks for name in block.nodes}
    return [block for block in blocks if block.sum not in inside]


def cost_of(left: fx.GraphModule, groups: DependencyGroups) -> Cost:
    """Return what is left to pay of what `groups` says of a program, for what `sharing_without` has made of it."""
    nodes = {node.name for node in left.graph.nodes}
    macs = sum(cost.macs for cost in groups.cost.per_node() if cost.node in nodes)
    return Cost(params=_parameters(_tensor_users(left)), macs=macs)


def no_blocks(program: Program) -> str:
    """Return why a program has no residual block, where it has none."""
    if program.dialect == "module":
        return "no graph to find residual blocks in: it runs whole"
    return "no residual block: no sum of a tensor and something computed from it"


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
    for name in names:
        meant = (
            {block for block in blocks if block.name == name}
            or {block for block in blocks if block.sum == name}
            or {block for block in blocks if name and _is_inside(block.module, name)}
        )
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
    names = {id(tensor): name for name, tensor in _named_tensors(module)}
    before = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    _bypass(module.graph, module, blocks)
    used = _tensor_users(module)
    for name in before:
        owner, _, attribute = name.rpartition(".")
        if getattr(holder := module.get_submodule(owner), attribute) not in used:
            delattr(holder, attribute)
    module.delete_all_unused_submodules()
    module.recompile()
    renamed = {names[id(tensor)]: name for name, tensor in _named_tensors(module)}
    origin = groups.cost.origin_of(program).checked(program)
    gone = {block.name: block.sum for block in blocks}
    return program.evolve(module, step=step, origin=origin.without(gone, renamed))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def with_silent_blocks(program: Program, blocks: Sequence[ResidualBlock]) -> Program:
    """Return a program that adds zeros where it added these branches: what `without_blocks` has to equal."""
    graph = copy.deepcopy(program.module.graph)
    nodes = {node.name: node for node in graph.nodes}
    for block in blocks:
        total, branch = nodes[block.sum], nodes[block.branch]
        with graph.inserting_before(total):
            zeros = graph.call_function(torch.zeros_like, (branch,))
        total.replace_input_with(branch, zeros)
    return program.evolve(_sharing(program.module, graph))


def sharing_without(module: fx.GraphModule, blocks: Sequence[ResidualBlock]) -> fx.GraphModule:
    """Return a module without some blocks that holds the same submodules and tensors as `module`."""
    graph = copy.deepcopy(module.graph)
    _bypass(graph, module, blocks)
    return _sharing(module, graph)


def _sharing(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule(module, graph, class_name=type(module).__name__).eval()


def _bypass(graph: fx.Graph, root: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
    """Let every sum be its shortcut, and erase what nothing needs any more.

    A sum is a tensor of its own. Where something writes into it later, and somebody else still reads the shortcut, or
    it is the caller's, a copy takes the sum's place.
    """
    nodes = {node.name: node for node in graph.nodes}
    memory = Memory(graph, root)
    gone = {nodes[name] for block in blocks for name in block.nodes}
    stands_for: dict[fx.Node, fx.Node] = {}
    for block in sorted(outermost(blocks), key=lambda block: memory.position[nodes[block.sum]]):
        total, shortcut = nodes[block.sum], nodes[block.shortcut]
        # It may be the sum of a block that has just gone.
        shortcut = stands_for.get(shortcut, shortcut)
        if _needs_copy(total, shortcut, gone, memory):
            with graph.inserting_before(total):
                shortcut = graph.call_function(torch.clone, (shortcut,))
            memory.add(shortcut, before=total)
        memory.join(total, shortcut)
        stands_for[total] = shortcut
        gone.add(total)
        total.replace_all_uses_with(shortcut)
    for node in reversed(graph.nodes):
        if node in gone:
            graph.erase_node(node)
    erase_dead(graph, root)


def _needs_copy(total: fx.Node, shortcut: fx.Node, gone: set[fx.Node], memory: Memory) -> bool:
    """Tell whether a shortcut cannot stand for its sum, for one is written into where the other is not meant."""
    if total in memory.sharing(shortcut):
        return False  # they are one tensor already
    later = {node for node in memory.after(total) if node not in gone}
    if later.intersection(memory.writers(shortcut)):
        return True
    if not later.intersection(memory.writers(total)):
        return False
    readers = {user for node in memory.sharing(shortcut) for user in node.users}
    return memory.is_given(shortcut) or bool(readers & later)


def _operands(node: fx.Node, groups: DependencyGroups) -> list[tuple[fx.Node, fx.Node]]:
    """Return the two ways to call a sum's operands branch and shortcut; none where it is no sum of two tensors."""
    if node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
        return []
    one, other = node.args
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return []
    values: Mapping[str, object] = groups.labels.values
    total, *infos = (values.get(n.name) for n in (node, one, other))
    if not isinstance(total, TensorInfo):
        return []
    fits = [
        isinstance(info, TensorInfo) and (info.shape, info.dtype) == (total.shape, total.dtype)
        for info in infos
    ]
    pairs = (((one, other), fits[1]), ((other, one), fits[0]))
    return [pair for pair, can_stay in pairs if can_stay]


def _needed_by(branch: fx.Node, total: fx.Node, memory: Memory) -> set[fx.Node]:
    """Return the nodes that nothing needs but a sum, through this branch; none where they write into what stays."""
    gone: set[fx.Node] = set()
    if set(branch.users) != {total}:
        return gone
    gone.add(branch)
    for node in reversed(branch.graph.nodes):
        if node.op != "placeholder" and node.users and set(node.users) <= gone:
            gone.add(node)
    later = memory.after(total) | {total}
    for node in gone:
        written = memory.written.get(node)
        if written is not None and not memory.sharing(written) <= gone | later:
            return set()
    return gone


def _comes_from(branch: fx.Node, shortcut: fx.Node, groups: DependencyGroups) -> bool:
    """Tell whether a branch was computed from its shortcut, and not only from its size."""
    seen, waiting = set[fx.Node](), [branch]
    while waiting:
        node = waiting.pop()
        if node is shortcut:
            return True
        if node not in seen and tensor_infos(groups.labels.values.get(node.name)):
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


def _tensor_users(module: fx.GraphModule) -> dict[Tensor, set[fx.Node]]:
    """Return every parameter and buffer that a graph uses, with the nodes that use it."""
    users: dict[Tensor, set[fx.Node]] = {}
    for node in module.graph.nodes:
        for tensor in _tensors(node, module):
            users.setdefault(tensor, set()).add(node)
    return users


def _tensors(node: fx.Node, root: nn.Module) -> list[Tensor]:
    path = str(node.target)
    if node.op == "call_module":
        called = root.get_submodule(path)
        return [*called.parameters(), *called.buffers()]
    if node.op == "get_attr":
        owner, _, name = path.rpartition(".")
        value = getattr(root.get_submodule(owner), name)
        return [value] if isinstance(value, Tensor) else []
    return []


def _parameters(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))


def _held(nodes: Iterable[fx.Node], root: nn.Module) -> dict[str, int]:
    """Return the modules whose parameters some nodes use, with the number of these."""
    held: Counter[str] = Counter()
    for node in nodes:
        path = str(node.target)
        owner = path if node.op == "call_module" else path.rpartition(".")[0]
        held[owner] += _parameters(_tensors(node, root))
    return {path: count for path, count in held.items() if count}


def _with_names(
    blocks: Sequence[ResidualBlock], module: fx.GraphModule
) -> tuple[ResidualBlock, ...]:
    """Name each block by its module; where others are in it too, by the one that holds most, or by its sum as well."""
    named = [replace(block, name=block.module) for block in blocks]
    closer = [
        replace(block, name=_heaviest_module(block, module)) if _is_vague(block, named) else block
        for block in named
    ]
    return tuple(
        replace(block, name=":".join(filter(None, (block.module, block.sum))))
        if _is_vague(block, closer)
        else block
        for block in closer
    )


def _common_module(paths: Iterable[str]) -> str:
    """Return the innermost module that all of these are, or are in."""
    split = [path.split(".") for path in paths]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join(parts[0] for parts in same)


def _heaviest_module(block: ResidualBlock, module: fx.GraphModule) -> str:
    """Return the innermost module with modules inside that holds most of a block's parameters."""
    held: Counter[str] = Counter()
    nodes = [node for node in module.graph.nodes if node.name in block.nodes]
    for path, count in _held(nodes, module).items():
        parts = path.split(".")
        for length in range(1, len(parts)):
            held[".".join(parts[:length])] += count
    most = (path for path, count in held.items() if 2 * count > block.params)
    return max(most, key=len, default=block.module)


def _is_vague(block: ResidualBlock, blocks: Iterable[ResidualBlock]) -> bool:
    """Tell whether a block's name is no name, or that of a module with another block that is not a part of it."""
    others = (b for b in blocks if b.sum != block.sum and b.sum not in block.nodes)
    return not block.name or any(_is_inside(other.module, block.name) for other in others)


def _is_inside(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")
