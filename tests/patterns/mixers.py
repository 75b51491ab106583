"""Linear, cross, spatial and pooled attention, attention modules of torch, state spaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.attention import D, T, attends, join, split
from tests.patterns.base import Net, Pair, conv, lin, pattern, rand


@pattern("a o")
def attention_cross_covariance() -> Net:
    """XCiT: channels attend to channels."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = (p(x).unflatten(-1, (2, 4)).permute(0, 2, 3, 1) for p in (m.q, m.k, m.v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = ((q @ k.transpose(-2, -1)) * m.scale).softmax(-1) @ v
        return m.z(m.o(y.permute(0, 3, 1, 2).flatten(2)))

    return attends(run, scale=rand(2, 1, 1))


@pattern("a q k v o", zeros=False)
def attention_linear() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = F.elu(split(m.q(x))) + 1, F.elu(split(m.k(x))) + 1, split(m.v(x))
        state = torch.einsum("bhnd,bhne->bhde", k, v)
        norm = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2)) + 1e-3)
        return m.z(m.o(join(torch.einsum("bhnd,bhde,bhn->bhne", q, state, norm))))

    return attends(run)


@pattern("a v o")
def attention_efficient_softmaxes() -> Net:
    """Queries are normalised over channels, keys over positions."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)).softmax(-1), split(m.k(x)).softmax(-2), split(m.v(x))
        return m.z(m.o(join(q @ (k.transpose(-2, -1) @ v))))

    return attends(run)


@pattern("a b q k v o")
def attention_across_two_inputs() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        x, y = m.a(x), m.b(y)
        q, k, v = split(m.q(x)), split(m.k(y)), split(m.v(y))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    net = Pair(
        run,
        a=lin(5, 6),
        b=lin(4, 7),
        q=lin(6, 8),
        k=lin(7, 8),
        v=lin(7, 8),
        o=lin(8, 10),
        z=lin(10, 3),
    )
    return net.on(torch.randn(1, 9, 5), torch.randn(1, 11, 4))


@pattern("a k v o")
def attention_of_learned_queries() -> Net:
    """Perceiver, Q-Former, pooling by attention: the queries are a parameter."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q = m.q(m.latents).expand(x.shape[0], -1, -1)
        y = F.scaled_dot_product_attention(split(q), split(m.k(x)), split(m.v(x)))
        return m.z(m.o(join(y)))

    return attends(run, latents=rand(1, 3, 6))


@pattern("a q k v o")
def attention_of_class_token_only() -> Net:
    """CaiT: the class token alone asks."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        u = torch.cat([m.cls.expand(y.shape[0], -1, -1), y], dim=1)
        q, k, v = split(m.q(u[:, 0:1])), split(m.k(u)), split(m.v(u))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v)))[:, 0])

    return attends(run, cls=rand(1, 1, 6))


@pattern("a q kv o r", zeros=False)
def attention_spatial_reduction() -> Net:
    """PVT: keys and values of a map made smaller by a strided convolution."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        tokens = y.flatten(2).transpose(1, 2)
        q = split(m.q(tokens))
        small = m.n(
            m.r(tokens.permute(0, 2, 1).reshape(b, c, h, w)).reshape(b, c, -1).permute(0, 2, 1)
        )
        k, v = m.kv(small).reshape(b, -1, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    return Net(
        run,
        shape=(3, 6, 4),
        a=conv(3, 5),
        q=lin(5, 8),
        r=nn.Conv2d(5, 5, 2, 2),
        n=nn.LayerNorm(5),
        kv=lin(5, 16),
        o=lin(8, 7),
        z=lin(7, 3),
    )


@pattern("a qkv o")
def attention_in_shifted_windows() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x.permute(0, 2, 3, 1))
        b, h, w, c = x.shape
        s = torch.roll(x, (-1, -1), dims=(1, 2)).view(b, h // 2, 2, w // 2, 2, c)
        s = s.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)
        q, k, v = m.qkv(s).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = m.o(join(F.scaled_dot_product_attention(q, k, v)))
        y = y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        return m.z(torch.roll(y, (1, 1), dims=(1, 2)))

    return Net(run, shape=(3, 6, 4), a=lin(3, 6), qkv=lin(6, 24), o=lin(8, 7), z=lin(7, 3))


@pattern("a q k v o")
def attention_over_two_axes() -> Net:
    """Axial: rows, then columns, of the same projections."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).permute(0, 2, 3, 1)
        q, k, v = m.q(y), m.k(y), m.v(y)
        rows = F.scaled_dot_product_attention(q, k, v)
        columns = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in (q, k, v)))
        return m.z(m.o(rows + columns.transpose(1, 2)))

    return Net(run, a=conv(3, 6), q=lin(6, 8), k=lin(6, 8), v=lin(6, 9), o=lin(9, 7), z=lin(7, 3))


@pattern("a q k v o")
def attention_non_local_block() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b = y.size(0)
        q, k, v = (p(y).view(b, p.out_channels, -1) for p in (m.q, m.k, m.v))
        weights = F.softmax(torch.matmul(q.permute(0, 2, 1), k), dim=-1)
        u = torch.matmul(weights, v.permute(0, 2, 1)).permute(0, 2, 1).contiguous()
        return m.z(y + m.o(u.view(b, -1, *y.size()[2:])))

    return Net(
        run, a=conv(3, 6), q=conv(6, 4), k=conv(6, 4), v=conv(6, 5), o=conv(5, 6), z=conv(6, 3)
    )


@pattern("a", kept="q.weight", why="statistic")
def attention_double_channels() -> Net:
    """DANet's channel branch: a softmax over channels, so those stay."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b = y.shape[0]
        q = m.q(y).view(b, 6, -1)
        weights = torch.softmax(torch.bmm(q, q.permute(0, 2, 1)), dim=-1)
        return m.z(torch.bmm(m.v(y).view(b, 7, -1).transpose(1, 2)[:, :, :6], weights))

    return Net(run, a=conv(3, 8), q=conv(8, 6), v=conv(8, 7), z=lin(6, 3))


@pattern("a")
def multihead_attention_module() -> Net:
    return Net(
        lambda m, x: m.z(m.attn(*[m.a(x)] * 3, need_weights=False)[0]),
        shape=(T, D),
        a=lin(D, 6),
        attn=nn.MultiheadAttention(6, 2, batch_first=True),
        z=lin(6, 3),
    )


@pattern("a b")
def multihead_attention_module_cross_with_weights() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        y = m.b(y)
        out, weights = m.attn(m.a(x), y, y)
        return m.z(out), weights.mean(-1)

    net = Pair(
        run,
        a=lin(5, 6),
        b=lin(4, 7),
        attn=nn.MultiheadAttention(6, 2, kdim=7, vdim=7, batch_first=True),
        z=lin(6, 3),
    )
    return net.on(torch.randn(1, 9, 5), torch.randn(1, 11, 4))


@pattern("a")
def multihead_attention_module_sequence_first() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).transpose(0, 1)
        return m.z(m.attn(y, y, y)[0].transpose(0, 1))

    return Net(run, shape=(T, D), a=lin(D, 6), attn=nn.MultiheadAttention(6, 3), z=lin(6, 3))


@pattern("a body.layers.0.linear1 body.layers.1.self_attn.in_proj_weight", zeros=False)
def transformer_encoder_module() -> Net:
    layer = nn.TransformerEncoderLayer(6, 2, 11, batch_first=True, norm_first=True)
    return Net(
        lambda m, x: m.z(m.body(m.a(x)).mean(1)),
        shape=(T, D),
        a=lin(D, 6),
        body=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        z=lin(6, 3),
    )


@pattern("a b body.linear1", zeros=False)
def transformer_decoder_layer_module() -> Net:
    net = Pair(
        lambda m, x, y: m.z(m.body(m.a(x), m.b(y))),
        a=lin(5, 6),
        b=lin(4, 6),
        body=nn.TransformerDecoderLayer(6, 2, 11, batch_first=True),
        z=lin(6, 3),
    )
    return net.on(torch.randn(1, 9, 5), torch.randn(1, 11, 4))


@pattern("a w")
def attention_pooling_by_scores() -> Net:
    """One learned vector scores the positions."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        weights = torch.softmax(torch.tanh(y) @ m.w, dim=1)
        return m.z((y * weights.unsqueeze(-1)).sum(1))

    return Net(run, shape=(T, D), a=lin(D, 6), w=rand(6), z=lin(6, 3))


@pattern("a q k")
def contrastive_similarities() -> Net:
    """CLIP's end: two embeddings are compared by a matrix product, which sums over their width."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.scale.exp() * (m.q(y) @ m.k(y).transpose(1, 2))

    return attends(run, scale=nn.Parameter(torch.tensor(0.5)))


@pattern("a dt b o")
def selective_scan() -> Net:
    """A state space, a step at a time: every channel has states of its own."""

    def run(m: Any, x: Tensor) -> Any:
        u = F.silu(m.a(x))
        step = F.softplus(m.dt(u))
        ins, outs = m.b(u).split([4, 4], dim=-1)
        decay = torch.exp(step.unsqueeze(-1) * -torch.exp(m.log_a))
        state = torch.zeros(u.shape[0], u.shape[2], 4)
        ys = []
        for t in range(T):
            state = decay[:, t] * state + (step[:, t] * u[:, t]).unsqueeze(-1) * ins[
                :, t
            ].unsqueeze(1)
            ys.append(torch.einsum("bdn,bn->bd", state, outs[:, t]))
        return m.z(m.o(torch.stack(ys, dim=1) + u * m.skip))

    return Net(
        run,
        shape=(T, D),
        a=lin(D, 6),
        dt=lin(6, 6),
        b=lin(6, 8),
        log_a=rand(6, 4),
        skip=rand(6),
        o=lin(6, 7),
        z=lin(7, 3),
    )


@pattern("a m.in_proj_weight")
def attention_with_rows_of_its_own() -> Net:
    """Learned and empty keys beside those of the sequence."""

    def run(m: Any, x: Tensor) -> Any:
        q = m.a(x)
        return m.z(q + m.m(q, q, q, need_weights=False)[0])

    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    return Net(run, shape=(6, 5), a=lin(5, 8), m=attention, z=lin(8, 4))
