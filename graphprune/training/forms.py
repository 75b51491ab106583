"""The training form of a program: the same parameters and modules, in a graph that computes as training does.

A program is captured in evaluation mode, and its graph may say so in literals: ``dropout(x, 0.5, False)``,
``batch_norm(..., training=False)``. The training form is a second graph over the *same* parameters, buffers and
modules in which these literals say the opposite; the program's own graph stays as it is, and evaluates.

Where several processes train together, batch norms take their statistics over the samples of all of them, so that
the number of processes does not change what is learned. On a CPU, batch norms over few channels are our own
(`batch_norm`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.program import Program
from graphprune.training.batch_norm import (
    DEFAULT_MOMENTUM,
    TrainedBatchNorm,
    batch_norm,
    synchronised_batch_norm,
)

__all__ = ["BATCH_NORMS", "training_form"]

_aten = torch.ops.aten

_SWITCHES: dict[Any, tuple[str, int]] = {
    F.dropout: ("training", 2),
    F.dropout1d: ("training", 2),
    F.dropout2d: ("training", 2),
    F.dropout3d: ("training", 2),
    F.alpha_dropout: ("training", 2),
    F.feature_alpha_dropout: ("training", 2),
    F.rrelu: ("training", 3),
    torch.dropout: ("train", 2),
    _aten.dropout.default: ("train", 2),
    _aten.native_dropout.default: ("train", 2),
    _aten.feature_dropout.default: ("train", 2),
    _aten.alpha_dropout.default: ("train", 2),
    _aten.feature_alpha_dropout.default: ("train", 2),
    _aten.rrelu.default: ("training", 3),
}
"""Function -> name and position of the argument that says whether it trains."""

BATCH_NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    _aten.batch_norm.default: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps"),
    ),
    _aten._native_batch_norm_legit_no_training.default: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("momentum", "eps"),
    ),
}
"""Function of batch norm -> the names of its arguments; one that says nothing of training has three results."""


def training_form(program: Program, *, synchronised: bool = False) -> fx.GraphModule:
    """Return a module that trains the parameters of `program`; the program itself stays as it is.

    Args:
        program: What is trained, already on the device where it will be.
        synchronised: Whether batch norms share their statistics with the other processes.
    """
    source = program.module
    graph = fx.Graph()
    graph.set_codegen(source.graph._codegen)
    # Node by node: a deep copy would copy the tensors that stand in arguments.
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "output":
            break
    form = fx.GraphModule(source, graph, class_name=type(source).__name__)
    normalise = synchronised_batch_norm if synchronised else batch_norm
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in BATCH_NORMS:
            _switch_batch_norm(node, normalise)
        elif node.op == "call_function":
            _switch(node)
        elif node.op == "call_module":
            layer = form.get_submodule(str(node.target))
            if isinstance(layer, _BatchNorm):
                form.add_submodule(str(node.target), TrainedBatchNorm(layer, normalise))
    form.recompile()
    return form


def _switch(node: fx.Node) -> None:
    """Say in one call that it trains, where it has a word for that."""
    name, position = _SWITCHES.get(node.target, ("", -1))
    if getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision's, kept whole
        name, position = "training", 3
    if not name:
        return
    if len(node.args) > position:
        node.update_arg(position, True)
    else:
        node.kwargs = {**node.kwargs, name: True}


def _switch_batch_norm(node: fx.Node, normalise: Callable[..., Tensor]) -> None:
    target: Any = node.target
    names = BATCH_NORMS[target]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("running_mean") is None:
        return  # it takes the batch's own statistics as it is
    given["momentum"] = given.get("momentum") or DEFAULT_MOMENTUM
    node.target = normalise
    node.args = (given["input"], given["running_mean"], given["running_var"])
    node.kwargs = {
        name: given[name] for name in ("weight", "bias", "momentum", "eps") if name in given
    }
    if "training" not in names:  # three results, of which the first alone counts
        for user in list(node.users):
            user.replace_all_uses_with(node)
            user.graph.erase_node(user)
