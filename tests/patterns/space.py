"""Transforms of space: resampling, pooling, padding, Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, conv, lin, pattern, rand


@pattern("a b")
def fourier_mixing_over_tokens() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.b(torch.fft.fft(m.a(x), dim=1).real))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a w")
def global_filter() -> Net:
    """GFNet: a learned complex filter in the frequency domain, one for every channel."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        f = torch.fft.rfft2(y, dim=(2, 3), norm="ortho") * torch.view_as_complex(m.w)
        return m.z(torch.fft.irfft2(f, s=(6, 5), dim=(2, 3), norm="ortho"))

    return Net(run, a=conv(3, 6), w=rand(6, 6, 3, 2), z=conv(6, 4))


@pattern("a")
def unfold_and_fold() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = F.unfold(m.a(x), 3, padding=1)
        y = F.fold(torch.tanh(y), (6, 5), 3, padding=1)
        return m.z(y)

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def unfold_then_linear() -> Net:
    return Net(
        lambda m, x: m.z(F.unfold(m.a(x), 2, stride=2).transpose(1, 2)),
        shape=(3, 6, 4),
        a=conv(3, 6),
        z=lin(24, 4),
    )


@pattern("a")
def unfold_of_tensor() -> Net:
    """Overlapping windows by Tensor.unfold, flattened with the channels outside."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).unfold(2, 2, 2).unfold(3, 2, 2)
        return m.z(y.permute(0, 2, 3, 1, 4, 5).flatten(3))

    return Net(run, shape=(3, 6, 4), a=conv(3, 6), z=lin(24, 4))


@pattern("a")
def windows_by_strides() -> Net:
    """Overlapping patches of a feature map, with strides written as numbers."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).as_strided((x.shape[0], 6, 4, 3, 3, 3), (180, 30, 5, 1, 5, 1))
        return m.z(y.amax((4, 5)))

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def windows_of_tokens_by_strides() -> Net:
    """Longformer's chunks: each overlaps the next by half, and the strides are computed."""

    def run(m: Any, x: Tensor) -> Any:
        y = torch.tanh(m.a(x))
        b, tokens, width = y.stride()
        chunks = y.as_strided((y.shape[0], 3, 4, y.shape[2]), (b, 2 * tokens, tokens, width))
        return m.z(chunks).sum(2)

    return Net(run, shape=(8, 5), a=lin(5, 6), z=lin(6, 4))


@pattern("a")
def windows_from_a_later_row() -> Net:
    """Channels go last, and the first row is left out."""

    def run(m: Any, x: Tensor) -> Any:
        y = torch.as_strided(m.a(x), (x.shape[0], 5, 5, 6), (180, 5, 1, 30), 5)
        return m.z(y)

    return Net(run, a=conv(3, 6), z=lin(6, 4))


@pattern("", kept="a", why="read by strides")
def every_second_channel_by_strides() -> Net:
    """The strides step over channels, so none may go."""

    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.a(x).as_strided((x.shape[0], 3, 6, 5), (180, 60, 5, 1)))

    return Net(run, a=conv(3, 6), z=conv(3, 4))


@pattern("", kept="a", why="read by strides")
def rows_across_channels_by_strides() -> Net:
    """Windows run from the end of one channel into the next."""

    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.a(x).as_strided((x.shape[0], 5, 7, 5), (180, 30, 5, 1)))

    return Net(run, a=conv(3, 6), z=conv(5, 4))


@pattern("", kept="a", why="a part or a transposition")
def a_transposed_tensor_by_strides() -> Net:
    """The strides undo the transposition, and say nothing of its dimensions."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).transpose(1, 2)
        return m.z(y.as_strided((x.shape[0], 8, 6), (48, 1, 8)))

    return Net(run, shape=(8, 5), a=lin(5, 6), z=lin(6, 4))


@pattern("", kept="a", why="a part or a transposition")
def a_part_of_a_tensor_by_strides() -> Net:
    """What is left out of the part counts, too: the strides go through its memory."""

    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.a(x)[:, :, 2:].as_strided((x.shape[0], 8, 4), (48, 6, 1)))

    return Net(run, shape=(8, 5), a=lin(5, 6), z=lin(4, 4))


@pattern("a")
def involution() -> Net:
    """A kernel for every position, shared within groups of channels."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        kernel = m.k(m.r(y)).view(b, 2, 1, 9, h, w)
        patches = F.unfold(y, 3, padding=1).view(b, 2, c // 2, 9, h, w)
        return m.z((kernel * patches).sum(3).view(b, c, h, w))

    return Net(run, a=conv(3, 8), r=conv(8, 4), k=conv(4, 18), z=conv(8, 5))


@pattern("a flow.0")
def warped_by_a_learned_grid() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        grid = torch.tanh(m.flow(y)).permute(0, 2, 3, 1)
        return m.z(F.grid_sample(y, grid, align_corners=False))

    return Net(
        run, a=conv(3, 6), flow=nn.Sequential(conv(6, 8), nn.ReLU(), conv(8, 2)), z=conv(6, 4)
    )


@pattern("a")
def spatial_transformer() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        grid = F.affine_grid(
            m.t(y.mean((2, 3))).view(-1, 2, 3), [y.shape[0], 6, 6, 5], align_corners=False
        )
        return m.z(F.grid_sample(y, grid, align_corners=False))

    return Net(run, a=conv(3, 6), t=lin(6, 6), z=conv(6, 4))


@pattern("a")
def upsampled_in_every_way() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        size = (7, 9)
        parts = [
            F.interpolate(y, size, mode=mode) for mode in ("nearest", "bilinear", "bicubic", "area")
        ]
        return m.z(sum(parts) + m.up(y)[:, :, :7, :9])

    return Net(run, a=conv(3, 6), up=nn.UpsamplingNearest2d(scale_factor=2), z=conv(6, 4))


@pattern("a")
def pooled_in_every_way() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        parts = [
            F.max_pool2d(y, 2),
            F.avg_pool2d(y, 2, ceil_mode=False, count_include_pad=False),
            F.lp_pool2d(y.abs() + 0.1, 2, 2),
            F.adaptive_max_pool2d(y, (3, 2)),
            F.adaptive_avg_pool2d(y, (3, None))[..., :2],
        ]
        return m.z(torch.stack(parts).sum(0))

    return Net(run, shape=(3, 6, 4), a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def pooled_with_indices_and_unpooled() -> Net:
    """SegNet."""

    def run(m: Any, x: Tensor) -> Any:
        y, where = F.max_pool2d(m.a(x), 2, 2, return_indices=True)
        return m.z(F.max_unpool2d(y, where, [2, 2], [2, 2]))

    return Net(run, shape=(3, 6, 4), a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def differences_and_crops() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        dx, dy = torch.diff(y, dim=3)[:, :, 1:], y[..., 1:, 1:] - y[..., :-1, 1:]
        return m.z(dx + dy + torch.roll(y, 1, -1)[:, :, 1:, 1:])

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a b")
def haar_wavelet() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        even, odd = y[:, :, 0::2], y[:, :, 1::2]
        return m.z(m.b(torch.cat([even + odd, even - odd], dim=1)))

    return Net(run, a=conv(3, 6), b=conv(12, 8), z=conv(8, 4))
