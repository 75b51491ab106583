"""Building blocks of random networks: everything that people do with channels, each in a few lines.

A maker takes the shape of its input (without the batch) and a source of choices, and returns a module, or None where
it does not apply. Image blocks work on (channels, *space) in one, two and three dimensions; more of them are
in `tests.channel_blocks`, those for tokens in `tests.token_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IMAGE_BLOCKS", "Block", "Maker", "chain", "shape_after"]

Shape = tuple[int, ...]
Maker = Callable[[Shape, Random], "nn.Module | None"]
Run = Callable[[Any, Tensor], Any]

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
        result: Tensor = self.run(self, x)
        return result


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

        def run(m: Any, x: Tensor) -> Any:
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

    def chunked(m: Any, x: Tensor) -> Any:
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

        def fill(m: Any, x: Tensor) -> Any:
            y = x * 2
            y[:, :count] = 0
            return y

        return Block(fill)
    if kind == "in-place slice":

        def scale(m: Any, x: Tensor) -> Any:
            y = x + 0.5
            y[:, :count].mul_(m.part(x))
            return y

        return Block(scale, part=part)
    if kind == "zeros":

        def zeros(m: Any, x: Tensor) -> Any:
            y = torch.zeros_like(x)
            y[:, count:].copy_(x[:, count:])
            y[:, :count].add_(m.part(x))
            return y

        return Block(zeros, part=part)
    if kind == "concat":
        return Block(lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 2, *x.shape[2:])], dim=1))

    def write(m: Any, x: Tensor) -> Any:
        y = x.clone()
        y[:, :count] = m.part(x)
        return y

    return Block(write, part=part)
