"""The training form of a program: the same parameters and modules, in a graph that computes as training does.

A program is captured in evaluation mode, and its graph may say so in literals: ``dropout(x, 0.5, False)``,
``batch_norm(..., training=False)``. The training form is a second graph over the *same* parameters, buffers and
modules in which these literals say the opposite; the program's own graph stays as it is, and evaluates.

Where several processes train together, batch norms take their statistics over the samples of all of them, so that
the number of processes does not change what is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.program import Program

__all__ = ["synchronised_batch_norm", "training_form"]

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

_BATCH_NORMS: dict[Any, tuple[str, ...]] = {
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
"""Function -> the names of its arguments."""

_MOMENTUM = 0.1
"""What torch.export writes as 0.0 was ``momentum=None``, a cumulative average whose count it dropped."""


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
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _BATCH_NORMS:
            _switch_batch_norm(node, synchronised=synchronised)
        elif node.op == "call_function":
            _switch(node)
        elif node.op == "call_module" and synchronised:
            layer = form.get_submodule(str(node.target))
            if isinstance(layer, _BatchNorm):
                form.add_submodule(str(node.target), _Synchronised(layer))
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


def _switch_batch_norm(node: fx.Node, *, synchronised: bool) -> None:
    target: Any = node.target
    names = _BATCH_NORMS[target]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("running_mean") is None:
        return  # it takes the batch's own statistics as it is
    given["momentum"] = given.get("momentum") or _MOMENTUM
    has_several_results = "training" not in names
    if synchronised:
        node.target = _first_of_three if has_several_results else synchronised_batch_norm
        node.args = (given["input"], given["running_mean"], given["running_var"])
        node.kwargs = {
            name: given[name] for name in ("weight", "bias", "momentum", "eps") if name in given
        }
    elif has_several_results:
        node.target = _aten._native_batch_norm_legit.default
        node.args = (*(given[n] for n in names[:5]), True, given["momentum"], given["eps"])
        node.kwargs = {}
    elif target is F.batch_norm:
        node.args, node.kwargs = (), {**given, "training": True}
    else:
        given["training"] = True
        last = node.args[len(names) :] or (given.get("cudnn_enabled", True),)
        node.args, node.kwargs = (*(given[n] for n in names), *last), {}


class _Synchronised(nn.Module):
    """Calls a batch norm's own parameters and buffers with statistics over all processes."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        momentum = layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(layer.num_batches_tracked)
        return synchronised_batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            weight=layer.weight,
            bias=layer.bias,
            momentum=_MOMENTUM if momentum is None else momentum,
            eps=layer.eps,
        )


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes; the gradient of a sum that everybody reads is the sum of everybody's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        torch.distributed.all_reduce(total)
        return total


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = _MOMENTUM,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise `x` by its mean and variance over the samples of all processes; update the running ones in place.

    Torch's own SyncBatchNorm does this on GPUs only.

    Shapes:
        x: [batch, channels, ...] with equally many values per channel in every process.
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
    sum_over_processes: Callable[[Tensor], Tensor] = _SumOverProcesses.apply
    mean = sum_over_processes(wide.sum(dims)) / count
    centred = wide - mean.view(per_channel)
    var = sum_over_processes(centred.square().sum(dims)) / count
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / max(1, count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    out = centred * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        out = out * weight.view(per_channel)
    if bias is not None:
        out = out + bias.view(per_channel)
    return out.to(x.dtype)


def _first_of_three(*args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
    """Give the result in the place where the operator that it replaces has it."""
    return synchronised_batch_norm(*args, **kwargs), None, None
