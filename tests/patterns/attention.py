"""Attention: how heads are split, how scores are made, what attends to what."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, Pair, conv, lin, pattern, rand

T, D = 9, 5
"""Tokens and their width, of every network's input."""


def attends(run: Any, *, heads: int = 2, size: int = 4, **parts: Any) -> Net:
    """Return a network with an embedding of 6, projections to `heads` times `size`, and a head."""
    inner = heads * size
    made = {name: lin(6, inner) for name in ("q", "k", "v")}
    return Net(
        run, shape=(T, D), a=lin(D, 6), **{**made, "o": lin(inner, 7), "z": lin(7, 3), **parts}
    )


def split(x: Tensor, heads: int = 2) -> Tensor:
    b, t, c = x.shape
    return x.view(b, t, heads, c // heads).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    b, h, t, d = x.shape
    return x.transpose(1, 2).reshape(b, t, h * d)


@pattern("a q k v o")
def attention_view_transpose() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5)
        return m.z(m.o(join(scores.softmax(dim=-1) @ v)))

    return attends(run)


@pattern("a q k v o")
def attention_single_head() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        scores = torch.bmm(m.q(x), m.k(x).transpose(1, 2)) / math.sqrt(8)
        return m.z(m.o(torch.bmm(F.softmax(scores, dim=2), m.v(x))))

    return attends(run)


@pattern("a qkv o")
def attention_fused_reshape_permute() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, n, _ = x.shape
        qkv = m.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = ((q * 4**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return m.z(m.o(y.transpose(1, 2).reshape(b, n, -1)))

    return attends(run, qkv=lin(6, 24))


@pattern("a qkv o")
def attention_fused_chunk_sdpa() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = (split(p) for p in m.qkv(x).chunk(3, dim=-1))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v, is_causal=True))))

    return attends(run, qkv=lin(6, 24))


@pattern("a qkv o")
def attention_fused_split_of_grouped_queries() -> Net:
    """One projection makes four query heads and one key and value head for every two of them."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = m.qkv(x).split([16, 8, 8], dim=-1)
        q, k, v = split(q, 4), split(k, 2), split(v, 2)
        k, v = (p.repeat_interleave(2, dim=1) for p in (k, v))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    return attends(run, qkv=lin(6, 32), o=lin(16, 7))


@pattern("a q k v o")
def attention_grouped_queries_enable_gqa() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x), 4), split(m.k(x)), split(m.v(x))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))))

    return attends(run, q=lin(6, 16), o=lin(16, 7))


@pattern("a q k v o", zeros=False)
def attention_grouped_queries_expanded() -> Net:
    def repeat_kv(x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        return x[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, h * 2, t, d)

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x), 4), repeat_kv(split(m.k(x))), repeat_kv(split(m.v(x)))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(4) + m.mask[:, :, :T, :T]
        return m.z(m.o(join(F.softmax(scores, dim=-1, dtype=torch.float32) @ v)))

    mask = torch.full((1, 1, 12, 12), float("-inf")).triu(1)
    return attends(run, q=lin(6, 16), o=lin(16, 7), mask=mask)


@pattern("a q k v o")
def attention_multi_query() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    return attends(run, k=lin(6, 4), v=lin(6, 4))


@pattern("a q k v o")
def attention_einsum() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = (p(x).unflatten(-1, (2, 4)) for p in (m.q, m.k, m.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return m.z(m.o(y.flatten(2)))

    return attends(run)


@pattern("a wq wk wv wo")
def attention_einsum_of_head_parameters() -> Net:
    """Projections as parameters (width, heads, head dimension), in the manner of JAX."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in (m.wq, m.wk, m.wv))
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", scores, v)
        return m.z(torch.einsum("bthd,hdc->btc", y, m.wo))

    weights: dict[str, Any] = {
        n: nn.Parameter(torch.randn(6, 2, 4) / 3) for n in ("wq", "wk", "wv")
    }
    return attends(run, **weights, wo=nn.Parameter(torch.randn(2, 4, 7) / 3))


@pattern("a q k v o")
def attention_batched_heads_bmm() -> Net:
    """Fairseq: heads are folded into the batch."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, t, _ = x.shape

        def fold(y: Tensor) -> Tensor:
            return y.view(b, t, 2, 4).transpose(1, 2).reshape(b * 2, t, 4)

        q, k, v = fold(m.q(x) * 0.5), fold(m.k(x)), fold(m.v(x))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return m.z(m.o(y.view(b, 2, t, 4).transpose(1, 2).reshape(b, t, 8)))

    return attends(run)


@pattern("a q k v o")
def attention_baddbmm_with_bias() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = m.q(x), m.k(x), m.v(x)
        scores = torch.baddbmm(m.bias.expand(x.shape[0], -1, -1), q, k.mT, beta=1, alpha=0.3)
        return m.z(m.o(scores.softmax(-1).bmm(v)))

    return attends(run, bias=rand(1, T, T))


@pattern("a q k v o")
def attention_masked_fill() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(m.mask[None, None, :T, :T] == 0, -1e4)
        return m.z(m.o(join(torch.matmul(torch.softmax(scores, dim=-1), v))))

    return attends(run, mask=torch.tril(torch.ones(12, 12)))


@pattern("a q k v o")
def attention_mask_made_in_forward() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))))

    return attends(run)


@pattern("a q k v o")
def attention_relative_position_bias() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        bias = m.table[m.index.view(-1)].view(T, T, -1).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) * 0.5 + bias.unsqueeze(0)
        return m.z(m.o(join(scores.softmax(-1) @ v)))

    index = torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1
    return attends(run, table=rand(2 * T - 1, 2), index=index)


@pattern("a q k v o")
def attention_relative_embedding_bias() -> Net:
    """T5: an embedding of buckets, one column for every head."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        position = torch.arange(T)
        buckets = (position[None, :] - position[:, None]).clamp(-3, 3) + 3
        bias = m.table(buckets).permute([2, 0, 1]).unsqueeze(0)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        return m.z(m.o(join((q @ k.transpose(3, 2) + bias).softmax(-1) @ v)))

    return attends(run, table=nn.Embedding(7, 2))


@pattern("a q k v o")
def attention_alibi() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
        bias = m.slopes.view(-1, 1, 1) * distance[None]
        return m.z(m.o(join((q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v)))

    return attends(run, slopes=torch.tensor([0.5, 0.25]))


@pattern("a q k v o")
def attention_rotary_half() -> Net:
    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        angles = torch.outer(torch.arange(T).float(), m.freq)
        angles = torch.cat((angles, angles), dim=-1)
        q, k = (p * angles.cos() + rotate(p) * angles.sin() for p in (q, k))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    return attends(run, freq=torch.tensor([1.0, 0.1]))


@pattern("a q k v o")
def attention_rotary_half_of_buffers() -> Net:
    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        cos, sin = m.cos[:T], m.sin[:T]
        q, k = (p * cos + rotate(p) * sin for p in (q, k))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    angles = torch.rand(12, 2).repeat(1, 2)
    return attends(run, cos=angles.cos(), sin=angles.sin())


@pattern("a q k v o")
def attention_rotary_pairs() -> Net:
    def rotate(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        q, k = (p * m.cos + rotate(p) * m.sin for p in (q, k))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    angles = torch.rand(T, 2).repeat_interleave(2, 1)
    return attends(run, cos=angles.cos(), sin=angles.sin())


@pattern("a v o")
def attention_rotary_complex() -> Net:
    """Llama as first released: pairs become complex numbers."""

    def rotate(x: Tensor, turn: Tensor) -> Tensor:
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * turn).flatten(3).type_as(x)

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        turn = torch.complex(m.cos, m.sin)
        return m.z(m.o(join(F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v))))

    angles = torch.rand(T, 2)
    return attends(run, cos=angles.cos(), sin=angles.sin())


@pattern("a q k v o", zeros=False)
def attention_query_key_norm() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = m.qn(split(m.q(x))), m.kn(split(m.k(x))), split(m.v(x))
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    return attends(run, qn=nn.LayerNorm(4), kn=nn.RMSNorm(4))


@pattern("a v o")
def attention_cosine() -> Net:
    """Swin V2: cosines with a learned temperature for every head."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(m.scale, max=math.log(100.0)).exp()
        return m.z(m.o(join(scores.softmax(-1) @ v)))

    return attends(run, scale=rand(2, 1, 1))


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
