"""Channels reordered, regrouped, repeated and picked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, conv, lin, pattern, rand

# -- shuffles, in every spelling --------------------------------------------------------------------------------------


@pattern("a")
def shuffle_view_transpose_view() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, c, h, w = x.size()
        x = x.view(b, 3, c // 3, h, w)
        x = torch.transpose(x, 1, 2).contiguous()
        return m.z(x.view(b, -1, h, w))

    return Net(run, a=conv(3, 12, 3), z=conv(12, 7))


@pattern("a")
def shuffle_reshape_permute_reshape() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, c, h, w = x.shape
        return m.z(x.reshape(b, 4, c // 4, h, w).permute(0, 2, 1, 3, 4).reshape(b, c, h, w))

    return Net(run, a=conv(3, 12), z=conv(12, 7))


@pattern("a")
def shuffle_literal_sizes() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x).view(-1, 2, 6, 6, 5).transpose(1, 2).reshape(-1, 12, 6, 5)),
        a=conv(3, 12),
        z=conv(12, 7),
    )


@pattern("a")
def shuffle_unflatten_flatten() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x).unflatten(1, (3, -1)).swapaxes(1, 2).flatten(1, 2)),
        a=conv(3, 12),
        z=conv(12, 7),
    )


@pattern("body.0")
def shuffle_modules() -> Net:
    body = nn.Sequential(conv(3, 12), nn.ChannelShuffle(3))
    return Net(lambda m, x: m.z(m.body(x)), body=body, z=conv(12, 7))


@pattern("a")
def shuffle_unflatten_modules() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.join(m.part(m.a(x)).movedim(1, 2)))

    return Net(
        run, a=conv(3, 12), part=nn.Unflatten(1, (2, 6)), join=nn.Flatten(1, 2), z=conv(12, 7)
    )


@pattern("a")
def shuffle_chunk_stack_flatten() -> Net:
    return Net(
        lambda m, x: m.z(torch.stack(m.a(x).chunk(3, dim=1), dim=2).flatten(1, 2)),
        a=conv(3, 12),
        z=conv(12, 7),
    )


@pattern("a")
def shuffle_split_stack_reshape() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.stack(torch.split(m.a(x), 6, dim=1), dim=1)
        return m.z(y.transpose(2, 1).reshape(y.shape[0], 12, *y.shape[3:]))

    return Net(run, a=conv(3, 12), z=conv(12, 7))


@pattern("a")
def shuffle_strided_slices_cat() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(torch.cat([y[:, 0::2], y[:, 1::2]], dim=1))

    return Net(run, a=conv(3, 12), z=conv(12, 7))


@pattern("a")
def shuffle_index_buffer() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x)[:, m.order]),
        a=conv(3, 12),
        z=conv(12, 7),
        order=torch.arange(12).reshape(3, 4).t().reshape(-1),
    )


@pattern("a")
def biases_of_a_table_by_a_buffer() -> Net:
    """A table of more rows than are read: the positions of attention in windows."""
    order = torch.tensor([11, 3, 0, 0, 7, 5, 2, 4])

    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.a(x) + m.table[m.order].view(2, 4, 6).permute(2, 0, 1).reshape(1, 6, 8, 1))

    return Net(run, shape=(3, 8, 5), a=conv(3, 6), z=conv(6, 4), table=rand(12, 6), order=order)


@pattern("a w")
def scales_of_a_parameter_by_a_buffer() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x) * m.w[m.order]),
        a=conv(3, 8),
        z=conv(8, 4),
        w=rand(12, 1, 1),
        order=torch.tensor([11, 3, 1, 0, 7, 5, 2, 4]),
    )


@pattern("a w")
def scales_on_the_diagonal_of_a_parameter() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x) * torch.diagonal(m.w)[:, None, None]),
        a=conv(3, 8),
        z=conv(8, 4),
        w=rand(8, 8),
    )


@pattern("a b")
def channels_chosen_twice_by_one_buffer() -> Net:
    """Eight of twelve channels, some counted from the end."""

    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.a(x)[:, m.order] + m.b(x)[:, m.order])

    order = torch.tensor([11, 3, -3, 0, 7, -5, 2, 4])
    return Net(run, a=conv(3, 12), b=conv(3, 12), z=conv(8, 7), order=order)


@pattern("", kept="a.weight")
def channels_chosen_by_numbers_that_are_computed_with() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x)[:, m.order] * (m.order.view(1, -1, 1, 1) + x.size(0))),
        a=conv(3, 12),
        z=conv(12, 7),
        order=torch.arange(12).flip(0),
    )


@pattern("a b")
def shuffle_after_grouped_convolution() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x).relu())
        n, c, h, w = y.shape
        return m.z(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    return Net(run, a=conv(3, 8), b=conv(8, 12, 3, groups=2), z=conv(12, 7))


@pattern("a b c")
def shufflenet_unit() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, m.c(m.d(m.b(right).relu())).relu()), dim=1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return m.z(y)

    return Net(
        run, a=conv(3, 12), b=conv(6, 6), d=conv(6, 6, 3, groups=6), c=conv(6, 6), z=conv(12, 7)
    )


@pattern("a")
def shuffle_tokens_last_dim() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x).view(-1, 9, 3, 4).transpose(-1, -2).reshape(-1, 9, 12)),
        shape=(9, 5),
        a=lin(5, 12),
        z=lin(12, 7),
    )


@pattern("a")
def shuffle_three_factors() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).reshape(-1, 2, 3, 4, 6, 5).permute(0, 3, 1, 2, 4, 5)
        return m.z(y.reshape(-1, 24, 6, 5))

    return Net(run, a=conv(3, 24), z=conv(24, 7))


@pattern("a b")
def shuffle_between_two_grouped_convolutions() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = y.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        return m.z(m.b(y))

    return Net(run, shape=(4, 6, 5), a=conv(4, 16, groups=2), b=conv(16, 8, groups=2), z=conv(8, 7))


# -- pixels -----------------------------------------------------------------------------------------------------------


@pattern("a")
def pixel_shuffle() -> Net:
    return Net(lambda m, x: m.z(m.up(m.a(x))), a=conv(3, 20), up=nn.PixelShuffle(2), z=conv(5, 7))


@pattern("a")
def pixel_unshuffle() -> Net:
    return Net(
        lambda m, x: m.z(F.pixel_unshuffle(m.a(x), 2)), shape=(3, 6, 4), a=conv(3, 5), z=conv(20, 7)
    )


@pattern("a")
def pixel_shuffle_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        y = y.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return m.z(y.reshape(b, c // 4, 2 * h, 2 * w))

    return Net(run, a=conv(3, 20), z=conv(5, 7))


@pattern("a")
def space_to_depth_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        y = y.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return m.z(y.reshape(b, 4 * c, h // 2, w // 2))

    return Net(run, shape=(3, 6, 4), a=conv(3, 5), z=conv(20, 7))


@pattern("a")
def focus_stem() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        parts = [y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]]
        return m.z(torch.cat(parts, 1))

    return Net(run, shape=(3, 6, 4), a=conv(3, 5), z=conv(20, 7))


@pattern("a b", zeros=False)
def patch_merging() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).permute(0, 2, 3, 1)
        y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
        return m.z(m.b(m.norm(y)))

    return Net(run, shape=(3, 6, 4), a=conv(3, 5), norm=nn.LayerNorm(20), b=lin(20, 9), z=lin(9, 4))


# -- repeated ---------------------------------------------------------------------------------------------------------


@pattern("a")
def repeat_channels() -> Net:
    return Net(lambda m, x: m.z(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 6), z=conv(12, 7))


@pattern("a")
def tile_channels() -> Net:
    return Net(lambda m, x: m.z(torch.tile(m.a(x), (1, 3, 1, 1))), a=conv(3, 4), z=conv(12, 7))


@pattern("a")
def tile_fewer_dims() -> Net:
    return Net(lambda m, x: m.z(m.a(x).tile((2, 1))), a=conv(3, 4), z=conv(4, 7))


@pattern("a")
def repeat_interleave_channels() -> Net:
    return Net(lambda m, x: m.z(m.a(x).repeat_interleave(2, dim=1)), a=conv(3, 6), z=conv(12, 7))


@pattern("a")
def expand_and_flatten_channels() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x).unsqueeze(1).expand(-1, 3, -1, -1, -1).flatten(1, 2)),
        a=conv(3, 4),
        z=conv(12, 7),
    )


@pattern("a")
def expand_as_gate() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y * m.g(y.mean((2, 3), keepdim=True)).expand_as(y))

    return Net(run, a=conv(3, 6), g=conv(6, 6), z=conv(6, 7))


@pattern("a")
def crelu() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(torch.cat([F.relu(y), F.relu(-y)], 1))

    return Net(run, a=conv(3, 6), z=conv(12, 7))


# -- rolled, flipped, picked ------------------------------------------------------------------------------------------


@pattern("a")
def flip_space() -> Net:
    return Net(lambda m, x: m.z(m.a(x).flip(2, 3)), a=conv(3, 6), z=conv(6, 7))


@pattern("a")
def flip_channels() -> Net:
    return Net(lambda m, x: m.z(torch.flip(m.a(x), dims=[1])), a=conv(3, 6), z=conv(6, 7))


@pattern("a")
def fliplr_and_rot90() -> Net:
    return Net(
        lambda m, x: m.z(torch.rot90(torch.fliplr(m.a(x)), 1, (2, 3))), a=conv(3, 6), z=conv(6, 7)
    )


@pattern("a")
def roll_space() -> Net:
    return Net(
        lambda m, x: m.z(torch.roll(m.a(x), shifts=(-1, 2), dims=(2, 3))),
        a=conv(3, 6),
        z=conv(6, 7),
    )


@pattern("a b")
def roll_channels() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).roll(1, dims=1)), a=conv(3, 6), b=conv(6, 8), z=conv(8, 7)
    )


@pattern("a")
def channel_groups_rolled_apart() -> Net:
    """Shift MLP: pieces of the channels move in space by different amounts."""

    def run(m: Any, x: Tensor) -> Any:
        pieces = torch.chunk(m.a(x), 3, 1)
        return m.z(
            torch.cat([torch.roll(p, s, 2) for p, s in zip(pieces, (-1, 0, 1), strict=True)], 1)
        )

    return Net(run, a=conv(3, 12), z=conv(12, 7))


@pattern("a")
def temporal_shift() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        left = F.pad(y[:, :4], (0, 0, 1, 0))[:, :, :-1]
        right = F.pad(y[:, 4:8], (0, 0, 0, 1))[:, :, 1:]
        return m.z(torch.cat((left, right, y[:, 8:]), dim=1))

    return Net(run, a=conv(3, 12), z=conv(12, 7))


@pattern("a")
def index_select_of_space() -> Net:
    return Net(
        lambda m, x: m.z(torch.index_select(m.a(x), 2, m.rows)),
        a=conv(3, 6),
        z=conv(6, 7),
        rows=torch.tensor([4, 0, 2]),
    )


@pattern("a b.weight")
def index_select_of_channels() -> Net:
    return Net(
        lambda m, x: m.z(torch.index_select(m.b(m.a(x)), 1, m.rows)),
        a=conv(3, 6),
        b=conv(6, 9),
        z=conv(3, 7),
        rows=torch.tensor([4, 0, 2]),
    )


@pattern("a")
def gather_tokens() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        index = m.rows[None, :, None].expand(y.shape[0], -1, y.shape[-1])
        return m.z(torch.gather(y, 1, index))

    return Net(run, shape=(9, 5), a=lin(5, 8), z=lin(8, 4), rows=torch.tensor([4, 0, 2]))


@pattern("a")
def top_tokens_gathered() -> Net:
    """Token pruning: the best tokens by a learned score go on."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        best = m.score(y).squeeze(-1).topk(3, dim=1).indices
        return m.z(y.gather(1, best.unsqueeze(-1).expand(-1, -1, y.size(-1))))

    return Net(run, shape=(9, 5), a=lin(5, 8), score=lin(8, 1), z=lin(8, 4))


@pattern("a")
def take_along_dim_tokens() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        order = m.score(y).argsort(dim=1)
        return m.z(torch.take_along_dim(y, order, dim=1))

    return Net(run, shape=(9, 5), a=lin(5, 8), score=lin(8, 1), z=lin(8, 4))


@pattern("a", kept="b.weight", why="statistic")
def sort_channels() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).sort(dim=1).values), a=conv(3, 6), b=conv(6, 8), z=conv(8, 7)
    )


@pattern("a")
def negative_slices() -> Net:
    return Net(
        lambda m, x: m.z(torch.cat([m.a(x)[:, -4:], m.a(x)[:, :-4]], 1)),
        a=conv(3, 10),
        z=conv(10, 7),
    )


@pattern("a")
def partial_convolution() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        first, rest = torch.split(m.a(x), [4, 8], dim=1)
        return m.z(torch.cat((m.b(first), rest), 1))

    return Net(run, a=conv(3, 12), b=conv(4, 4, 3), z=conv(12, 7))


@pattern("a")
def partial_convolution_written_in_place() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).clone()
        y[:, :4, :, :] = m.b(y[:, :4, :, :])
        return m.z(y)

    return Net(run, a=conv(3, 12), b=conv(4, 4, 3), z=conv(12, 7))


@pattern("a")
def select_scatter_and_index_put() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = torch.slice_scatter(y, m.b(x)[:, :, :2], 2, 0, 2)
        return m.z(torch.select_scatter(y, y[:, :, 0] * 2, 2, 3))

    return Net(run, a=conv(3, 6), b=conv(3, 6), z=conv(6, 7))


@pattern("a")
def meshgrid_of_positions() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        ys = torch.linspace(-1, 1, 6).view(1, 1, 6, 1).expand(y.shape[0], 1, 6, 5)
        xs = torch.linspace(-1, 1, 5).view(1, 1, 1, 5).expand(y.shape[0], 1, 6, 5)
        return m.z(torch.cat([y, ys, xs], dim=1))

    return Net(run, a=conv(3, 6), z=conv(8, 7))


@pattern("a")
def learned_channel_scale_by_index() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x) * m.w[None, :, None, None]), a=conv(3, 6), w=rand(6), z=conv(6, 7)
    )
