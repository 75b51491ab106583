"""Clean up: drop what no output needs any more."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from graphprune.contract import Context, Pass, SurgeryResult
from graphprune.lowering.memory import Memory
from graphprune.lowering.symbolic import erase_dead
from graphprune.program import Program

__all__ = ["CleanUp"]

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""Modules that return their input in evaluation mode."""
_RELUS = frozenset(
    (
        torch.relu,
        torch.relu_,
        F.relu,
        F.relu_,
        torch.ops.aten.relu.default,
        torch.ops.aten.relu_.default,
        "relu",
        "relu_",
    )
)
"""Functions, operators and methods that return what is positive."""


@dataclass(frozen=True, kw_only=True)
class CleanUp(Pass):
    """Remove identities, repeated ReLUs, nodes without users, and unused modules; outputs stay as they are."""

    name: ClassVar[str] = "clean-up"

    keep_dropout: bool = True
    """Leave dropout modules in place, so that the program can be trained further."""

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Return the program without what does nothing."""
        module = copy.deepcopy(program.module)
        removed = _bypass_identities(module, keep_dropout=self.keep_dropout)
        removed += _bypass_repeated(module)
        before = len(module.graph.nodes)
        # Not torch.fx's own elimination, which takes ``x[a:b].zero_()`` for dead where nobody uses what it returns.
        erase_dead(module.graph, module)
        removed += before - len(module.graph.nodes)
        modules = len(list(module.modules()))
        module.delete_all_unused_submodules()
        removed += modules - len(list(module.modules()))
        if not removed:
            return SurgeryResult(program=program, modified=False)
        module.recompile()
        return SurgeryResult(program=program.evolve(module, step=self.spec()), modified=True)


def _bypass_repeated(module: fx.GraphModule) -> int:
    """Take out every ReLU of a ReLU; where a block between two has gone, they stand side by side."""
    modules = dict(module.named_modules())
    memory = Memory(module.graph, module)
    count = 0
    for node in [node for node in module.graph.nodes if _is_relu(node, modules)]:
        source = node.all_input_nodes[0]
        if not _is_relu(source, modules):
            continue
        others = {*memory.writers(source), *memory.writers(node)} - {node, source}
        if not others & memory.after(source):  # else the two are not the same tensor later on
            memory.join(node, source)
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            count += 1
    return count


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return node.target in _RELUS and node.op in ("call_function", "call_method")


def _bypass_identities(module: fx.GraphModule, *, keep_dropout: bool) -> int:
    modules = dict(module.named_modules())
    kinds = (nn.Identity,) if keep_dropout else _IDENTITIES
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_module" and isinstance(modules[str(node.target)], kinds):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            count += 1
    return count
