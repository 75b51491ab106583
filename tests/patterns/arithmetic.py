"""Products and statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, conv, lin, pattern, rand

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


@pattern("a w[0]", zeros=False)
def distances_to_learned_places() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        return m.z(torch.exp(-torch.cdist(m.a(x), m.w)))

    return Net(run, shape=(9, 5), a=lin(5, 6), z=lin(8, 4), w=nn.Parameter(torch.randn(8, 6)))


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


@pattern("a")
def product_of_many_matrices() -> Net:
    """The function looks at its tensors before any operator is called, so the fx dialect pins what reaches it."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x)).flatten(0, 1)
        return m.z(torch.linalg.multi_dot([y, m.v, m.w]))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), v=rand(8, 7), w=rand(7, 6), z=lin(6, 4))


@pattern("a b")
def mapped_over_samples() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.func.vmap(lambda t: torch.tanh(t) * t.mean(0))(m.a(x))
        return m.z(m.b(y))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))
