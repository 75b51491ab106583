"""Products, statistics, selections, transforms, writes in place, sizes and control flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, Pair, conv, lin, pattern, rand

# -- products ---------------------------------------------------------------------------------------------------------


@pattern("a w[1]")
def addmm_of_parameters() -> Net:
    return Net(
        lambda m, x: m.z(torch.addmm(m.b, m.a(x), m.w)),
        shape=(5,),
        a=lin(5, 6),
        w=rand(6, 8),
        b=rand(8),
        z=lin(8, 4),
    )


@pattern("a b")
def einsum_of_a_weight() -> Net:
    return Net(
        lambda m, x: m.z(torch.einsum("bchw,oc->bohw", m.a(x), m.b)),
        a=conv(3, 6),
        b=rand(8, 6),
        z=conv(8, 4),
    )


@pattern("a b")
def einsum_with_ellipsis() -> Net:
    return Net(
        lambda m, x: m.z(torch.einsum("...c,oc->...o", m.a(x), m.b)),
        shape=(9, 5),
        a=lin(5, 6),
        b=rand(8, 6),
        z=lin(8, 4),
    )


@pattern("a b")
def einsum_gram_of_two() -> Net:
    return Net(
        lambda m, x: torch.einsum("bchw,bdhw->bcd", m.z(m.a(x)), m.y(m.b(x))),
        a=conv(3, 6),
        b=conv(3, 8),
        z=conv(6, 4),
        y=conv(8, 5),
    )


@pattern("a w[1]")
def tensordot_of_a_parameter() -> Net:
    return Net(
        lambda m, x: m.z(torch.tensordot(m.a(x), m.w, dims=([-1], [0]))),
        shape=(9, 5),
        a=lin(5, 6),
        w=rand(6, 8),
        z=lin(8, 4),
    )


@pattern("a b")
def matmul_weight_first() -> Net:
    """The weight stands on the left, channels are rows."""
    return Net(
        lambda m, x: m.z(m.b @ m.a(x)),
        shape=(3, 9),
        a=nn.Conv1d(3, 6, 1),
        b=rand(8, 6),
        z=nn.Conv1d(8, 4, 1),
    )


@pattern("a")
def inner_product_with_prototypes() -> Net:
    return Net(
        lambda m, x: torch.inner(m.b(m.a(x)), m.w),
        shape=(9, 5),
        a=lin(5, 6),
        b=lin(6, 8),
        w=rand(4, 8),
    )


@pattern("a")
def distances_to_prototypes() -> Net:
    """A sum of squared differences: what is removed from both adds nothing."""
    return Net(
        lambda m, x: ((m.b(m.a(x)).unsqueeze(2) - m.w) ** 2).sum(-1),
        shape=(9, 5),
        a=lin(5, 6),
        b=lin(6, 8),
        w=rand(4, 8),
    )


@pattern("a")
def distances_by_cdist() -> Net:
    return Net(
        lambda m, x: torch.cdist(m.b(m.a(x)), m.w),
        shape=(9, 5),
        a=lin(5, 6),
        b=lin(6, 8),
        w=rand(1, 4, 8),
    )


@pattern("a b")
def factorisation_machine() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        v = m.b(m.a(x))
        return m.z(0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a")
def pairwise_dot_interactions() -> Net:
    """DLRM: products of all pairs of vectors, the lower triangle of them."""

    def run(m: Any, x: Tensor) -> Any:
        v = m.b(m.a(x))
        dots = torch.bmm(v, v.transpose(1, 2))
        return m.z(dots[:, m.i, m.j])

    i, j = torch.tril_indices(9, 9, -1)
    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), i=i, j=j, z=lin(36, 4))


@pattern("a b")
def graph_convolution_with_adjacency() -> Net:
    return Net(
        lambda m, x: m.z(torch.matmul(m.adj, m.b(torch.relu(m.adj @ m.a(x))))),
        shape=(9, 5),
        a=lin(5, 6),
        b=lin(6, 8),
        adj=torch.rand(9, 9),
        z=lin(8, 4),
    )


@pattern("b.0")
def dynamic_filters() -> Net:
    """A hypernetwork: one layer makes the weights of another."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        w = m.b(y.mean(1)).view(-1, 6, 4)
        return torch.bmm(y, w)

    return Net(run, shape=(9, 5), a=lin(5, 6), b=nn.Sequential(lin(6, 7), nn.ReLU(), lin(7, 24)))


@pattern("a")
def cross_layer_of_recommenders() -> Net:
    """DCN: x0 * (w . x) + b + x."""

    def run(m: Any, x: Tensor) -> Any:
        first = y = m.a(x)
        for i in range(2):
            y = first * (y @ m.w[i].unsqueeze(-1)) + m.b[i] + y
        return m.z(y)

    return Net(run, shape=(5,), a=lin(5, 6), w=rand(2, 6), b=rand(2, 6), z=lin(6, 4))


# -- statistics -------------------------------------------------------------------------------------------------------


@pattern("a", zeros=False)
def sum_over_channels() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).relu().sum(1, keepdim=True)),
        a=conv(3, 6),
        b=conv(6, 8),
        z=conv(1, 4),
    )


@pattern("a b")
def mean_over_channels() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).mean(1, True)), a=conv(3, 6), b=conv(6, 8), z=conv(1, 4)
    )


@pattern("a", kept="b.weight", why="statistic")
def deviation_over_channels() -> Net:
    return Net(
        lambda m, x: m.z(
            torch.std(m.b(m.a(x)), dim=1, keepdim=True) + m.b(m.a(x)).var(1, keepdim=True)
        ),
        a=conv(3, 6),
        b=conv(6, 8),
        z=conv(1, 4),
    )


@pattern("a", kept="b.weight", why="statistic")
def softmax_over_channels() -> Net:
    return Net(
        lambda m, x: m.z(torch.softmax(m.b(m.a(x)), 1)), a=conv(3, 6), b=conv(6, 8), z=conv(8, 4)
    )


@pattern("a", kept="b.weight", why="statistic")
def cumulative_sum_over_channels() -> Net:
    return Net(lambda m, x: m.z(m.b(m.a(x)).cumsum(1)), a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a b")
def cumulative_statistics_over_positions() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return m.z(y.cumsum(2) + y.cummax(3).values + y.cumprod(dim=2) + torch.logcumsumexp(y, 3))

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a")
def statistics_pooled_over_space() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        high, low = torch.aminmax(y.flatten(2), dim=2)
        parts = [
            y.mean((2, 3)),
            y.std((2, 3)),
            y.amax((2, 3)),
            high,
            low,
            y.flatten(2).median(2).values,
        ]
        return m.z(torch.cat(parts, dim=1))

    return Net(run, a=conv(3, 6), z=lin(36, 4))


@pattern("a")
def generalised_mean_pool() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).clamp(min=1e-2).pow(m.p)
        return m.z(F.avg_pool2d(y, (y.size(-2), y.size(-1))).pow(1.0 / m.p).flatten(1))

    return Net(run, a=conv(3, 6), p=nn.Parameter(torch.ones(1) * 3), z=lin(6, 4))


@pattern("a", kept="b.weight", why="statistic")
def winner_takes_all_over_channels() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return m.z(y * F.one_hot(y.argmax(-1), 8).to(y.dtype))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a", kept="b.weight", why="statistic")
def top_channels_only() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        least = torch.topk(y, 3, dim=-1).values[..., -1:]
        return m.z(torch.where(y >= least, y, torch.zeros_like(y)))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a b")
def quantised_straight_through() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return m.z(y + (torch.round(y * 8) / 8 - y).detach())

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a b")
def masked_by_comparison() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        y = y.masked_fill(y.abs() < 0.05, 0.0)
        return m.z(torch.where(y > 0, y, torch.full_like(y, 0.1)) + (y > 0.2).float())

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


# -- transforms of space ----------------------------------------------------------------------------------------------


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


# -- writes -----------------------------------------------------------------------------------------------------------


@pattern("a b")
def written_into_an_empty_tensor() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        out = x.new_empty(x.shape[0], 14, 6, 5)
        out[:, :6] = m.a(x)
        out[:, 6:] = m.b(x)
        return m.z(out)

    return Net(run, a=conv(3, 6), b=conv(3, 8), z=conv(14, 4))


@pattern("a")
def written_row_by_row() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        out = torch.zeros_like(y)
        for i in range(6):
            out[:, :, i] = y[:, :, 5 - i] * (i + 1)
        return m.z(out)

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def accumulated_in_place() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        out = y.new_zeros(y.shape)
        out += y
        out[:, :, 1:].add_(y[:, :, :-1], alpha=0.5)
        out.mul_(2).clamp_(-3, 3)
        return m.z(out)

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a b")
def tokens_put_where_a_mask_is() -> Net:
    """Masked autoencoders: a learned token where nothing is known."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        w = m.mask.view(1, 9, 1).type_as(y)
        return m.z(m.b(y * (1 - w) + m.token.expand(y.shape[0], 9, -1) * w))

    return Net(
        run,
        shape=(9, 5),
        a=lin(5, 6),
        token=rand(1, 1, 6),
        mask=torch.rand(9) > 0.5,
        b=lin(6, 8),
        z=lin(8, 4),
    )


@pattern("a b")
def tokens_written_by_index() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = y.index_add(1, m.rows, m.b(y)[:, :3], alpha=0.5)
        y = y.index_copy(1, m.rows, y[:, 3:6] * 2)
        return m.z(y.index_fill(1, m.rows[:1], 0.3))

    return Net(
        run, shape=(9, 5), a=lin(5, 6), b=lin(6, 6), rows=torch.tensor([4, 0, 2]), z=lin(6, 4)
    )


@pattern("a b")
def messages_scattered_over_a_graph() -> Net:
    """Message passing over a fixed edge list."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        messages = m.b(y[:, m.source])
        out = torch.zeros(y.shape[0], 9, 8).index_add(1, m.target, messages)
        return m.z(out)

    edges = torch.randint(0, 9, (2, 14))
    return Net(
        run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), source=edges[0], target=edges[1], z=lin(8, 4)
    )


@pattern("a b")
def messages_scattered_with_expanded_index() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        messages = m.b(m.a(x)[:, m.source])
        index = m.target.view(1, -1, 1).expand_as(messages)
        out = messages.new_zeros(messages.shape[0], 9, messages.shape[2])
        return m.z(out.scatter_add(1, index, messages))

    edges = torch.randint(0, 9, (2, 14))
    return Net(
        run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), source=edges[0], target=edges[1], z=lin(8, 4)
    )


@pattern("a")
def vector_quantised_codes() -> Net:
    """The nearest code of a table takes the place of what was computed."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        d = (y.unsqueeze(2) - m.codes).pow(2).sum(-1)
        q = F.embedding(d.argmin(-1), m.codes)
        return m.z(y + (q - y).detach())

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), codes=rand(11, 8), z=lin(8, 4))


# -- sizes and control flow -------------------------------------------------------------------------------------------


@pattern("a b")
def sizes_computed_from_shapes() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        b, c, h, w = y.shape
        y = y.view(b, -1, h * w) if h * w > 1 else y
        y = y.reshape(y.shape[0], y.shape[1], h, w)
        return m.z(y.view(*y.shape[:2], -1).mean(-1).reshape(-1, c))

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=lin(8, 4))


@pattern("a b")
def branch_on_sizes() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        if y.shape[1] != 8:
            y = m.b(y)
        pad = (-y.shape[2]) % 4
        if pad > 0:
            y = F.pad(y, (0, 0, 0, pad))
        assert y.dim() == 4
        return m.z(y)

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a b")
def scale_by_width() -> Net:
    """A factor computed from a channel count keeps its value."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = y * (y.shape[-1] ** -0.5)
        y = m.b(y)
        return m.z(y / y.size(2))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a b")
def flattened_into_linear() -> Net:
    return Net(
        lambda m, x: m.z(m.b(torch.flatten(F.max_pool2d(m.a(x).relu(), 2), 1))),
        shape=(3, 6, 4),
        a=conv(3, 6),
        b=lin(36, 8),
        z=lin(8, 4),
    )


@pattern("a b")
def flattened_channels_last() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x).permute(0, 2, 3, 1).reshape(x.size(0), -1))),
        shape=(3, 3, 2),
        a=conv(3, 6),
        b=lin(36, 8),
        z=lin(8, 4),
    )


@pattern("a b", zeros=False)
def casts_and_devices() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x.to(m.a.weight.dtype)).double().float()
        return m.z(m.b(y.to(memory_format=torch.channels_last)).contiguous().type(x.dtype))

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a b")
def time_distributed() -> Net:
    """Video: frames are folded into the batch and back."""

    def run(m: Any, x: Tensor) -> Any:
        b, t, c, h, w = x.shape
        y = m.b(m.a(x.view(b * t, c, h, w)).relu())
        return m.z(y.view(b, t, *y.shape[1:]).mean(1))

    return Net(run, shape=(4, 3, 6, 5), a=conv(3, 6), b=conv(6, 8), z=conv(8, 5))


@pattern("a b")
def temporal_shift_module() -> Net:
    """TSM: a part of the channels moves by one frame."""

    def run(m: Any, x: Tensor) -> Any:
        b, t, c, h, w = x.shape
        y = m.a(x.reshape(-1, c, h, w))
        y = y.view(b, t, 8, h, w)
        out = torch.zeros_like(y)
        out[:, :-1, :2] = y[:, 1:, :2]
        out[:, 1:, 2:4] = y[:, :-1, 2:4]
        out[:, :, 4:] = y[:, :, 4:]
        return m.z(m.b(out.view(b * t, 8, h, w)).view(b, t, -1).mean(1))

    return Net(run, shape=(4, 3, 6, 5), a=conv(3, 8), b=conv(8, 7), z=lin(210, 5))


@pattern("a b")
def capsules() -> Net:
    """Vectors of channels, squashed by their own length."""

    def run(m: Any, x: Tensor) -> Any:
        u = m.b(m.a(x)).view(x.size(0), 4, 3, -1)
        square = (u**2).sum(2, keepdim=True)
        return m.z((u * square / (1 + square) / (square + 1e-6).sqrt()).flatten(1, 2))

    return Net(run, a=conv(3, 6), b=conv(6, 12), z=nn.Conv1d(12, 5, 1))


@pattern("a mu logvar")
def variational_bottleneck() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        mu, logvar = m.mu(y), m.logvar(y).clamp(-4, 4)
        return m.z(mu + torch.exp(0.5 * logvar) * m.noise), -0.5 * (
            1 + logvar - mu**2 - logvar.exp()
        ).sum(1)

    return Net(
        run,
        shape=(5,),
        a=lin(5, 6),
        mu=lin(6, 8),
        logvar=lin(6, 8),
        noise=torch.randn(1, 8),
        z=lin(8, 4),
    )


@pattern("a")
def soft_argmax_of_heatmaps() -> Net:
    """Key points: every output channel is a heat map, whose expectation is read."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.z(m.a(x)).flatten(2).softmax(-1).view(x.shape[0], 4, 6, 5)
        return torch.stack([(y.sum(2) * m.xs).sum(-1), (y.sum(3) * m.ys).sum(-1)], -1)

    return Net(
        run, a=conv(3, 6), xs=torch.linspace(0, 1, 5), ys=torch.linspace(0, 1, 6), z=conv(6, 4)
    )


@pattern("a b")
def correlation_of_two_images() -> Net:
    """RAFT's volume: features are summed over, so they go together."""

    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = (m.b(m.a(v)).flatten(2) for v in (x, y))
        return torch.matmul(p.transpose(1, 2), q).view(-1, 6, 5, 30) / 8**0.5

    return Pair(run, a=conv(3, 6), b=conv(6, 8)).on(
        torch.randn(1, 3, 6, 5), torch.randn(1, 3, 6, 5)
    )


@pattern("a b")
def cost_volume_by_shifts() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = m.b(m.a(x)), m.b(m.a(y))
        return torch.stack([(p * torch.roll(q, s, 3)).sum(1) for s in range(3)], 1)

    return Pair(run, a=conv(3, 6), b=conv(6, 8)).on(
        torch.randn(1, 3, 6, 5), torch.randn(1, 3, 6, 5)
    )


@pattern("a b")
def text_convolution() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.emb(x).transpose(1, 2)
        pooled = [F.max_pool1d(F.relu(c(y)), c(y).shape[2]).squeeze(2) for c in (m.a, m.b)]
        return m.z(torch.cat(pooled, 1))

    net = Net(
        run, emb=nn.Embedding(20, 7), a=nn.Conv1d(7, 6, 2), b=nn.Conv1d(7, 8, 3), z=lin(14, 4)
    )
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("a b")
def deep_set_masked_mean() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(F.relu(m.a(x)))
        mask = (x.abs().sum(-1, keepdim=True) > 0.5).to(y.dtype)
        return m.z((y * mask).sum(1) / mask.sum(1).clamp(min=1))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a b")
def point_cloud_maximum() -> Net:
    """PointNet: the global feature goes back to every point."""

    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.n(m.a(x)))
        g = torch.max(m.b(y), 2, keepdim=True)[0]
        return m.z(torch.cat([y, g.view(-1, 8, 1).repeat(1, 1, 9)], 1))

    return Net(
        run,
        shape=(3, 9),
        a=nn.Conv1d(3, 6, 1),
        n=nn.BatchNorm1d(6),
        b=nn.Conv1d(6, 8, 1),
        z=nn.Conv1d(14, 4, 1),
    )
