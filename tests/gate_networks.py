"""Tiny networks for digits, one for each way in which channels are coupled; a training of one takes a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["branches", "dense", "depthwise", "residual", "transformer"]


def _conv(ins: int, outs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16, stride=2)
        self.left = nn.Sequential(_conv(16, 20), _conv(20, 16))
        self.right = nn.Sequential(_conv(16, 24), _conv(24, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.left(x)
        x = x + self.right(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16, stride=2)
        self.narrow = _conv(16, 12, 1)
        self.wide = nn.Sequential(_conv(16, 10, 1), _conv(10, 14))
        self.mix = _conv(26, 20)
        self.fc = nn.Linear(20 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mix(torch.cat([self.narrow(x), self.wide(x)], 1))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


class _Dense(nn.Module):
    """Every layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 12)
        self.layers = nn.ModuleList(_conv(12 + 8 * i, 8) for i in range(4))
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(44 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        logits: Tensor = self.head(self.pool(torch.cat(features, 1)).flatten(1))
        return logits


class _Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(16, 32, 1), _conv(32, 32, groups=32), nn.Conv2d(32, 16, 1))
            for _ in range(2)
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Transformer(nn.Module):
    """One encoder block over the rows of a digit: attention with three heads, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.position = nn.Parameter(torch.randn(1, 8, 24) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 72)
        self.out = nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)) + self.position
        q, k, v = (
            self.qkv(self.norm1(x)).view(x.size(0), 8, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).reshape(x.size(0), 8, 24))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


def _seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def residual() -> nn.Module:
    """Return two residual blocks over one stream."""
    return _seeded(_Residual)


def branches() -> nn.Module:
    """Return two branches that are concatenated."""
    return _seeded(_Branches)


def dense() -> nn.Module:
    """Return a densely connected network."""
    return _seeded(_Dense)


def depthwise() -> nn.Module:
    """Return two inverted residual blocks with depthwise convolutions."""
    return _seeded(_Depthwise)


def transformer() -> nn.Module:
    """Return a transformer of one block."""
    return _seeded(_Transformer)
