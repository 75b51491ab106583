"""More image blocks: channels reordered, repeated, gated, and mixed with their own statistics; see `tests.blocks`."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.blocks import IMAGE_BLOCKS, Block, Run, Shape, convolution, divisors, image

__all__ = ["IMAGE_BLOCKS"]

# -- order and shape of channels --------------------------------------------------------------------------------------


@image
def shuffle(shape: Shape, rng: Random) -> nn.Module | None:
    choices = divisors(shape[0])
    if not choices:
        return None
    c, space, g = shape[0], shape[1:], rng.choice(choices)
    runs: list[Run] = [
        lambda m, x: x.view(-1, g, c // g, *space).transpose(1, 2).reshape(-1, c, *space),
        lambda m, x: x.view(x.size(0), g, x.size(1) // g, *space).transpose(1, 2).flatten(1, 2),
        lambda m, x: x.unflatten(1, (g, -1)).transpose(1, 2).contiguous().flatten(1, 2),
        lambda m, x: x.reshape(x.shape[0], c // g, g, *x.shape[2:]).mean(2),
        lambda m, x: x.reshape(x.shape[0], c // g, g, *x.shape[2:]).amax(1),
        lambda m, x: x.unflatten(1, (g, c // g)).sum(1),
        lambda m, x: x.unflatten(1, (g, c // g)).sum(2),
        lambda m, x: x.unflatten(1, (g, c // g))[:, 0],
        lambda m, x: x.unflatten(1, (g, c // g)).softmax(1).flatten(1, 2),
    ]
    if rng.random() < 0.2 and len(space) == 2:
        return nn.ChannelShuffle(g)
    return Block(rng.choice(runs))


@image
def order(shape: Shape, rng: Random) -> nn.Module | None:
    index = torch.tensor(rng.sample(range(shape[0]), shape[0]))
    runs: list[Run] = [
        lambda m, x: x.flip(1),
        lambda m, x: x.flip(-1),
        lambda m, x: x.roll(1, 1),
        lambda m, x: x.roll(1, -1),
        lambda m, x: x[:, m.index],
        lambda m, x: x.index_select(1, m.index),
        lambda m, x: x.sort(dim=1).values,
    ]
    block = Block(rng.choice(runs))
    block.register_buffer("index", index)
    return block


@image
def repeat(shape: Shape, rng: Random) -> nn.Module | None:
    if shape[0] > 8:
        return None
    times = [1] * (len(shape) - 1)
    runs: list[Run] = [
        lambda m, x: x.repeat(1, 2, *times),
        lambda m, x: x.repeat_interleave(2, dim=1),
        lambda m, x: torch.cat([x, x], 1),
        lambda m, x: torch.cat([x, -x.abs()], 1),
        lambda m, x: x.unsqueeze(2).expand(-1, -1, 2, *[-1] * len(times)).flatten(1, 2),
        lambda m, x: x.unsqueeze(1).expand(-1, 2, -1, *[-1] * len(times)).flatten(1, 2),
    ]
    return Block(rng.choice(runs))


@image
def pixels(shape: Shape, rng: Random) -> nn.Module | None:
    if len(shape) != 3:
        return None
    c, h, w = shape
    if c % 4 == 0 and c >= 8 and max(h, w) <= 8 and rng.random() < 0.5:
        return nn.PixelShuffle(2)
    return nn.PixelUnshuffle(2) if h % 2 == w % 2 == 0 and min(h, w) > 2 and c <= 6 else None


# -- statistics and gates ---------------------------------------------------------------------------------------------


@image
def excite(shape: Shape, rng: Random) -> nn.Module | None:
    c, rank, hidden = shape[0], len(shape) - 1, rng.randint(2, 5)
    space = list(range(2, rank + 2))
    if rng.random() < 0.5:
        gate = nn.Sequential(
            convolution(rng, rank, c, hidden),
            nn.ReLU(),
            convolution(rng, rank, hidden, c),
            nn.Sigmoid(),
        )
        return Block(lambda m, x: x * m.gate(x.mean(space, keepdim=True)), gate=gate)
    gate = nn.Sequential(nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, c), nn.Sigmoid())
    if rng.random() < 0.5:
        return Block(
            lambda m, x: x * m.gate(x.mean(space)).view(x.shape[0], c, *[1] * rank), gate=gate
        )
    return Block(lambda m, x: x * m.gate(x.mean(space))[(..., *[None] * rank)], gate=gate)


@image
def statistic(shape: Shape, rng: Random) -> nn.Module | None:
    rank = len(shape) - 1
    # Half of the mean: what is left of all of it would be rounding, which no comparison can be relative to.
    runs: list[Run] = [
        lambda m, x: x - 0.5 * x.mean(1, keepdim=True),
        lambda m, x: x * x.sum(1, keepdim=True),
        lambda m, x: x / (1 + x.norm(dim=1, keepdim=True)),
        lambda m, x: x * torch.cat([x.mean(1, True), x.amax(1, True)], 1).sum(1, True),
        lambda m, x: x * torch.sigmoid(m.part(x)),
        lambda m, x: x - 0.5 * x.flatten(2).mean(2).reshape(x.shape[0], -1, *[1] * rank),
        lambda m, x: x * x.flatten(1).softmax(1).view(x.shape),
    ]
    return Block(rng.choice(runs), part=convolution(rng, rank, shape[0], 1))


@image
def channel_attention(shape: Shape, rng: Random) -> nn.Module | None:
    c, rank, inner = shape[0], len(shape) - 1, rng.randint(3, 6)
    parts = {n: convolution(rng, rank, c, inner) for n in ("q", "k", "v")}
    if rng.random() < 0.5:  # over positions

        def positions(m: Any, x: Tensor) -> Any:
            q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
            weights = torch.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)
            mixed = torch.matmul(v, weights.transpose(1, 2))
            return mixed.reshape(x.shape[0], -1, *shape[1:])

        return Block(positions, **parts)

    def channels(m: Any, x: Tensor) -> Any:
        q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
        weights = torch.einsum("bcn,bdn->bcd", q, k).softmax(-1)
        return torch.einsum("bcd,bdn->bcn", weights, v).unflatten(2, shape[1:])

    return Block(channels, **parts)


@image
def scale(shape: Shape, rng: Random) -> nn.Module | None:
    c, ones = shape[0], [1] * (len(shape) - 1)
    sizes = rng.choice([[1, c, *ones], [c, *ones], [1, *[1 for _ in ones]], list(shape)])
    weight = nn.Parameter(torch.rand(sizes) + 0.5)
    runs: list[Run] = [
        lambda m, x: x * m.weight,
        lambda m, x: m.weight + x,
        lambda m, x: torch.addcmul(x, x, m.weight, value=0.5),
        lambda m, x: torch.lerp(x, -x, m.weight.expand_as(x)),
        lambda m, x: x.mul_(m.weight),
    ]
    return Block(rng.choice(runs), weight=weight)


@image
def pool(shape: Shape, rng: Random) -> nn.Module | None:
    rank, small = len(shape) - 1, min(shape[1:])
    if small < 4:
        return Block(lambda m, x: F.interpolate(x, scale_factor=2)) if max(shape[1:]) <= 4 else None
    maxes = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
    means = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    adaptive = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    makers: list[Callable[[], nn.Module]] = [
        lambda: maxes[rank](2),
        lambda: maxes[rank](3, stride=1, padding=1),
        lambda: means[rank](2),
        lambda: adaptive[rank](2),
        lambda: Block(lambda m, x: x[..., ::2]),
    ]
    return rng.choice(makers)()
