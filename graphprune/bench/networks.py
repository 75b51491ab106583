"""Networks for images of 28x28 that train in minutes: a plain one, a depthwise one, a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["depthwise", "vgg16_bn", "vit"]


class _Vgg(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ZeroPad2d(2)]
        channels = 1
        for count, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
            for _ in range(count):
                out = factor * width
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class _Separable(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(ins, ins, 3, stride, 1, groups=ins, bias=False)
        self.bn1 = nn.BatchNorm2d(ins)
        self.pointwise = nn.Conv2d(ins, outs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class _Depthwise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        sizes = ((1, 2, 1), (2, 4, 2), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 8, 1), (8, 16, 1))
        self.blocks = nn.Sequential(*(_Separable(a * width, b * width, s) for a, b, s in sizes))
        self.classifier = nn.Linear(16 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # The size of a head is left open, for Torch-Pruning changes it and cannot tell.
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return mixed


class _Vit(nn.Module):
    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 49, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.classifier(self.norm(self.blocks(x)).mean(1))
        return logits


def vgg16_bn() -> nn.Module:
    """Return VGG-16 with batch norms at a quarter of its width."""
    return _Vgg(16)


def depthwise() -> nn.Module:
    """Return seven depthwise separable blocks."""
    return _Depthwise(16)


def vit() -> nn.Module:
    """Return a vision transformer: four blocks, four heads, 64 wide, 49 patches."""
    return _Vit(64, 4, 4)
