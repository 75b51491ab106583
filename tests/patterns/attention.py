"""Attention over heads of queries, keys and values: fused, grouped, masked, with positions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, lin, pattern, rand

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
def attention_grouped_queries_of_keys_that_are_scaled_apart() -> Net:
    """Each of the copies of a key has a factor of its own, so none of them stands for another."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, t, _ = x.shape
        k, v = split(m.k(x)), split(m.v(x))
        k, v = (p[:, :, None].expand(b, 2, 3, t, 4) for p in (k, v))
        k = (k * m.w.view(1, 1, 3, 1, 1)).reshape(b, 6, t, 4)
        y = F.scaled_dot_product_attention(split(m.q(x), 6), k, v.reshape(b, 6, t, 4))
        return m.z(m.o(join(y)))

    return attends(run, q=lin(6, 24), o=lin(24, 7), w=nn.Parameter(torch.rand(3) + 0.5))


@pattern("a q p k v o")
def attention_of_two_sets_of_queries_to_the_same_copies() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, t, _ = x.shape
        k, v = (split(p)[:, :, None].expand(b, 2, 3, t, 4) for p in (m.k(x), m.v(x)))
        first, second = (
            F.scaled_dot_product_attention(
                split(q, 6), k.reshape(b, 6, t, 4), v.reshape(b, 6, t, 4)
            )
            for q in (m.q(x), m.p(x))
        )
        return m.z(m.o(torch.cat([join(first), join(second)], -1)))

    return attends(run, q=lin(6, 24), p=lin(6, 24), o=lin(48, 7))


@pattern("a q k v o")
def attention_multi_query() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        q, k, v = split(m.q(x)), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)
        return m.z(m.o(join(F.scaled_dot_product_attention(q, k, v))))

    return attends(run, k=lin(6, 4), v=lin(6, 4))


@pattern("a q k v o")
def attention_multi_query_einsum() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, t, _ = x.shape
        q = m.q(x).view(b, t, 2, 4)
        weights = torch.einsum("bqhd,bkd->bhqk", q, m.k(x)).softmax(-1)
        return m.z(m.o(torch.einsum("bhqk,bkd->bqhd", weights, m.v(x)).reshape(b, t, 8)))

    return attends(run, k=lin(6, 4), v=lin(6, 4))


@pattern("a q k v o")
def attention_queries_viewed_beside_their_keys() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        b, t, _ = x.shape
        q = m.q(x).view(b, t, 2, 3, 4).permute(0, 2, 3, 1, 4)
        k, v = (p(x).view(b, t, 2, 1, 4).permute(0, 2, 3, 1, 4) for p in (m.k, m.v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return m.z(m.o(y.permute(0, 3, 1, 2, 4).reshape(b, t, -1)))

    return attends(run, q=lin(6, 24), o=lin(24, 7))


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
