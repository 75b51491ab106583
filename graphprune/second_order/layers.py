"""Layers: the linear and convolution nodes of a program whose weight is a parameter, and their input as samples.

Such a layer computes ``z = W y`` for every sample ``y`` of its input: a row of a linear layer's input, or a
sliding-window patch of a convolution's. `unfold` writes the samples down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.program import Program

__all__ = ["Layer", "layers", "padded", "patches", "unfold"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear or convolution node whose weight is a parameter."""

    node: str
    """Name of the graph node."""
    weight: str
    """Name of the weight, as in `Program.named_tensors`; a weight that several nodes use makes several layers."""
    bias: str | None
    """Name of the bias."""
    kind: Literal["linear", "conv"]
    input: str
    """Name of the node whose output the layer reads."""
    groups: int = 1
    """Convolution groups; 1 for linear."""
    kernel_size: tuple[int, ...] = ()
    """Per spatial dimension, as are the next three; empty for linear."""
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    """Elements before and after."""
    padding_mode: str = "constant"
    """As `torch.nn.functional.pad` has it."""


def layers(program: Program) -> tuple[Layer, ...]:
    """Return the linear and convolution layers of a program, in graph order.

    These are calls of `nn.Linear` and `nn.Conv1d` to `nn.Conv3d`, and of the functions and ATen operators of the same
    meaning whose weight is read straight from a parameter. Transposed convolutions are not among them, nor are modules
    with a forward of their own (weight standardisation).
    """
    names = {id(tensor): name for name, tensor in program.module.named_parameters()}
    found = []
    for node in program.module.graph.nodes:
        layer = None
        if node.op == "call_module":
            layer = _of_module(node, program.module.get_submodule(str(node.target)), names)
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            layer = _of_function(node, program.module, names)
        if layer is not None:
            found.append(layer)
    return tuple(found)


def unfold(layer: Layer, x: Tensor, kernel_size: Sequence[int] | None = None) -> Tensor:
    """Return the input of a layer as samples: rows whose product with ``weight.flatten(1)`` is the layer's output.

    Args:
        layer: Where `x` flows in.
        x: The layer's input, batched.
        kernel_size: Spatial shape of the weight, if it is not the layer's own.

    Shapes:
        x: ``[..., features]`` for linear, ``[batch, channels, *space]`` for a convolution.
        result: ``[groups, samples, features]``; linear: every leading dimension counts samples; convolution: a sample
            is a patch, samples go by image and place, features by channel of the group and place in the kernel.
    """
    if layer.kind == "linear":
        return x.reshape(1, -1, x.shape[-1])
    kernel = layer.kernel_size if kernel_size is None else kernel_size
    found = patches(layer, padded(layer, x), kernel)
    batch, channels, *sizes = found.shape
    places = sizes[: len(kernel)]
    grouped = found.reshape(batch, layer.groups, channels // layer.groups, *sizes)
    moved = grouped.permute(
        1, 0, *range(3, 3 + len(places)), 2, *range(3 + len(places), grouped.dim())
    )
    return moved.reshape(layer.groups, batch * math.prod(places), -1)


def padded(layer: Layer, x: Tensor) -> Tensor:
    """Return the input of a convolution with its padding written out."""
    sides = [side for pair in reversed(layer.padding) for side in pair]
    return F.pad(x, sides, mode=layer.padding_mode) if any(sides) else x


def patches(layer: Layer, x: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Return the patches of a padded input, ``[batch, channels, *places, *kernel]``, as a view."""
    sizes = zip(kernel_size, layer.stride, layer.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(sizes):
        x = x.unfold(2 + dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x


_MODULES: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Linear, nn.Linear.forward),
    (nn.Conv1d, nn.Conv1d.forward),
    (nn.Conv2d, nn.Conv2d.forward),
    (nn.Conv3d, nn.Conv3d.forward),
)

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.ops.aten.linear.default: ("input", "weight", "bias"),
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    torch.ops.aten.conv1d.default: _CONV,
    torch.ops.aten.conv2d.default: _CONV,
    torch.ops.aten.conv3d.default: _CONV,
    torch.ops.aten.conv1d.padding: _CONV,
    torch.ops.aten.conv2d.padding: _CONV,
    torch.ops.aten.conv3d.padding: _CONV,
    torch.ops.aten.convolution.default: (
        *_CONV[:6],
        "transposed",
        "output_padding",
        "groups",
    ),
}
"""Function -> the names of its arguments."""


def _of_module(node: fx.Node, module: nn.Module, names: Mapping[int, str]) -> Layer | None:
    kind = next(
        (k for k, forward in _MODULES if isinstance(module, k) and type(module).forward is forward),
        None,
    )
    source = node.args[0] if node.args else node.kwargs.get("input")
    weight = module._parameters.get("weight")
    if kind is None or weight is None or not isinstance(source, fx.Node):
        return None
    bias = module._parameters.get("bias")
    bias_name = None if bias is None else names[id(bias)]
    if isinstance(module, nn.Linear):
        return Layer(
            node=node.name,
            weight=names[id(weight)],
            bias=bias_name,
            kind="linear",
            input=source.name,
        )
    given: dict[str, Any] = {
        n: getattr(module, n) for n in ("stride", "padding", "dilation", "groups")
    }
    mode = str(module.padding_mode)
    return _convolution(node, source, weight, names[id(weight)], bias_name, given, mode)


def _of_function(node: fx.Node, root: nn.Module, names: Mapping[int, str]) -> Layer | None:
    given = {**dict(zip(_FUNCTIONS[node.target], node.args, strict=False)), **node.kwargs}
    source, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    found = _parameter(root, weight)
    if found is None or not isinstance(source, fx.Node) or given.get("transposed"):
        return None
    offset = _parameter(root, bias)
    if bias is not None and offset is None:
        return None
    bias_name = None if offset is None else names[id(offset)]
    name = names[id(found)]
    if "stride" not in _FUNCTIONS[node.target]:
        return Layer(node=node.name, weight=name, bias=bias_name, kind="linear", input=source.name)
    if any(isinstance(leaf, fx.Node) for leaf in _leaves(given)):
        return None  # geometry that the graph computes
    return _convolution(node, source, found, name, bias_name, given, "zeros")


def _leaves(given: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("stride", "padding", "dilation", "groups"):
        value = given.get(name)
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _parameter(root: nn.Module, value: Any) -> nn.Parameter | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = root
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, nn.Parameter) else None


def _convolution(
    node: fx.Node,
    source: fx.Node,
    weight: Tensor,
    name: str,
    bias: str | None,
    given: Mapping[str, Any],
    mode: str,
) -> Layer:
    kernel = weight.shape[2:]

    def each(key: str, default: int) -> tuple[int, ...]:
        value = given.get(key, default)
        sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return sizes * len(kernel) if len(sizes) == 1 else sizes

    dilation = each("dilation", 1)
    padding = given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    elif padding == "valid":
        sides = ((0, 0),) * len(kernel)
    else:
        sides = tuple((p, p) for p in each("padding", 0))
    return Layer(
        node=node.name,
        weight=name,
        bias=bias,
        kind="conv",
        input=source.name,
        groups=given.get("groups", 1),
        kernel_size=tuple(kernel),
        stride=each("stride", 1),
        dilation=dilation,
        padding=sides,
        padding_mode="constant" if mode == "zeros" else mode,
    )
