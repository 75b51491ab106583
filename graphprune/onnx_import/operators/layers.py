"""Convolution, matrix products, normalisation and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from graphprune.onnx_import.builder import Builder, Call
from graphprune.onnx_import.operators import operator

__all__: list[str] = []

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _pads(b: Builder, call: Call, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the border before and after each spatial dimension."""
    rank = len(kernel)
    mode = call.attr("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = list(call.attr("pads", [0] * 2 * rank))
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return [0] * rank, [0] * rank
    strides, dilations = (list(call.attr(n, [1] * rank)) for n in ("strides", "dilations"))
    low, high = [], []
    for size, k, s, d in zip(call.shape(0)[2:], kernel, strides, dilations, strict=True):
        if not isinstance(size, int):
            raise call.refuse(f"auto_pad={mode} on a size that follows the batch")
        total = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
        less, more = total // 2, total - total // 2
        low.append(less if mode == "SAME_UPPER" else more)
        high.append(more if mode == "SAME_UPPER" else less)
    return low, high


def _border(b: Builder, x: Any, low: Sequence[int], high: Sequence[int], value: float) -> Any:
    widths = [w for pair in reversed(list(zip(low, high, strict=True))) for w in pair]
    return b.call(F.pad, x, widths, "constant", value)


@operator("Conv")
def conv(b: Builder, call: Call) -> Any:
    """Convolution in 1-D to 3-D, grouped or not; an uneven border is padded first."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    kernel = list(b.meta(weight)[0].shape[2:])
    rank = len(kernel)
    if rank not in _CONV:
        raise call.refuse(f"{rank} spatial dimensions, expected 1 to 3")
    low, high = _pads(b, call, kernel)
    if low != high:
        x, low = _border(b, x, low, high, 0.0), [0] * rank
    strides, dilations = (list(call.attr(n, [1] * rank)) for n in ("strides", "dilations"))
    return b.call(_CONV[rank], x, weight, bias, strides, low, dilations, call.attr("group", 1))


@operator("ConvTranspose")
def conv_transpose(b: Builder, call: Call) -> Any:
    """Transposed convolution."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    kernel = list(b.meta(weight)[0].shape[2:])
    rank = len(kernel)
    strides, dilations = (list(call.attr(n, [1] * rank)) for n in ("strides", "dilations"))
    extra = list(call.attr("output_padding", [0] * rank))
    if call.attr("output_shape") or call.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refuse("its border follows from output_shape or auto_pad; export explicit pads")
    pads = list(call.attr("pads", [0] * 2 * rank))
    low, high = pads[:rank], pads[rank:]
    # What the end of the border takes away beyond its beginning, output padding would give back.
    less = [h - e for h, e in zip(high, extra, strict=True)]
    base = [min(a, c) for a, c in zip(low, high, strict=True)] if low != high else low
    if low != high:
        full = b.call(_TRANSPOSED[rank], x, weight, bias, strides, [0] * rank, [0] * rank,
                      call.attr("group", 1), dilations)  # fmt: skip
        return _border(b, full, [-w for w in low], [-w for w in less], 0.0)
    return b.call(_TRANSPOSED[rank], x, weight, bias, strides, base, extra, call.attr("group", 1),
                  dilations)  # fmt: skip


@operator("Gemm")
def gemm(b: Builder, call: Call) -> Any:
    """``alpha A B + beta C``; the usual form is a linear layer."""
    a, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    if call.attr("transA", 0):
        a = b.call(torch.transpose, a, 0, 1)
    rank = 0 if bias is None else len(b.meta(bias)[0].shape)
    plain = alpha == 1.0 and (bias is None or (beta == 1.0 and rank == 1))
    if plain and call.attr("transB", 0):
        wide = bias is None or b.meta(bias)[0].shape[0] == b.meta(weight)[0].shape[0]
        return (
            b.call(F.linear, a, weight, bias)
            if wide
            else b.call(torch.add, b.call(F.linear, a, weight), bias)
        )
    if call.attr("transB", 0):
        product = b.call(F.linear, a, weight)
    else:
        product = b.call(torch.matmul, a, weight)
    if alpha != 1.0:
        product = b.call(torch.mul, product, alpha)
    if bias is None:
        return product
    return b.call(torch.add, product, bias if beta == 1.0 else b.call(torch.mul, bias, beta))


@operator("MatMul")
def matmul(b: Builder, call: Call) -> Any:
    """Matrix product, batched."""
    return b.call(torch.matmul, call.tensor(0), call.tensor(1))


@operator("Einsum")
def einsum(b: Builder, call: Call) -> Any:
    """Sum of products by an equation."""
    operands = [call.tensor(i) for i in range(len(call))]
    return b.call(torch.einsum, call.attr("equation"), *operands)


@operator("BatchNormalization")
def batch_norm(b: Builder, call: Call) -> Any:
    """Normalisation by stored statistics."""
    if call.attr("training_mode", 0) or (call.opset >= 14 and len(call.node.output) > 1):
        raise call.refuse("it is in training mode; export the model in evaluation mode")
    mean, variance = (b.as_node(call.value(i), is_buffer=True) for i in (3, 4))
    weight, bias = (b.as_node(call.value(i)) for i in (1, 2))
    epsilon = call.attr("epsilon", 1e-5)
    return b.call(F.batch_norm, call.tensor(0), mean, variance, weight, bias, False, 0.0, epsilon)


@operator("InstanceNormalization")
def instance_norm(b: Builder, call: Call) -> Any:
    """Normalisation of every channel of every sample."""
    weight, bias = (b.as_node(call.value(i)) for i in (1, 2))
    epsilon = call.attr("epsilon", 1e-5)
    return b.call(F.instance_norm, call.tensor(0), None, None, weight, bias, True, 0.1, epsilon)


@operator("LayerNormalization")
def layer_norm(b: Builder, call: Call) -> Any:
    """Normalisation over the last dimensions; weights may broadcast over them."""
    if len([name for name in call.node.output if name]) > 1:
        raise call.refuse("its mean and deviation are used, which cannot be imported")
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    axis = call.attr("axis", -1) % call.rank()
    sizes = call.shape()[axis:]
    epsilon = call.attr("epsilon", 1e-5)
    fits = [p is None or list(b.meta(p)[0].shape) == sizes for p in (weight, bias)]
    if all(fits):
        return b.call(F.layer_norm, x, sizes, weight, bias, epsilon)
    normal = b.call(torch.mul, b.call(F.layer_norm, x, sizes, None, None, epsilon), weight)
    return normal if bias is None else b.call(torch.add, normal, bias)


@operator("RMSNormalization")
def rms_norm(b: Builder, call: Call) -> Any:
    """Division by the root mean square over the last dimensions."""
    sizes = call.shape()[call.attr("axis", -1) % call.rank() :]
    return b.call(F.rms_norm, call.tensor(0), sizes, call.tensor(1), call.attr("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(b: Builder, call: Call) -> Any:
    """Normalisation of groups of channels; weights per channel, in old files per group."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    groups, epsilon = call.attr("num_groups"), call.attr("epsilon", 1e-5)
    channels = call.shape()[1]
    if b.meta(weight)[0].shape[0] != channels:
        repeats = channels // groups
        weight, bias = (b.call(torch.repeat_interleave, v, repeats) for v in (weight, bias))
    return b.call(F.group_norm, x, groups, weight, bias, epsilon)


@operator("LRN")
def local_response_norm(b: Builder, call: Call) -> Any:
    """Normalisation over neighbouring channels."""
    size = call.attr("size")
    alpha, beta, k = call.attr("alpha", 1e-4), call.attr("beta", 0.75), call.attr("bias", 1.0)
    return b.call(F.local_response_norm, call.tensor(0), size, alpha, beta, k)


@operator("MaxPool")
def max_pool(b: Builder, call: Call) -> Any:
    """Maximum of windows."""
    if len(call.node.output) > 1 and call.node.output[1]:
        raise call.refuse("its indices are used, which cannot be imported")
    x, kernel = call.tensor(0), list(call.attr("kernel_shape"))
    rank = len(kernel)
    low, high = _pads(b, call, kernel)
    if low != high or any(2 * p > k for p, k in zip(low, kernel, strict=True)):
        x, low = _border(b, x, low, high, -math.inf), [0] * rank
    strides, dilations = (list(call.attr(n, [1] * rank)) for n in ("strides", "dilations"))
    is_ceil = bool(call.attr("ceil_mode", 0))
    return b.call(_MAX[rank], x, kernel, strides, low, dilations, ceil_mode=is_ceil)


@operator("AveragePool")
def average_pool(b: Builder, call: Call) -> Any:
    """Mean of windows."""
    x, kernel = call.tensor(0), list(call.attr("kernel_shape"))
    rank = len(kernel)
    if any(d != 1 for d in call.attr("dilations", [1])):
        raise call.refuse("dilated windows, which torch does not average")
    counts_border = bool(call.attr("count_include_pad", 0))
    low, high = _pads(b, call, kernel)
    if low != high:
        if not counts_border:
            raise call.refuse("an uneven border that the mean leaves out")
        x, low = _border(b, x, low, high, 0.0), [0] * rank
    is_ceil = bool(call.attr("ceil_mode", 0))
    strides = list(call.attr("strides", [1] * rank))
    return b.call(_AVERAGE[rank], x, kernel, strides, low, is_ceil, counts_border)


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(b: Builder, call: Call) -> Any:
    """Mean or maximum over all of space."""
    dims = list(range(2, call.rank()))
    function = torch.mean if call.node.op_type == "GlobalAveragePool" else torch.amax
    return b.call(function, call.tensor(0), dims, True)
