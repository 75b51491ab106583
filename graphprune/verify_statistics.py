"""Statistics over channels, taken over the kept ones alone: what a masked program computes in place of its norms.

Each function takes the arguments of an operator and a mask of what stays of its first one, which broadcasts to that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["STATISTICS"]


def _get(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any
) -> Any:
    return args[position] if position < len(args) else kwargs.get(name, default)


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    out: Tensor = _native_layer_norm(args, kwargs, mask)[0]
    return out


def _native_layer_norm(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, shape = args[0], args[1]
    weight, bias = (_get(args, kwargs, i, n, None) for i, n in ((2, "weight"), (3, "bias")))
    dims = list(range(x.dim() - len(shape), x.dim()))
    inside = mask.expand(x.shape).to(x.dtype)
    count = inside.sum(dims, keepdim=True)
    mean = (x * inside).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * inside).sum(dims, keepdim=True) / count
    scale = torch.rsqrt(variance + _get(args, kwargs, 4, "eps", 1e-5))
    out: Tensor = (x - mean) * scale
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, scale


def _rms_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    x, shape, weight = args[0], args[1], _get(args, kwargs, 2, "weight", None)
    eps = _get(args, kwargs, 3, "eps", None)
    dims = list(range(x.dim() - len(shape), x.dim()))
    inside = mask.expand(x.shape).to(x.dtype)
    square = (x.square() * inside).sum(dims, keepdim=True) / inside.sum(dims, keepdim=True)
    out: Tensor = x * torch.rsqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return out if weight is None else out * weight


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    x = args[0]
    weight, bias = (_get(args, kwargs, i, n, None) for i, n in ((1, "weight"), (2, "bias")))
    dims = [d for d in range(x.dim()) if d != 1]
    inside = mask.expand(x.shape).to(x.dtype)
    count = inside.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * inside).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * inside).sum(dims, keepdim=True) / count
    out: Tensor = (x - mean) * torch.rsqrt(variance + _get(args, kwargs, 7, "eps", 1e-5))
    along = (1, -1, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(along)
    return out if bias is None else out + bias.reshape(along)


def _group_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    weight, bias = (_get(args, kwargs, i, n, None) for i, n in ((2, "weight"), (3, "bias")))
    eps = _get(args, kwargs, 4, "eps", 1e-5)
    return _normalized_groups(args[0], weight, bias, args[1], eps, mask)[0]


def _native_group_norm(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, _, _, _, groups, eps = args
    return _normalized_groups(x, weight, bias, groups, eps, mask)


def _normalized_groups(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a group norm whose statistics are over `mask`, and its means and scales, shape (samples, groups)."""
    split = (x.shape[0], groups, -1, *x.shape[2:])
    dims = list(range(2, x.dim() + 1))
    inside = mask.expand(x.shape).to(x.dtype).reshape(split)
    parts = x.reshape(split)
    count = inside.sum(dims, keepdim=True)
    mean = (parts * inside).sum(dims, keepdim=True) / count
    variance = ((parts - mean).square() * inside).sum(dims, keepdim=True) / count
    scale = torch.rsqrt(variance + eps)
    out = ((parts - mean) * scale).reshape(x.shape)
    along = (1, -1, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(along)
    out = out if bias is None else out + bias.reshape(along)
    return out, mean.reshape(split[:2]), scale.reshape(split[:2])


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    x = args[0]
    dims = _get(args, kwargs, 1, "dim", None) or list(range(x.dim()))
    keepdim = bool(_get(args, kwargs, 2, "keepdim", False))
    inside = mask.expand(x.shape).to(x.dtype)
    # Of a head that is gone nothing is left to count.
    count = inside.sum(dims, keepdim=keepdim).clamp(min=1)
    mean: Tensor = (x * inside).sum(dims, keepdim=keepdim) / count
    return mean


STATISTICS = {
    "aten::batch_norm": _batch_norm,
    "aten::mean": _mean,
    "aten::layer_norm": _layer_norm,
    "aten::native_layer_norm": _native_layer_norm,
    "aten::rms_norm": _rms_norm,
    "aten::group_norm": _group_norm,
    "aten::native_group_norm": _native_group_norm,
}
"""Operators that take statistics over channels, with the statistics over the kept channels alone."""
