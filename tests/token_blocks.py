"""Blocks of random token networks: everything works on (length, width), see `tests.blocks`."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.blocks import Block, Maker, Run, Shape, width

__all__ = ["TOKEN_BLOCKS"]

TOKEN_BLOCKS: dict[str, Maker] = {}


def token(maker: Maker) -> Maker:
    TOKEN_BLOCKS[maker.__name__] = maker
    return maker


@token
def norm(shape: Shape, rng: Random) -> nn.Module | None:
    d = shape[1]
    made: list[nn.Module] = [
        nn.LayerNorm(d),
        nn.LayerNorm(d, elementwise_affine=False),
        nn.RMSNorm(d),
        Block(lambda m, x: m.n(x.transpose(1, 2)).transpose(1, 2), n=nn.BatchNorm1d(d)),
        Block(lambda m, x: m.n(x.flatten(0, 1)).view(-1, *shape), n=nn.BatchNorm1d(d)),
        Block(lambda m, x: m.n(x.reshape(-1, d)).reshape(x.shape), n=nn.BatchNorm1d(d)),
        Block(lambda m, x: F.layer_norm(x, x.shape[-1:])),
        Block(lambda m, x: F.layer_norm(x, (d,), m.w), w=nn.Parameter(torch.rand(d))),
        nn.LayerNorm(shape),
    ]
    return rng.choice(made)


@token
def mlp(shape: Shape, rng: Random) -> nn.Module | None:
    d, hidden = shape[1], rng.randint(5, 11)
    inner = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))
    return Block(lambda m, x: x + m.inner(x), inner=inner)


@token
def change_width(shape: Shape, rng: Random) -> nn.Module | None:
    return nn.Linear(shape[1], width(rng, shape[1]), bias=rng.random() < 0.5)


@token
def gated_mlp(shape: Shape, rng: Random) -> nn.Module | None:
    d, hidden = shape[1], rng.randint(4, 9)
    up, down = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)
    kind = rng.choice(["chunk", "glu", "split", "unflatten", "slices"])

    def run(m: Any, x: Tensor) -> Any:
        y = m.up(x)
        if kind == "glu":
            return x + m.down(F.glu(y, dim=-1))
        if kind == "unflatten":
            return x + m.down(y.unflatten(-1, (hidden, 2)).prod(-1))
        if kind == "slices":
            return x + m.down(torch.tanh(y[..., :hidden]) * y[..., hidden:])
        a, b = y.chunk(2, dim=-1) if kind == "chunk" else torch.split(y, hidden, dim=2)
        return x + m.down(F.silu(a) * b)

    return Block(run, up=up, down=down)


@token
def attention(shape: Shape, rng: Random) -> nn.Module | None:
    d, heads, head_dim = shape[1], rng.randint(1, 3), rng.randint(2, 4)
    inner, length = heads * head_dim, shape[0]
    qkv, out = nn.Linear(d, 3 * inner, bias=rng.random() < 0.5), nn.Linear(inner, d)
    split = rng.choice(["reshape", "chunk", "interleaved", "slices"])
    product = rng.choice(["sdpa", "causal", "manual", "computed", "biased"])
    join = rng.choice(["flatten", "literal", "inferred"])
    bias = nn.Parameter(torch.randn(heads, length, length))

    def run(m: Any, x: Tensor) -> Any:
        b, t = x.shape[0], x.shape[1]
        y = m.qkv(x)
        if split == "reshape":
            q, k, v = y.reshape(b, t, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif split == "interleaved":
            z = y.view(b, t, heads, 3, head_dim).permute(3, 0, 2, 1, 4)
            q, k, v = z[0], z[1], z[2]
        else:
            parts = (
                y.chunk(3, -1)
                if split == "chunk"
                else (y[..., :inner], y[..., inner : 2 * inner], y[..., -inner:])
            )
            q, k, v = (p.view(b, t, heads, head_dim).transpose(1, 2) for p in parts)
        if product == "sdpa":
            z = F.scaled_dot_product_attention(q, k, v)
        elif product == "causal":
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif product == "biased":
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)
        else:
            factor = head_dim**-0.5 if product == "manual" else 1 / math.sqrt(q.size(-1))
            z = torch.softmax((q * factor) @ k.transpose(-2, -1) + m.bias, dim=-1) @ v
        z = z.transpose(1, 2)
        if join == "flatten":
            return x + m.out(z.flatten(2))
        return x + m.out(z.reshape(b, t, inner if join == "literal" else -1))

    return Block(run, qkv=qkv, out=out, bias=bias)


@token
def grouped_attention(shape: Shape, rng: Random) -> nn.Module | None:
    d, kv_heads, times, head_dim = shape[1], rng.randint(1, 2), 2, rng.randint(2, 4)
    heads, value_dim = kv_heads * times, rng.randint(2, 5)
    parts = {
        "q": nn.Linear(d, heads * head_dim),
        "k": nn.Linear(d, kv_heads * head_dim),
        "v": nn.Linear(d, kv_heads * value_dim),
        "out": nn.Linear(heads * value_dim, d),
        "q_norm": nn.LayerNorm(head_dim) if rng.random() < 0.5 else nn.Identity(),
    }
    kind = rng.choice(["repeat_interleave", "expand", "separate"])

    def spread(x: Tensor) -> Tensor:
        if kind == "repeat_interleave":
            return x.repeat_interleave(times, dim=1)
        return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)

    def run(m: Any, x: Tensor) -> Any:
        b, t, _ = x.shape
        q = m.q_norm(m.q(x).view(b, t, heads, head_dim)).transpose(1, 2)
        k = m.k(x).view(b, t, kv_heads, head_dim).transpose(1, 2)
        v = m.v(x).view(b, t, kv_heads, value_dim).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, spread(k), spread(v))
        return m.out(z.transpose(1, 2).flatten(2)) + x

    return Block(run, **parts)


class _Own(nn.Module):
    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return x + y


@token
def multihead(shape: Shape, rng: Random) -> nn.Module | None:
    heads = [h for h in (1, 2, 3, 4) if shape[1] % h == 0]
    return _Own(nn.MultiheadAttention(shape[1], rng.choice(heads), batch_first=True))


@token
def mix_tokens(shape: Shape, rng: Random) -> nn.Module | None:
    inner = nn.Sequential(nn.Linear(shape[0], 7), nn.GELU(), nn.Linear(7, shape[0]))
    return Block(lambda m, x: x + m.inner(x.transpose(1, 2)).transpose(1, 2), inner=inner)


@token
def gate_tokens(shape: Shape, rng: Random) -> nn.Module | None:
    if shape[1] % 2:
        return None
    parts = {"n": nn.LayerNorm(shape[1] // 2), "mix": nn.Conv1d(shape[0], shape[0], 1)}

    def run(m: Any, x: Tensor) -> Any:
        u, v = x.chunk(2, -1)
        return torch.cat([u * m.mix(m.n(v)), v], -1)

    return Block(run, **parts)


@token
def convolve(shape: Shape, rng: Random) -> nn.Module | None:
    d = shape[1]
    outs, groups = (d, d) if rng.random() < 0.5 else (width(rng, d), 1)
    part = nn.Conv1d(d, outs, 3, padding=1, groups=groups)
    return Block(lambda m, x: m.part(x.transpose(1, 2)).transpose(1, 2), part=part)


@token
def parameter(shape: Shape, rng: Random) -> nn.Module | None:
    t, d = shape
    sizes = rng.choice([[1, t, d], [d], [1, 1, d], [t, 1], [t, d]])
    runs: list[Run] = [lambda m, x: x + m.weight, lambda m, x: x * m.weight]
    return Block(rng.choice(runs), weight=nn.Parameter(torch.rand(sizes) + 0.5))


@token
def class_token(shape: Shape, rng: Random) -> nn.Module | None:
    kind = rng.choice(["expand", "repeat"])

    def run(m: Any, x: Tensor) -> Any:
        b = x.shape[0]
        first = m.weight.expand(b, -1, -1) if kind == "expand" else m.weight.repeat(b, 1, 1)
        return torch.cat([first, x], dim=1)

    return Block(run, weight=nn.Parameter(torch.randn(1, 1, shape[1])))


@token
def some_tokens(shape: Shape, rng: Random) -> nn.Module | None:
    if shape[0] < 4:
        return None
    runs: list[Run] = [
        lambda m, x: x[:, 1:],
        lambda m, x: x[:, ::2],
        lambda m, x: x.roll(1, dims=1),
        lambda m, x: torch.cat([x[:, 0::2][:, :1], x[:, 1::2][:, :1]], -1) if shape[1] < 9 else x,
        lambda m, x: x - 0.5 * x.mean(1, keepdim=True),
        lambda m, x: x.sum(1, keepdim=True) + x,
        lambda m, x: x.amax(1, keepdim=True) * x,
    ]
    return Block(rng.choice(runs))
