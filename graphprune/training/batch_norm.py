"""Batch norms in training, where torch's own fall short: over several processes, and over few channels on a CPU.

Each takes what a training batch norm takes, updates the running statistics in place, and gives what torch gives.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["DEFAULT_MOMENTUM", "TrainedBatchNorm", "batch_norm", "synchronised_batch_norm"]

DEFAULT_MOMENTUM = 0.1
"""What torch.export writes as 0.0 was ``momentum=None``, a cumulative average whose count it dropped."""

_LANES = 16
"""Values that a processor takes at a time."""
_MANY_CHANNELS = 40
"""From here on, torch's kernel is as fast with an odd number of channels."""


class TrainedBatchNorm(nn.Module):
    """A batch norm's own parameters and buffers, with statistics as another function takes them."""

    def __init__(self, layer: _BatchNorm, normalise: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch, and count it."""
        layer = self.layer
        momentum = layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(layer.num_batches_tracked)
        return self.normalise(
            x,
            layer.running_mean,
            layer.running_var,
            weight=layer.weight,
            bias=layer.bias,
            momentum=DEFAULT_MOMENTUM if momentum is None else momentum,
            eps=layer.eps,
        )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = DEFAULT_MOMENTUM,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise `x` by its mean and variance; update the running ones in place.

    With images in channels_last on a CPU, torch's kernel takes two to three times the time for 11 channels that it
    takes for 16; cut networks have such numbers. There this one treats several pixels as one row of many channels.

    Shapes:
        x: [batch, channels, height, width].
    """
    is_for_us = (
        not torch.compiler.is_compiling()  # a compiler writes its own
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == 4
        and x.shape[1] % 8 != 0
        and x.shape[1] < _MANY_CHANNELS
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and weight is not None
        and bias is not None
    )
    if not is_for_us:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    out, mean, var = _Pixelwise.apply(x, weight, bias, eps)
    _update(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    normalised: Tensor = out
    return normalised


class _Pixelwise(torch.autograd.Function):
    """Batch norm over rows of several pixels, so that a row fills the processor's registers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        rows, pixels = _rows(x)
        count = x.numel() // channels
        mean = rows.mean(0).view(pixels, channels).mean(0)
        image = torch.empty_like(x)  # no view of anything: an activation may write into it
        out = torch.sub(rows, mean.repeat(pixels), out=_rows(image)[0])
        var = out.square().sum(0).view(pixels, channels).sum(0) / count
        inverse = torch.rsqrt(var + eps)
        out.mul_((inverse * weight).repeat(pixels)).add_(bias.repeat(pixels))
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, var)
        return image, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        channels = x.shape[1]
        rows, pixels = _rows(x)
        grads = _rows(grad.contiguous(memory_format=torch.channels_last))[0]
        count = x.numel() // channels
        of_bias = grads.sum(0).view(pixels, channels).sum(0)
        centred = (rows - mean.repeat(pixels)).mul_(grads)
        of_weight = centred.sum(0).view(pixels, channels).sum(0) * inverse
        # weight * inverse * (grad - of_bias / count - normalised * of_weight / count), in two sweeps
        scale = weight * inverse
        slope = -scale * inverse * of_weight / count
        offset = -scale * of_bias / count - slope * mean
        image = torch.empty_like(x)
        of_x = _rows(image)[0]
        torch.addcmul(offset.repeat(pixels), rows, slope.repeat(pixels), out=of_x)
        of_x.addcmul_(grads, scale.repeat(pixels))
        return image, of_weight, of_bias, None


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return images in channels_last as a matrix whose rows are several pixels each, and how many."""
    batch, channels, height, width = x.shape
    total = batch * height * width
    pixels = gcd(_LANES // gcd(channels, _LANES), total)
    return x.permute(0, 2, 3, 1).view(total // pixels, pixels * channels), pixels


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
    momentum: float = DEFAULT_MOMENTUM,
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
    _update(running_mean, running_var, mean, var, count, momentum)
    out = centred * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        out = out * weight.view(per_channel)
    if bias is not None:
        out = out + bias.view(per_channel)
    return out.to(x.dtype)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Move the running statistics towards those of the batch; the variance is the unbiased one."""
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / max(1, count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
