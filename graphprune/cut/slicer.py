"""The one slicer: keep the chosen indices of every labelled dimension of every parameter and buffer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.cost import Keep
from graphprune.cut.attributes import update_attributes
from graphprune.cut.literals import LiteralChange, rewrite_literals
from graphprune.cut.shapes import Shapes
from graphprune.groups import DependencyGroups
from graphprune.lowering.copies import copy_structure
from graphprune.program import Program, WholeModel

__all__ = ["Cut", "cut_program", "slice_tensor"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A cut program, and what was written down where."""

    program: Program
    attributes: Mapping[str, Mapping[str, Any]]
    """Module path -> attribute -> new value, for every module attribute that changed."""
    literals: tuple[LiteralChange, ...]
    """Every size that was rewritten in the graph itself."""


def slice_tensor(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a copy of `tensor` with only the kept indices along each dimension; a parameter stays one.

    Args:
        tensor: Any parameter or buffer.
        kept: Dimension -> indices, int64 tensors in ascending order.
    """
    data = tensor.detach()
    # The dimension that shrinks most goes first, so that the others copy less.
    for dim, indices in sorted(kept.items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
        data = data.index_select(dim, indices)
    data = data if kept else data.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def cut_program(
    program: Program, groups: DependencyGroups, keep: Keep, *, step: str = "cut"
) -> Cut:
    """Return `program` without the coupled channels that `keep` leaves out.

    Args:
        program: The program that `groups` analysed; not changed, and shares nothing with the result.
        groups: Its analysis.
        keep: Which coupled channels stay; must break no constraint.
        step: What the new program's history says.

    Raises:
        AnalysisError: A module or a node holds a size that no table knows how to rewrite.
    """
    tensors = _sliced(program.module, groups, keep)
    modules = _copied_modules(program.module, tensors)
    graph = copy.deepcopy(program.module.graph)
    shapes = Shapes(groups.labels, keep[groups.channel_of] if groups.num_channels else keep)
    attributes = update_attributes(graph, modules, shapes, groups.labels.calls)
    literals = rewrite_literals(graph, shapes)
    origin = groups.cost.origin_of(program).checked(program).cut(groups.slices(keep))
    kind = WholeModel if program.dialect == "module" else fx.GraphModule
    module = kind(modules, graph, class_name=type(program.module).__name__).eval()
    return Cut(
        program=program.evolve(module, step=step, origin=origin),
        attributes=attributes,
        literals=tuple(literals),
    )


def _sliced(module: fx.GraphModule, groups: DependencyGroups, keep: Keep) -> dict[int, Tensor]:
    """Return a cut copy of every tensor of `module`, by the identity of the original."""
    sources, left = groups.labels.sources, keep[groups.channel_of]
    kept = {
        name: {dim: torch.from_numpy(indices) for dim, indices in dims.items()}
        for name, dims in groups.kept_indices(keep).items()
    }
    memo: dict[int, Tensor] = {}
    named: dict[str, Tensor] = dict(module.named_parameters())
    named.update(module.named_buffers())
    for name in kept.keys() - named.keys():
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part)
        named[name] = value
    with torch.no_grad():
        for name, tensor in named.items():
            memo[id(tensor)] = slice_tensor(tensor, kept.get(name, {}))
            if name in sources:
                memo[id(tensor)] = sources[name].renumbered(memo[id(tensor)], left)
    return memo


def _copied_modules(module: fx.GraphModule, tensors: dict[int, Tensor]) -> dict[str, Any]:
    """Return what the graph calls and reads, by name: copies of its modules that hold the given tensors."""
    copies: dict[int, nn.Module] = {}
    found: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op not in ("call_module", "get_attr") or node.target in found:
            continue
        value = operator.attrgetter(str(node.target))(module)
        if isinstance(value, Tensor):
            found[str(node.target)] = tensors[id(value)]
            continue
        if id(value) not in copies:
            copies[id(value)] = _with_tensors(copy_structure(value), tensors)
        found[str(node.target)] = copies[id(value)]
    return found


def _with_tensors(tree: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    for module in tree.modules():
        registries: tuple[dict[str, Any], ...] = (
            module._parameters,
            module._buffers,
            module.__dict__,
        )
        for registry in registries:
            for name, value in registry.items():
                if isinstance(value, Tensor):
                    # A weight that a hook computes before each call (weight norm) is no tensor of the program.
                    registry[name] = tensors.get(id(value), value)
                elif type(value) is list and any(isinstance(v, Tensor) for v in value):
                    registry[name] = [tensors.get(id(v), v) for v in value]
    return tree
