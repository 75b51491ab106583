"""Building blocks of random networks: everything that people do with channels, each in a few lines.

A maker takes the shape of its input (without the batch) and a source of choices, and returns a module, or None where it does
not apply. Image blocks work on (channels, *space) in one, two and three dimensions, token blocks on (length, width).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IMAGE_BLOCKS", "Block", "Maker", "chain", "shape_after"]

Shape = tuple[int, ...]
Maker = Callable[[Shape, Random], "nn.Module | None"]
Run = Callable[..., Tensor]

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, type[nn.Module]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}
IMAGE_BLOCKS: dict[str, Maker] = {}


class Block(nn.Module):
    """Runs a function of itself and its input; parts and parameters are attributes."""

    def __init__(self, run: Run, **parts: object) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def image(maker: Maker) -> Maker:
    IMAGE_BLOCKS[maker.__name__] = maker
    return maker


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """Return the shape of what `module` makes of one sample of `shape`."""
    with torch.no_grad():
        return tuple(module.eval()(torch.zeros(2, *shape)).shape[1:])


def width(rng: Random, other: int) -> int:
    """Return a small width that is not `other`."""
    return rng.choice([n for n in range(4, 13) if n != other])


def convolution(
    rng: Random, rank: int, ins: int, outs: int, size: int = 1, **options: object
) -> nn.Module:
    """Return a convolution that keeps the spatial size unless `options` say otherwise."""
    options = {"padding": size // 2, "bias": rng.random() < 0.5, **options}
    return CONV[rank](ins, outs, size, **options)


def chain(rng: Random, shape: Shape, channels: int | None = None) -> nn.Module:
    """Return one or two random blocks that keep the spatial size, and a projection to `channels`."""
    blocks: list[nn.Module] = []
    names = sorted(IMAGE_BLOCKS.keys() - {"residual", "concatenation", "long_skip"})
    now = shape
    for _ in range(rng.randint(1, 2)):
        made = IMAGE_BLOCKS[rng.choice(names)](now, rng)
        if made is not None and shape_after(made, now)[1:] == shape[1:]:
            blocks.append(made)
            now = shape_after(made, now)
    if channels is not None and now[0] != channels:
        blocks.append(convolution(rng, len(shape) - 1, now[0], channels))
    return nn.Sequential(*blocks)


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


# -- convolutions -------------------------------------------------------------------------------------------------


@image
def conv(shape: Shape, rng: Random) -> nn.Module | None:
    rank, outs = len(shape) - 1, width(rng, shape[0])
    kind = rng.choice(["point", "plain", "dilated", "strided", "same", "circular"])
    if kind == "point":
        return convolution(rng, rank, shape[0], outs)
    if kind == "strided":
        return convolution(rng, rank, shape[0], outs, 3, stride=2) if min(shape[1:]) > 2 else None
    options: dict[str, dict[str, object]] = {
        "plain": {},
        "dilated": {"dilation": 2, "padding": 2},
        "same": {"padding": "same"},
        "circular": {"padding_mode": "circular"},
    }
    return convolution(rng, rank, shape[0], outs, 3, **options[kind])


@image
def grouped(shape: Shape, rng: Random) -> nn.Module | None:
    choices = divisors(shape[0])
    if not choices:
        return None
    groups = rng.choice(choices)
    return convolution(rng, len(shape) - 1, shape[0], groups * rng.randint(1, 3), 3, groups=groups)


@image
def depthwise(shape: Shape, rng: Random) -> nn.Module | None:
    outs = shape[0] * rng.choice([1, 1, 2])
    return (
        convolution(rng, len(shape) - 1, shape[0], outs, 3, groups=shape[0]) if outs <= 20 else None
    )


@image
def transposed(shape: Shape, rng: Random) -> nn.Module | None:
    groups = rng.choice([1, 1, shape[0], *divisors(shape[0])])
    outs = groups * (rng.randint(1, 3) if groups > 1 else width(rng, shape[0]))
    if outs > 20:
        return None
    grow = max(shape[1:]) <= 4 and rng.random() < 0.5
    options = {"stride": 2, "padding": 1, "output_padding": 1} if grow else {"padding": 1}
    return TRANSPOSED[len(shape) - 1](
        shape[0], outs, 3, groups=groups, bias=rng.random() < 0.5, **options
    )


@image
def shared(shape: Shape, rng: Random) -> nn.Module | None:
    part = convolution(rng, len(shape) - 1, shape[0], shape[0], 3)
    return Block(lambda m, x: m.part(F.relu(m.part(x))), part=part)


@image
def linear_last(shape: Shape, rng: Random) -> nn.Module | None:
    rank, outs = len(shape) - 1, width(rng, shape[0])
    there, back = [0, *range(2, rank + 2), 1], [0, rank + 1, *range(1, rank + 1)]
    return Block(
        lambda m, x: m.part(x.permute(*there)).permute(*back), part=nn.Linear(shape[0], outs)
    )


# -- normalisations and activations -------------------------------------------------------------------------------


@image
def norm(shape: Shape, rng: Random) -> nn.Module | None:
    c, rank = shape[0], len(shape) - 1
    there, back = [0, *range(2, rank + 2), 1], [0, rank + 1, *range(1, rank + 1)]
    group = rng.choice([1, c, *divisors(c)])
    makers: list[Callable[[], nn.Module]] = [
        lambda: BATCH_NORM[rank](c),
        lambda: BATCH_NORM[rank](c),
        lambda: BATCH_NORM[rank](c, affine=False),
        lambda: nn.GroupNorm(group, c),
        lambda: nn.GroupNorm(group, c, affine=False),
        lambda: INSTANCE_NORM[rank](c, affine=True),
        lambda: INSTANCE_NORM[rank](c),
        lambda: nn.LayerNorm(shape),
        lambda: nn.LayerNorm(shape, elementwise_affine=False),
        lambda: Block(lambda m, x: m.n(x.permute(*there)).permute(*back), n=nn.LayerNorm(c)),
        lambda: Block(lambda m, x: m.n(x.permute(*there)).permute(*back), n=nn.RMSNorm(c)),
        lambda: Block(lambda m, x: F.group_norm(x, group)),
        lambda: Block(lambda m, x: F.normalize(x, dim=1)),
        lambda: nn.LocalResponseNorm(3),
    ]
    return rng.choice(makers)()


@image
def activation(shape: Shape, rng: Random) -> nn.Module | None:
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.ReLU(inplace=rng.random() < 0.5),
        nn.SiLU,
        lambda: nn.PReLU(shape[0], init=0.3),
        nn.PReLU,
        nn.GELU,
        nn.Hardswish,
        lambda: nn.LeakyReLU(0.1),
        nn.Softplus,
        lambda: nn.Dropout(0.5),
        lambda: nn.Softmax(dim=1),
        lambda: nn.Softmax(dim=-1),
        lambda: Block(lambda m, x: torch.sigmoid(x) * x),
        lambda: Block(lambda m, x: torch.where(x > 0, x, x * 0.1)),
        lambda: Block(lambda m, x: x.clamp(-1, 1).add_(0.5).mul(2)),
        lambda: Block(lambda m, x: x.masked_fill(x < 0, 0.25)),
        lambda: Block(lambda m, x: x.relu_() + 1),
    ]
    return rng.choice(makers)()


@image
def glu(shape: Shape, rng: Random) -> nn.Module | None:
    return nn.GLU(dim=1) if shape[0] % 2 == 0 else None


# -- sums, concatenations, pieces -----------------------------------------------------------------------------------


@image
def residual(shape: Shape, rng: Random) -> nn.Module | None:
    inner = chain(rng, shape, shape[0])
    kind = rng.choice(["sum", "in-place", "mean", "difference", "product", "max"])
    runs: dict[str, Run] = {
        "sum": lambda m, x: x + m.inner(x),
        "in-place": lambda m, x: m.inner(x).mul(1.5).add_(x),
        "mean": lambda m, x: torch.stack([x, m.inner(x)]).mean(0),
        "difference": lambda m, x: torch.sub(x, m.inner(x), alpha=2),
        "product": lambda m, x: x * torch.sigmoid(m.inner(x)),
        "max": lambda m, x: torch.maximum(x, m.inner(x)),
    }
    return Block(runs[kind], inner=inner)


@image
def concatenation(shape: Shape, rng: Random) -> nn.Module | None:
    branches = [chain(rng, shape, width(rng, shape[0])) for _ in range(rng.randint(1, 2))]
    parts = nn.ModuleList(
        [nn.Identity(), *branches] if rng.random() < 0.5 else [*branches, branches[0]]
    )
    return Block(lambda m, x: torch.cat([p(x) for p in m.parts], 1), parts=parts)


@image
def long_skip(shape: Shape, rng: Random) -> nn.Module | None:
    if min(shape[1:]) < 4 or any(n % 2 for n in shape[1:]):
        return None
    down = convolution(rng, len(shape) - 1, shape[0], width(rng, shape[0]), 3, stride=2)
    up = nn.Upsample(scale_factor=2)
    return Block(lambda m, x: torch.cat([m.up(m.down(x)), x], dim=1), down=down, up=up)


@image
def slice_channels(shape: Shape, rng: Random) -> nn.Module | None:
    c = shape[0]
    start = rng.randint(0, c - 2)
    stop = rng.randint(start + 1, c)
    runs: list[Run] = [
        lambda m, x: x[:, start:stop],
        lambda m, x: x[:, start - c :],
        lambda m, x: x[:, : c - 1, ...],
        lambda m, x: x[:, ::2],
        lambda m, x: x.narrow(1, start, stop - start),
        lambda m, x: x[:, start].unsqueeze(1),
        lambda m, x: x[:, : x.shape[1] // 2],
        lambda m, x: x[:, list(range(c - 1, -1, -2))],
    ]
    return Block(rng.choice(runs))


@image
def split_channels(shape: Shape, rng: Random) -> nn.Module | None:
    c = shape[0]
    first = rng.randint(1, c - 1)
    half, rank = c // 2, len(shape) - 1
    kind = rng.choice(["chunk", "sizes", "step", "unbind", "tensor_split", "computed"])
    if kind == "sizes":
        part = convolution(rng, rank, first, width(rng, first))

        def run(m: Block, x: Tensor) -> Tensor:
            a, b = torch.split(x, [first, c - first], dim=1)
            return torch.cat([b, m.part(a)], 1)

        return Block(run, part=part)
    if kind == "step":
        return Block(lambda m, x: torch.cat(list(x.split(max(2, c // 3), 1))[::-1], 1))
    if kind == "unbind":
        return Block(lambda m, x: torch.stack(x.unbind(1)[:3], 1))
    if kind == "tensor_split":
        return Block(lambda m, x: torch.cat([p.relu() for p in x.tensor_split(3, dim=1)], 1))
    if c % 2:
        return None
    part = convolution(rng, rank, half, width(rng, half), 3)
    if kind == "computed":
        return Block(
            lambda m, x: torch.cat([x[:, : x.size(1) // 2], m.part(x[:, x.size(1) // 2 :])], 1),
            part=part,
        )

    def chunked(m: Block, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat((m.part(a), b), dim=1)

    return Block(chunked, part=part)


@image
def pad_channels(shape: Shape, rng: Random) -> nn.Module | None:
    low, high, value = rng.randint(0, 3), rng.randint(0, 3), rng.choice([0.0, 0.5])
    widths = [0, 0] * (len(shape) - 1) + [low, high]
    return Block(lambda m, x: F.pad(x, widths, "constant", value))


@image
def write_slice(shape: Shape, rng: Random) -> nn.Module | None:
    c, rank = shape[0], len(shape) - 1
    count = rng.randint(1, c - 1)
    part = convolution(rng, rank, c, count, 3)
    kind = rng.choice(["set", "zeros", "in-place slice", "fill", "concat"])
    if kind == "fill":

        def fill(m: Block, x: Tensor) -> Tensor:
            y = x * 2
            y[:, :count] = 0
            return y

        return Block(fill)
    if kind == "in-place slice":

        def scale(m: Block, x: Tensor) -> Tensor:
            y = x + 0.5
            y[:, :count].mul_(m.part(x))
            return y

        return Block(scale, part=part)
    if kind == "zeros":

        def zeros(m: Block, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[:, count:].copy_(x[:, count:])
            y[:, :count].add_(m.part(x))
            return y

        return Block(zeros, part=part)
    if kind == "concat":
        return Block(lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 2, *x.shape[2:])], dim=1))

    def write(m: Block, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :count] = m.part(x)
        return y

    return Block(write, part=part)


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

        def positions(m: Block, x: Tensor) -> Tensor:
            q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
            weights = torch.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)
            mixed = torch.matmul(v, weights.transpose(1, 2))
            return mixed.reshape(x.shape[0], -1, *shape[1:])

        return Block(positions, **parts)

    def channels(m: Block, x: Tensor) -> Tensor:
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
