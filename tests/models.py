"""Small models for tests; widths differ wherever they can, so that a mixed-up dimension shows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CifarResNet",
    "resnet20",
    "resnet56",
    "tiny_dense",
    "tiny_inception",
    "tiny_mobile",
    "tiny_residual",
    "tiny_transformer",
]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: stride, then pad channels with zeros (option A), or project (option B)."""

    def __init__(
        self, in_planes: int, planes: int, *, stride: int, projected: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pad = planes // 4 if stride != 1 or in_planes != planes else None
        self.downsample: nn.Module | None = None
        if projected and self.pad is not None:
            conv = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            out += self.downsample(x)
        elif self.pad is None:
            out += x
        else:
            out += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images; parameter names are those of github.com/akamaster/pytorch_resnet_cifar10."""

    def __init__(
        self, blocks: tuple[int, int, int], *, num_classes: int = 10, projected: bool = False
    ) -> None:
        super().__init__()
        self.projected = projected
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, blocks[0], stride=1)
        self.layer2 = self._layer(16, 32, blocks[1], stride=2)
        self.layer3 = self._layer(32, 64, blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)

    def _layer(self, in_planes: int, planes: int, num_blocks: int, *, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride=stride, projected=self.projected)
        return nn.Sequential(
            first, *(BasicBlock(planes, planes, stride=1) for _ in range(num_blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        logits: Tensor = self.linear(out)
        return logits


def resnet20() -> CifarResNet:
    """ResNet-20 for CIFAR-10."""
    return CifarResNet((3, 3, 3))


def resnet56() -> CifarResNet:
    """ResNet-56 for CIFAR-10."""
    return CifarResNet((9, 9, 9))


def _randomize(model: nn.Module) -> nn.Module:
    """Give `model` reproducible weights and normalisation statistics that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(
                    torch.randn(module.running_mean.shape, generator=generator) * 0.2
                )
                module.running_var.copy_(
                    torch.rand(module.running_var.shape, generator=generator) + 0.5
                )
    return model.eval()


def _conv(in_channels: int, out_channels: int, size: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False, **options),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 12)
        self.left = nn.Sequential(
            _conv(12, 14), nn.Conv2d(14, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        )
        self.down = nn.Sequential(nn.Conv2d(12, 20, 1, stride=2, bias=False), nn.BatchNorm2d(20))
        self.right = nn.Sequential(
            _conv(12, 18, stride=2), nn.Conv2d(18, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        )
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.left(x) + x)
        x = torch.relu(self.right(x) + self.down(x))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


class _Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 11)
        self.a = _conv(11, 6, 1)
        self.b = nn.Sequential(_conv(11, 5, 1), _conv(5, 9))
        self.c = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(11, 7, 1))
        self.mix = _conv(22, 13, stride=2)
        self.fc = nn.Linear(13 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mix(torch.cat([self.a(x), self.b(x), self.c(x)], 1))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


class _DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, padding=1)
        self.first = nn.Sequential(_DenseLayer(9, 4), _DenseLayer(13, 6), _DenseLayer(19, 5))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 11, 1), nn.AvgPool2d(2)
        )
        self.second = nn.Sequential(_DenseLayer(11, 7), _DenseLayer(18, 8))
        self.norm = nn.BatchNorm2d(26)
        self.fc = nn.Linear(26, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.transition(self.first(self.stem(x))))
        logits: Tensor = self.fc(torch.relu(self.norm(x)).mean((2, 3)))
        return logits


class _Inverted(nn.Module):
    def __init__(self, in_channels: int, hidden: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.expand = _conv(in_channels, hidden, 1)
        self.depthwise = _conv(hidden, hidden, stride=stride, groups=hidden)
        self.squeeze = nn.Conv2d(hidden, 6, 1)
        self.excite = nn.Conv2d(6, hidden, 1)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        projected: Tensor = self.project(y * gate)
        return x + projected if self.is_residual else projected


class _Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 10, stride=2)
        self.blocks = nn.Sequential(
            _Inverted(10, 22, 14, stride=1),
            _Inverted(14, 26, 14, stride=1),
            _Inverted(14, 30, 17, stride=2),
        )
        self.fc = nn.Linear(17, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean([2, 3]))
        return logits


class _EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 24
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(_EncoderBlock(width, 4, 36), _EncoderBlock(width, 3, 40))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], dim=1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def tiny_residual() -> nn.Module:
    """Two residual blocks, one with a projection shortcut."""
    return _randomize(_Residual())


def tiny_inception() -> nn.Module:
    """Three concatenated branches, then a flatten over space into a linear."""
    return _randomize(_Inception())


def tiny_dense() -> nn.Module:
    """Two dense blocks, where each layer's output joins all that follow."""
    return _randomize(_Dense())


def tiny_mobile() -> nn.Module:
    """Inverted residuals: depthwise convolutions and squeeze-and-excite gates."""
    return _randomize(_Mobile())


def tiny_transformer() -> nn.Module:
    """Two encoder blocks over 4x4 patches, with four and three heads."""
    return _randomize(_Transformer())
