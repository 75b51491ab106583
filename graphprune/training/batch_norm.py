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

_aten = torch.ops.aten

_LANES = 16
"""Values that a processor takes at a time."""
_FEW_CHANNELS = 20
"""Below that, torch's kernel is slow where channels fill no register."""
_FEW_CHANNELS_OF_THREADS = 256
"""The same where several threads share the work."""


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

    With images in channels_last on a CPU, torch's kernel is slow for 11 channels, as cut networks have: pixels fill
    no register, and threads write into each other's cache lines. There this one calls it on wide pixels: 16 of 11
    channels are taken for one of 176.

    Shapes:
        x: [batch, channels, height, width].
    """
    is_for_us = (
        not torch.compiler.is_compiling()  # a compiler writes its own
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() == 4
        and x.shape[1] < _few_channels()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and _pixels(x) > 1
        and weight is not None
        and bias is not None
        and weight.dtype == torch.float32
    )
    if not is_for_us:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    out, mean, var = _Wide.apply(x, weight, bias, eps)
    _update(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    normalised: Tensor = out
    return normalised


def _few_channels() -> int:
    # Not to be asked for by a compiler, whose graph would end there.
    return _FEW_CHANNELS if torch.get_num_threads() == 1 else _FEW_CHANNELS_OF_THREADS


class _Wide(torch.autograd.Function):
    """Batch norm by torch's kernels on wide pixels; what belongs to one channel is put together from its places."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        pixels = _pixels(x)
        wide = _widened(x, pixels)
        one = weight.new_ones(wide.shape[1])
        _, means, inverses = _aten.native_batch_norm(wide, one, one, None, None, True, 0.0, 0.0)
        variances = inverses.pow(-2).masked_fill_(inverses == 0, 0.0)  # 0: no variance at all
        places = means.view(pixels, -1)
        mean = places.mean(0)
        var = (variances.view(pixels, -1) + (places - mean).square()).mean(0)
        inverse = torch.rsqrt(var + eps)
        out = _scaled(wide, inverse * weight, mean, bias)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, var)
        return _narrowed(out, x), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        pixels = _pixels(x)
        wide = _widened(x, pixels)
        grads = _widened(grad.contiguous(memory_format=torch.channels_last), pixels)
        count = x.numel() // x.shape[1]
        scale = weight * inverse
        # As in evaluation: grad * scale, and the sums of grad * (x - mean) and of grad.
        of_x, products, sums = _aten.native_batch_norm_backward(
            *(grads, wide, scale.repeat(pixels), mean.repeat(pixels)),
            *(weight.new_ones(wide.shape[1]), None, None, False, 0.0, [True, True, True]),
        )
        of_weight = products.view(pixels, -1).sum(0) * inverse
        of_bias = sums.view(pixels, -1).sum(0)
        # weight * inverse * (grad - of_bias / count - normalised * of_weight / count), in two parts
        of_x += _scaled(wide, -scale * inverse * of_weight / count, mean, -scale * of_bias / count)
        return _narrowed(of_x, x), of_weight, of_bias, None


def _scaled(wide: Tensor, scale: Tensor, mean: Tensor, bias: Tensor) -> Tensor:
    """Return scale * (wide - mean) + bias, each given once for a channel."""
    pixels = wide.shape[1] // len(scale)
    one = scale.new_ones(wide.shape[1])
    vectors = (scale.repeat(pixels), bias.repeat(pixels), mean.repeat(pixels), one)
    scaled: Tensor = _aten.native_batch_norm(wide, *vectors, False, 0.0, 0.0)[0]
    return scaled


def _pixels(x: Tensor) -> int:
    """Return how many pixels of images together fill registers, if there are as many."""
    batch, channels, height, width = x.shape
    return gcd(_LANES // gcd(channels, _LANES), batch * height * width)


def _widened(x: Tensor, pixels: int) -> Tensor:
    """Return images in channels_last as one, of the same pixels one after the other, several taken for one."""
    return x.permute(0, 2, 3, 1).reshape(1, -1, 1, pixels * x.shape[1]).permute(0, 3, 1, 2)


def _narrowed(wide: Tensor, like: Tensor) -> Tensor:
    """Undo `_widened`; the result is no view, so that an activation may write into it."""
    return wide.new_empty(0).set_(wide.untyped_storage(), 0, like.shape, like.stride())


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
