"""Normalisations, activations, embeddings, and bare parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, conv, lin, pattern, rand

# -- normalisation and activation -------------------------------------------------------------------------------------


@pattern("a")
def batch_norm_without_weights() -> Net:
    n = nn.BatchNorm2d(6, affine=False)
    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 6), n=n, z=conv(6, 4))


@pattern("a")
def batch_norm_without_statistics() -> Net:
    n = nn.BatchNorm2d(6, track_running_stats=False)
    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 6), n=n, z=conv(6, 4))


@pattern("a")
def batch_norm_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = (y - m.mean[None, :, None, None]) / torch.sqrt(m.var.view(1, -1, 1, 1) + 1e-5)
        return m.z(y * m.w.reshape(1, 6, 1, 1) + m.b.reshape(1, 6, 1, 1))

    return Net(
        run, a=conv(3, 6), mean=torch.rand(6), var=torch.rand(6), w=rand(6), b=rand(6), z=conv(6, 4)
    )


@pattern("a")
def frozen_batch_norm() -> Net:
    from torchvision.ops import FrozenBatchNorm2d

    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 6), n=FrozenBatchNorm2d(6), z=conv(6, 4))


@pattern("a", zeros=False)
def group_norm() -> Net:
    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 12), n=nn.GroupNorm(3, 12), z=conv(12, 4))


@pattern("a", zeros=False)
def group_norm_of_one_group() -> Net:
    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(1, 8), z=conv(8, 4))


@pattern("a")
def group_norm_of_single_channels() -> Net:
    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(8, 8), z=conv(8, 4))


@pattern("")
def group_norm_by_hand() -> Net:
    """Only whole groups can go."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        y = y.view(b, 3, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True) + 1e-5).sqrt()
        return m.z(y.view(b, c, h, w) * m.w)

    return Net(run, a=conv(3, 12), w=rand(1, 12, 1, 1), z=conv(12, 4))


@pattern("a")
def instance_norm() -> Net:
    n = nn.InstanceNorm2d(6, affine=True)
    return Net(lambda m, x: m.z(m.n(m.a(x))), a=conv(3, 6), n=n, z=conv(6, 4))


@pattern("a")
def instance_norm_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        std, mean = torch.std_mean(y, dim=(2, 3), keepdim=True)
        return m.z((y - mean) / (std + 1e-5))

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def adaptive_instance_norm() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y, style = m.a(x), m.b(x)
        y = F.instance_norm(y)
        return m.z(y * style.std((2, 3), keepdim=True) + style.mean((2, 3), keepdim=True))

    return Net(run, a=conv(3, 6), b=conv(3, 6, 3), z=conv(6, 4))


@pattern("a", zeros=False)
def layer_norm_channels_first() -> Net:
    """ConvNeXt: permute, normalise, permute back."""

    def run(m: Any, x: Tensor) -> Any:
        return m.z(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    return Net(run, a=conv(3, 6), n=nn.LayerNorm(6), z=conv(6, 4))


@pattern("a", zeros=False)
def layer_norm_over_everything() -> Net:
    return Net(
        lambda m, x: m.z(F.layer_norm(m.a(x), (6, 6, 5), m.w, m.b)),
        a=conv(3, 6),
        w=rand(6, 6, 5),
        b=rand(6, 6, 5),
        z=conv(6, 4),
    )


@pattern("", zeros=False)
def layer_norm_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        u = y.mean(1, keepdim=True)
        s = (y - u).pow(2).mean(1, keepdim=True)
        y = (y - u) / torch.sqrt(s + 1e-6)
        return m.z(m.w[:, None, None] * y + m.b[:, None, None])

    return Net(run, a=conv(3, 6), w=rand(6), b=rand(6), z=conv(6, 4))


@pattern("a", zeros=False)
def rms_norm() -> Net:
    return Net(
        lambda m, x: m.z(m.n(m.a(x))), shape=(9, 5), a=lin(5, 6), n=nn.RMSNorm(6), z=lin(6, 4)
    )


@pattern("a", zeros=False)
def rms_norm_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(m.w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)))

    return Net(run, shape=(9, 5), a=lin(5, 6), w=rand(6), z=lin(6, 4))


@pattern("a")
def local_response_norm() -> Net:
    return Net(
        lambda m, x: m.z(F.local_response_norm(m.b(m.a(x)), 3)),
        a=conv(3, 6),
        b=conv(6, 8),
        z=conv(8, 4),
    )


@pattern("a")
def l2_normalised_over_channels() -> Net:
    """A norm is a sum of squares: a removed channel adds nothing to it."""
    return Net(
        lambda m, x: m.z(F.normalize(m.b(m.a(x)), dim=1)), a=conv(3, 6), b=conv(6, 8), z=conv(8, 4)
    )


@pattern("a")
def l2_normalised_over_space() -> Net:
    return Net(
        lambda m, x: m.z(F.normalize(m.a(x).flatten(2), dim=-1)),
        a=conv(3, 6),
        z=nn.Conv1d(6, 4, 1),
    )


@pattern("a")
def parametric_relu_per_channel() -> Net:
    return Net(lambda m, x: m.z(m.p(m.a(x))), a=conv(3, 6), p=nn.PReLU(6, init=0.3), z=conv(6, 4))


@pattern("a")
def parametric_relu_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(F.relu(y) - m.slope.view(1, -1, 1, 1) * F.relu(-y))

    return Net(run, a=conv(3, 6), slope=rand(6), z=conv(6, 4))


@pattern("a", zeros=False)
def snake_and_star_activations() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = y + torch.reciprocal(m.alpha) * torch.sin(m.alpha * y).pow(2)
        return m.z(m.s * F.relu(y) ** 2 + m.t)

    return Net(
        run,
        a=conv(3, 6),
        alpha=rand(1, 6, 1, 1),
        s=rand(1),
        t=nn.Parameter(torch.zeros(1)),
        z=conv(6, 4),
    )


@pattern("a")
def rare_activations() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = F.celu(y) + F.rrelu(y) + F.logsigmoid(y) + F.tanhshrink(y) + F.softsign(y)
        y = y + F.hardshrink(y) + F.threshold(y, 0.1, 0.2) + torch.special.expit(y) + F.mish(y)
        return m.z(y + torch.special.erfcx(y.clamp(-1, 1)) + torch.special.entr(y.sigmoid()))

    return Net(run, a=conv(3, 6), z=conv(6, 4))


# -- embeddings and bare parameters -----------------------------------------------------------------------------------


@pattern("a emb.weight[1]", zeros=False)
def embedding_with_positions() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        t = x.shape[1]
        y = m.emb(x) + m.pos(torch.arange(t))[None]
        return m.z(F.relu(m.a(m.n(y))))

    net = Net(
        run,
        emb=nn.Embedding(20, 8),
        pos=nn.Embedding(12, 8),
        n=nn.LayerNorm(8),
        a=lin(8, 10),
        z=lin(10, 4),
    )
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("emb.weight[1]")
def embedding_functional_with_padding() -> Net:
    net = Net(
        lambda m, x: m.z(F.embedding(x, m.emb.weight, padding_idx=0)),
        emb=nn.Embedding(20, 8),
        z=lin(8, 4),
    )
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("table[1]")
def embedding_by_indexing() -> Net:
    net = Net(lambda m, x: m.z(m.table[x]), table=rand(20, 8), z=lin(8, 4))
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("emb.weight[1]", zeros=False)
def embedding_by_one_hot() -> Net:
    net = Net(
        lambda m, x: m.z(F.one_hot(x, 20).float() @ m.emb.weight),
        emb=nn.Embedding(20, 8),
        z=lin(8, 4),
    )
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("emb.weight[1]")
def embedding_bag_sum() -> Net:
    net = Net(lambda m, x: m.z(m.emb(x)), emb=nn.EmbeddingBag(20, 8, mode="sum"), z=lin(8, 4))
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("emb.weight[1]")
def embedding_bag_mean() -> Net:
    net = Net(lambda m, x: m.z(m.emb(x)), emb=nn.EmbeddingBag(20, 8), z=lin(8, 4))
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("a")
def learned_positions_on_a_map() -> Net:
    return Net(lambda m, x: m.z(m.a(x) + m.pos), a=conv(3, 6), pos=rand(1, 6, 6, 5), z=conv(6, 4))


@pattern("a")
def learned_positions_resized() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        pos = m.pos.reshape(1, 3, 3, 6).permute(0, 3, 1, 2)
        pos = F.interpolate(pos, size=(6, 5), mode="bicubic", align_corners=False)
        return m.z(m.a(x) + pos)

    return Net(run, a=conv(3, 6), pos=rand(1, 9, 6), z=conv(6, 4))


@pattern("a row[1] col[1]")
def learned_rows_and_columns() -> Net:
    """DETR: half of the width says the row, half the column."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h, w = y.shape[-2:]
        pos = torch.cat(
            [m.row[:h].unsqueeze(1).repeat(1, w, 1), m.col[:w].unsqueeze(0).repeat(h, 1, 1)], -1
        )
        return m.z(y + pos.permute(2, 0, 1).unsqueeze(0))

    return Net(run, a=conv(3, 8), row=rand(12, 4), col=rand(11, 4), z=conv(8, 4))


@pattern("a")
def sinusoidal_buffer() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x) + m.pos[:, : x.shape[1]]),
        shape=(9, 5),
        a=lin(5, 6),
        pos=torch.randn(1, 16, 6),
        z=lin(6, 4),
    )


@pattern("a", zeros=False)
def class_token_expanded() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.a(x)], dim=1) + m.pos
        return m.z(m.n(y)[:, 0])

    return Net(
        run,
        shape=(9, 5),
        a=lin(5, 6),
        cls=rand(1, 1, 6),
        pos=rand(1, 10, 6),
        n=nn.LayerNorm(6),
        z=lin(6, 4),
    )


@pattern("a w")
def bare_linear() -> Net:
    return Net(
        lambda m, x: m.z(torch.matmul(m.a(x), m.w) + m.b),
        shape=(9, 5),
        a=lin(5, 6),
        w=rand(6, 8),
        b=rand(8),
        z=lin(8, 4),
    )


@pattern("protos[1] b")
def learned_queries_only() -> Net:
    """The network's width comes from a parameter alone."""
    return Net(
        lambda m, x: m.a(x).softmax(1).transpose(1, 2) @ m.z(m.b(m.protos).relu()),
        shape=(9, 5),
        a=lin(5, 9),
        protos=rand(9, 6),
        b=lin(6, 8),
        z=lin(8, 4),
    )
