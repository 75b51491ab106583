"""How layers are wired: shortcuts, concatenations, splits, streams, shared and tied weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, Pair, conv, lin, pattern, rand

# -- shortcuts --------------------------------------------------------------------------------------------------------


@pattern("a b c")
def residual_bottleneck() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = F.relu(m.n(m.a(x)))
        y = m.c(F.relu(m.b(x)))
        y += x
        return m.z(F.relu(y, inplace=True))

    return Net(run, a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 5, 3), c=conv(5, 8), z=conv(8, 7))


@pattern("a b")
def shortcut_padded_with_zeros() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        y = m.b(x)
        return m.z(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)))

    return Net(run, a=conv(3, 6), b=nn.Conv2d(6, 12, 3, 2, 1), z=conv(12, 7))


@pattern("a b")
def shortcut_concatenated_with_zeros() -> Net:
    """Pyramid: the shortcut grows by zeros that a torch.cat brings."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        y = m.b(x)
        zeros = torch.zeros(x.size(0), y.size(1) - x.size(1), x.size(2), x.size(3))
        return m.z(y + torch.cat((x, zeros), 1))

    return Net(run, a=conv(3, 6), b=conv(6, 10), z=conv(10, 7))


@pattern("a b")
def shortcut_by_average_pool() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        return m.z(m.b(x) + m.d(F.avg_pool2d(x, 2)))

    return Net(
        run, shape=(3, 6, 4), a=conv(3, 6), b=nn.Conv2d(6, 9, 2, 2), d=conv(6, 9), z=conv(9, 7)
    )


@pattern("a b c")
def dense_block() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        features = [m.a(x)]
        for part in (m.b, m.c):
            features.append(part(torch.cat(features, 1)).relu())
        return m.z(torch.cat(features, 1))

    return Net(run, a=conv(3, 6), b=conv(6, 4, 3), c=conv(10, 4, 3), z=conv(14, 7))


@pattern("a b c")
def dense_block_with_batch_norm() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        x = torch.cat([x, m.b(F.relu(m.n1(x)))], 1)
        x = torch.cat([x, m.c(F.relu(m.n2(x)))], 1)
        return m.z(m.n3(x))

    return Net(
        run,
        a=conv(3, 6),
        n1=nn.BatchNorm2d(6),
        b=conv(6, 4, 3),
        n2=nn.BatchNorm2d(10),
        c=conv(10, 5, 3),
        n3=nn.BatchNorm2d(15),
        z=conv(15, 7),
    )


@pattern("a b c d")
def dual_path() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        res, dense = m.a(x), m.d(x)
        y = m.c(F.relu(m.b(torch.cat([res, dense], 1))))
        res = res + y[:, :8]
        return m.z(torch.cat([res, dense, y[:, 8:]], dim=1))

    return Net(run, a=conv(3, 8), d=conv(3, 4), b=conv(12, 6), c=conv(6, 11), z=conv(15, 7))


@pattern("a b c")
def cross_stage_partial_chunk() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        left, right = m.a(x).chunk(2, 1)
        right = right + m.c(m.b(right).relu())
        return m.z(torch.cat([left, right], 1))

    return Net(run, a=conv(3, 12), b=conv(6, 4), c=conv(4, 6, 3), z=conv(12, 7))


@pattern("a b c")
def cross_stage_partial_two_convolutions() -> Net:
    return Net(
        lambda m, x: m.z(torch.cat((m.c(m.b(x)), m.a(x)), dim=1)),
        a=conv(3, 6),
        b=conv(3, 8),
        c=conv(8, 5, 3),
        z=conv(11, 7),
    )


@pattern("a b")
def c2f_of_yolo() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = list(m.a(x).chunk(2, 1))
        y.extend(part(y[-1]) for part in (m.b, m.c))
        return m.z(torch.cat(y, 1))

    return Net(run, a=conv(3, 12), b=conv(6, 6, 3), c=conv(6, 6, 3), z=conv(24, 7))


@pattern("a b")
def elan_of_yolo() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        outs = [m.a(x), m.b(x)]
        for part in (m.c, m.d):
            outs.append(part(outs[-1]))
        return m.z(torch.cat(outs[::-1], 1))

    return Net(run, a=conv(3, 6), b=conv(3, 5), c=conv(5, 4, 3), d=conv(4, 8, 3), z=conv(23, 7))


@pattern("a b")
def res2net_scales() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        pieces = torch.split(m.a(x), 4, 1)
        outs, last = [pieces[0]], None
        for piece, part in zip(pieces[1:], (m.b, m.c), strict=True):
            last = part(piece if last is None else piece + last)
            outs.append(last)
        return m.z(torch.cat(outs, 1))

    return Net(run, a=conv(3, 12), b=conv(4, 4, 3), c=conv(4, 4, 3), z=conv(12, 7))


@pattern("a")
def ghost_module() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(torch.cat([y, m.cheap(y)], dim=1)[:, :11])

    return Net(run, a=conv(3, 6), cheap=conv(6, 6, 3, groups=6), z=conv(11, 7))


@pattern("a b c d")
def inception() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return m.z(torch.cat([m.b(x), m.c(m.d(x)), m.e(pooled)], 1))

    return Net(
        run,
        a=conv(3, 6),
        b=conv(6, 4),
        d=conv(6, 5),
        c=conv(5, 8, 3),
        e=conv(6, 3),
        z=conv(15, 7),
    )


@pattern("a b c d")
def atrous_pyramid() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        whole = F.interpolate(
            m.d(F.adaptive_avg_pool2d(x, 1)),
            size=x.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        return m.z(torch.cat([m.b(x), m.c(x), whole], 1))

    return Net(
        run,
        a=conv(3, 6),
        b=conv(6, 4),
        c=conv(6, 5, 3, dilation=2, padding=2),
        d=conv(6, 7),
        z=conv(16, 8),
    )


@pattern("a b c")
def spatial_pyramid_pooling() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.b(m.a(x))
        y = [x] + [F.max_pool2d(x, k, 1, k // 2) for k in (3, 5)]
        x = m.c(torch.cat(y, 1))
        pyramid = [F.adaptive_max_pool2d(x, n).flatten(1) for n in (1, 2)]
        return m.z(torch.cat(pyramid, 1))

    return Net(run, a=conv(3, 6), b=conv(6, 4), c=conv(12, 8), z=lin(40, 7))


@pattern("a b")
def feature_pyramid() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        low = m.a(x)
        high = m.b(low)
        p_high = m.lat_high(high)
        p_low = m.lat_low(low) + F.interpolate(p_high, scale_factor=2, mode="nearest")
        return [m.z(p_high), m.z(p_low)]

    return Net(
        run,
        shape=(3, 8, 6),
        a=conv(3, 6),
        b=nn.Conv2d(6, 10, 2, 2),
        lat_low=conv(6, 9),
        lat_high=conv(10, 9),
        z=conv(9, 4),
    )


@pattern("a b c")
def path_aggregation() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        low = m.a(x)
        high = m.b(low)
        up = torch.cat([F.interpolate(high, size=low.shape[2:]), low], 1)
        low = m.c(up)
        high = torch.cat((m.down(low), high), 1)
        return {"low": m.z(low), "high": m.y(high)}

    return Net(
        run,
        shape=(3, 8, 6),
        a=conv(3, 6),
        b=nn.Conv2d(6, 10, 2, 2),
        c=conv(16, 7),
        down=nn.Conv2d(7, 5, 2, 2),
        z=conv(7, 4),
        y=conv(15, 4),
    )


@pattern("a")
def weighted_fusion() -> Net:
    """BiFPN: maps added with learned positive weights."""

    def run(m: Any, x: Tensor) -> Any:
        w = F.relu(m.w)
        w = w / (w.sum() + 1e-4)
        return m.z(w[0] * m.a(x) + w[1] * m.b(x))

    return Net(run, a=conv(3, 6), b=conv(3, 6, 3), w=rand(2), z=conv(6, 7))


@pattern("a b u")
def u_net_transposed() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        skip = m.a(x).relu()
        y = m.u(m.b(F.max_pool2d(skip, 2)))
        return m.z(torch.cat([skip, y], dim=1))

    return Net(
        run,
        shape=(3, 8, 6),
        a=conv(3, 6),
        b=conv(6, 10, 3),
        u=nn.ConvTranspose2d(10, 5, 2, 2),
        z=conv(11, 7),
    )


@pattern("a b")
def u_net_pixel_shuffle() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        skip = m.a(x)
        y = F.pixel_shuffle(m.b(skip), 2)
        return m.z(torch.cat([skip, y], dim=1))

    return Net(run, shape=(3, 8, 6), a=conv(3, 6), b=nn.Conv2d(6, 20, 2, 2), z=conv(11, 7))


@pattern("a b")
def u_net_cropped_and_padded() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        skip = m.a(x)
        y = F.interpolate(m.b(F.max_pool2d(skip, 2)), scale_factor=2)
        dy, dx = skip.size(2) - y.size(2), skip.size(3) - y.size(3)
        y = F.pad(y, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return m.z(torch.cat([skip, y], 1))

    return Net(run, shape=(3, 7, 5), a=conv(3, 6), b=conv(6, 9, 3), z=conv(15, 7))


@pattern("a b c d")
def two_streams_fused_late() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = m.b(m.a(x)).mean((2, 3)), m.d(m.c(y)).mean(2)
        return m.z(torch.cat([p, q], dim=-1))

    net = Pair(
        run,
        a=conv(3, 6),
        b=conv(6, 8, 3),
        c=nn.Conv1d(4, 5, 1),
        d=nn.Conv1d(5, 7, 3),
        z=lin(15, 4),
    )
    return net.on(torch.randn(1, 3, 6, 5), torch.randn(1, 4, 9))


@pattern("a b")
def two_streams_multiplied() -> Net:
    net = Pair(
        lambda m, x, y: m.z(m.a(x).mean((2, 3)) * torch.tanh(m.b(y))),
        a=conv(3, 6),
        b=lin(5, 6),
        z=lin(6, 4),
    )
    return net.on(torch.randn(1, 3, 6, 5), torch.randn(1, 5))


@pattern("a b")
def two_streams_bilinear_module() -> Net:
    net = Pair(
        lambda m, x, y: m.z(m.join(m.a(x), m.b(y))),
        a=lin(5, 6),
        b=lin(4, 7),
        join=nn.Bilinear(6, 7, 8),
        z=lin(8, 3),
    )
    return net.on(torch.randn(1, 5), torch.randn(1, 4))


@pattern("a b z.weight[1]", zeros=False)
def two_streams_pooled_outer_product() -> Net:
    """Bilinear pooling: what the head reads are pairs of channels."""

    def run(m: Any, x: Tensor) -> Any:
        u, v = (torch.relu(p(x)).flatten(2) for p in (m.a, m.b))
        return m.z(F.normalize((u @ v.transpose(1, 2)).flatten(1)))

    return Net(run, a=conv(3, 8), b=conv(3, 6), z=lin(48, 7))


@pattern("a z.weight[1]")
def one_stream_outer_product() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        u = torch.relu(m.a(x)).flatten(2)
        return m.z(torch.bmm(u, u.mT).reshape(x.shape[0], -1))

    return Net(run, a=conv(3, 6), z=lin(36, 7))


@pattern("a z.weight[1]")
def variances_from_a_diagonal() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        u = torch.relu(m.a(x)).flatten(2)
        return m.z(torch.diagonal(torch.bmm(u, u.mT), dim1=1, dim2=2))

    return Net(run, a=conv(3, 6), z=lin(6, 7))


@pattern("a w[0]")
def scales_on_a_diagonal() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        u = torch.relu(m.a(x)).mean((2, 3))
        return m.z((torch.diag_embed(u) @ m.w).sum(1))

    return Net(run, a=conv(3, 6), z=lin(5, 7), w=nn.Parameter(torch.randn(6, 5)))


@pattern("a b")
def two_streams_outer_product() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        outer = torch.bmm(m.a(x).unsqueeze(2), m.b(y).unsqueeze(1))
        return m.z(outer.flatten(1))

    net = Pair(run, a=lin(5, 6), b=lin(4, 7), z=lin(42, 3))
    return net.on(torch.randn(1, 5), torch.randn(1, 4))


@pattern("a b")
def siamese_difference() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = (m.b(F.relu(m.a(v))).mean((2, 3)) for v in (x, y))
        return m.z(torch.abs(p - q))

    net = Pair(run, a=conv(3, 6), b=conv(6, 8, 3), z=lin(8, 3))
    return net.on(torch.randn(1, 3, 6, 5), torch.randn(1, 3, 6, 5))


@pattern("a")
def siamese_cosine() -> Net:
    """The similarity sums over the embedding, which no weight follows."""

    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = m.b(m.a(x).relu()), m.b(m.a(y).relu())
        return F.cosine_similarity(p, q, dim=1)

    return Pair(run, a=lin(5, 6), b=lin(6, 8)).on(torch.randn(1, 5), torch.randn(1, 5))


@pattern("a b")
def module_called_twice() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.b(m.a(x)).relu())), a=conv(3, 6), b=conv(6, 6, 3), z=conv(6, 7)
    )


@pattern("emb.weight[1] mid")
def tied_embedding_and_head() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        return F.linear(m.back(F.gelu(m.mid(m.emb(x)))), m.emb.weight)

    net = Net(run, emb=nn.Embedding(20, 8), mid=lin(8, 11), back=lin(11, 8))
    net.on(torch.randint(0, 20, (1, 9)))
    return net


@pattern("a")
def tied_autoencoder() -> Net:
    """The decoder uses the encoder's weight, transposed."""
    return Net(lambda m, x: F.linear(torch.relu(m.a(x)), m.a.weight.t()), shape=(9, 5), a=lin(5, 8))


@pattern("a b")
def one_parameter_in_two_modules() -> Net:
    b, c = conv(6, 6, 3), conv(6, 6, 3)
    c.weight = b.weight
    return Net(lambda m, x: m.z(m.c(m.b(m.a(x)).relu())), a=conv(3, 6), b=b, c=c, z=conv(6, 7))


@pattern("a b")
def recurrent_depth() -> Net:
    """A block unrolled in a Python loop over shared weights."""

    def run(m: Any, x: Tensor) -> Any:
        state = x = m.a(x)
        for _ in range(3):
            state = torch.tanh(m.b(state) + x)
        return m.z(state)

    return Net(run, shape=(9, 5), a=lin(5, 8), b=lin(8, 8), z=lin(8, 3))


@pattern("a.weight b.weight")
def heads_in_a_dictionary() -> Net:
    heads = nn.ModuleDict({"one": conv(8, 2), "two": conv(8, 3)})

    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return {name: head(y) for name, head in m.heads.items()}

    return Net(run, a=conv(3, 6), b=conv(6, 8, 3), heads=heads)


@pattern("a b")
def auxiliary_outputs() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        y = m.b(x)
        return m.z(y), (m.y(x), {"mean": y.flatten(2).mean(2).sum(1)})

    return Net(run, a=conv(3, 6), b=conv(6, 8, 3), z=conv(8, 2), y=conv(6, 3))


@pattern("a b")
def stochastic_depth_in_training_only() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        if m.training:
            return x
        return m.z(x + m.b(x))

    return Net(run, a=conv(3, 6), b=conv(6, 6, 3), z=conv(6, 7))


@pattern("a b")
def reversible_coupling() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        p, q = m.a(x).chunk(2, dim=1)
        p = p + m.b(q)
        q = q + m.c(p)
        return m.z(torch.cat([p, q], dim=1))

    return Net(run, a=conv(3, 12), b=conv(6, 6), c=conv(6, 6), z=conv(12, 7))


@pattern("a s t")
def affine_coupling_of_flows() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        p, q = m.a(x).chunk(2, dim=1)
        q = q * torch.exp(torch.tanh(m.s(p))) + m.t(p)
        return m.z(torch.cat([q, p], dim=1))

    return Net(run, shape=(5,), a=lin(5, 12), s=lin(6, 6), t=lin(6, 6), z=lin(12, 7))


@pattern("experts.0.0 experts.0.2 experts.2.0")
def mixture_of_experts_soft() -> Net:
    """Every expert runs, the router weights what they say."""
    experts = nn.ModuleList([nn.Sequential(lin(5, 8), nn.GELU(), lin(8, 6)) for _ in range(3)])

    def run(m: Any, x: Tensor) -> Any:
        weights = m.router(x).softmax(-1)
        outs = torch.stack([e(x) for e in m.experts], dim=-1)
        return m.z((outs * weights.unsqueeze(-2)).sum(-1))

    return Net(run, shape=(9, 5), experts=experts, router=lin(5, 3), z=lin(6, 4))


@pattern("w1[2] w2[1] w2[2]")
def mixture_of_experts_batched() -> Net:
    """Experts' weights as one parameter (expert, in, out), contracted by einsum."""

    def run(m: Any, x: Tensor) -> Any:
        h = F.gelu(torch.einsum("btd,edh->beth", x, m.w1))
        y = torch.einsum("beth,ehd->betd", h, m.w2)
        return m.z((y * m.router(x).softmax(-1).permute(0, 2, 1).unsqueeze(-1)).sum(1))

    return Net(run, shape=(9, 5), w1=rand(3, 5, 8), w2=rand(3, 8, 6), router=lin(5, 3), z=lin(6, 4))
