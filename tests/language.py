"""A small decoder in plain torch: rotary embeddings, grouped queries, norms and gates, as language models have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Decoder"]


class Norm(nn.Module):
    """An RMS norm in five operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class Attention(nn.Module):
    """Queries in groups, of which each shares a key and a value head."""

    def __init__(self, width: int, heads: int, groups: int, dims: int, *, is_fused: bool) -> None:
        super().__init__()
        self.head_dim, self.repeats, self.is_fused = dims, heads // groups, is_fused
        self.scale = dims**-0.5
        self.q = nn.Linear(width, heads * dims)
        self.k = nn.Linear(width, groups * dims)
        self.v = nn.Linear(width, groups * dims)
        self.o = nn.Linear(heads * dims, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        shape = (batch, length, -1, self.head_dim)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
        if self.is_fused:
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
        else:
            k, v = (_repeated(t, self.repeats) for t in (k, v))
            y = torch.softmax(q @ k.transpose(2, 3) * self.scale, dim=-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _repeated(x: Tensor, repeats: int) -> Tensor:
    batch, groups, length, dims = x.shape
    x = x[:, :, None].expand(batch, groups, repeats, length, dims)
    return x.reshape(batch, groups * repeats, length, dims)


class Decoder(nn.Module):
    """Two layers that share one table of rotations; 6 query heads in 3 groups, 8 dimensions each, 20 wide."""

    def __init__(self, *, is_fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(31, 20)
        self.frequencies = nn.Buffer(torch.rand(4))
        self.norms = nn.ModuleList(Norm(20) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(20, 6, 3, 8, is_fused=is_fused) for _ in range(2))
        self.gates, self.ups = (
            nn.ModuleList(nn.Linear(20, 14) for _ in range(2)) for _ in range(2)
        )
        self.downs = nn.ModuleList(nn.Linear(14, 20) for _ in range(2))
        self.head = nn.Linear(20, 31, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1])[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.table(tokens)
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x), cos, sin)
            y = self.norms[2 * i + 1](x)
            x = x + self.downs[i](F.silu(self.gates[i](y)) * self.ups[i](y))
        return self.head(x)  # type: ignore[no-any-return]
