"""What a gated program computes with: layers whose weight has gates, and normalisations over the open channels.

A channel whose gate is 0 adds nothing to a sum: ``y = W (m x) = (W m) x``. A normalisation over channels takes its
statistics over the open ones, with ``m`` the gates along the normalised dimensions:

    mean = sum(m x) / sum(m),   var = sum(m (x - mean)^2) / sum(m)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.labels.atoms import Atoms

__all__ = [
    "GatedLayer",
    "GatedNorm",
    "Mask",
    "can_gate_layer",
    "can_gate_norm",
    "gated_group_norm",
    "gated_layer_norm",
    "gated_rms_norm",
    "weight_index",
]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what its class in torch does."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)


def can_gate_layer(module: nn.Module) -> bool:
    """Whether `GatedLayer` stands for the module."""
    return _is_plain(module, _LAYERS + _TRANSPOSED) and "weight" in module._parameters


def can_gate_norm(module: nn.Module) -> bool:
    """Whether `GatedNorm` stands for the module."""
    return _is_plain(module, _NORMS)


class Mask(nn.Module):
    """Picks the gates of some coupled channels, in the shape of the tensor that they multiply."""

    index: Tensor

    def __init__(self, index: Atoms) -> None:
        """Pick the gates of these coupled channels."""
        super().__init__()
        self.register_buffer("index", torch.from_numpy(np.ascontiguousarray(index)))

    def forward(self, gates: Tensor) -> Tensor:
        """Return one gate per entry of the index."""
        return gates[self.index]


def weight_index(channels: Atoms, weight: Sequence[int], *, groups: int, transposed: bool) -> Atoms:
    """Return the input channel that every entry of a weight reads, with size 1 where all entries read the same.

    Args:
        channels: The layer's input channels.
        weight: Shape of the weight.
        groups: Convolution groups.
        transposed: Whether inputs stand along dim 0.
    """
    ones = (1,) * (len(weight) - 2)
    if transposed:
        return channels.reshape(-1, 1, *ones)
    rows = channels.reshape(groups, weight[1])
    return rows.repeat(weight[0] // groups if groups > 1 else 1, axis=0).reshape(
        -1, weight[1], *ones
    )


class GatedLayer(nn.Module):
    """A linear layer or convolution, called with the gates of its weight before its input."""

    def __init__(self, layer: nn.Module) -> None:
        """Use the parameters of `layer`."""
        super().__init__()
        self.layer = layer

    def forward(self, mask: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the layer computes with ``weight * mask``."""
        layer: Any = self.layer
        weight = layer.weight * mask
        out: Tensor
        if isinstance(layer, nn.Linear):
            out = F.linear(input, weight, layer.bias)
        elif isinstance(layer, _TRANSPOSED):
            out = torch.func.functional_call(layer, {"weight": weight}, (input, *args), kwargs)
        else:
            out = layer._conv_forward(input, weight, layer.bias)
        return out


class GatedNorm(nn.Module):
    """A layer, RMS or group norm, called with the gates of its input before its input."""

    def __init__(self, layer: nn.Module) -> None:
        """Use the parameters and options of `layer`."""
        super().__init__()
        self.layer = layer

    def forward(self, mask: Tensor, input: Tensor) -> Tensor:
        """Return what the layer computes with its statistics over the open channels."""
        layer: Any = self.layer
        if isinstance(layer, nn.GroupNorm):
            return gated_group_norm(
                mask, input, layer.num_groups, layer.weight, layer.bias, layer.eps
            )
        if isinstance(layer, nn.RMSNorm):
            return gated_rms_norm(mask, input, layer.normalized_shape, layer.weight, layer.eps)
        return gated_layer_norm(
            mask, input, layer.normalized_shape, layer.weight, layer.bias, layer.eps
        )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mean(mask: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    """Return the mean of `x` over the open entries along `dims`."""
    sizes = [
        n if d in dims else m for d, (n, m) in enumerate(zip(x.shape, mask.shape, strict=True))
    ]
    count = mask.expand(sizes).sum(dims, keepdim=True)
    mean: Tensor = (x * mask).sum(dims, keepdim=True) / count
    return mean


def gated_layer_norm(
    mask: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Return the layer norm of `input` with statistics over the entries whose gate is open."""
    x = _wide(input)
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    centred = x - _mean(mask, x, dims)
    out = centred * torch.rsqrt(_mean(mask, centred.square(), dims) + eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.to(input.dtype)


def gated_rms_norm(
    mask: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return the RMS norm of `input` with the mean square over the entries whose gate is open."""
    x = _wide(input)
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    least = torch.finfo(input.dtype).eps if eps is None else eps
    out = x * torch.rsqrt(_mean(mask, x.square(), dims) + least)
    out = out if weight is None else out * weight
    return out.to(input.dtype)


def gated_group_norm(
    mask: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Return the group norm of `input` with statistics over the channels whose gate is open."""
    x = _wide(input)
    parts = x.reshape(x.shape[0], num_groups, -1, *x.shape[2:])
    gates = mask.reshape(1, num_groups, -1, *[1] * (x.dim() - 2))
    dims = list(range(2, parts.dim()))
    centred = parts - _mean(gates, parts, dims)
    out = centred * torch.rsqrt(_mean(gates, centred.square(), dims) + eps)
    out = out.reshape(x.shape)
    along = (1, -1, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(along)
    out = out if bias is None else out + bias.reshape(along)
    return out.to(input.dtype)
