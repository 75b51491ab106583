"""Image blocks out of less usual operators: picking, contracting by hand, recurrence, reparametrized weights."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.blocks import Block, Run, Shape, convolution, image, width
from tests.channel_blocks import IMAGE_BLOCKS

__all__ = ["IMAGE_BLOCKS"]


@image
def pick(shape: Shape, rng: Random) -> nn.Module | None:
    c, ones = shape[0], [1] * (len(shape) - 1)
    index = torch.tensor(rng.sample(range(c), max(2, c // 2)))
    table = index.view(1, -1, *ones)
    runs: list[Run] = [
        lambda m, x: x[:, ::2],
        lambda m, x: x[:, 1:],
        lambda m, x: x.narrow(1, 0, c - 1),
        lambda m, x: torch.take_along_dim(x, m.table, 1),
        lambda m, x: x.gather(1, m.table.expand(x.size(0), -1, *shape[1:])),
        lambda m, x: x.index_fill(1, m.index, 0.5),
        lambda m, x: x.index_add(1, m.index, x[:, m.index]),
        lambda m, x: torch.stack([x, -x], 2).flatten(1, 2),
        lambda m, x: torch.stack([x, -x], 1).flatten(1, 2),
        lambda m, x: x.tile(1, 2, *ones),
        lambda m, x: x.slice_scatter(x[:, :2] * 2, 1, 0, 2),
        lambda m, x: x.movedim(1, -1).unflatten(-1, (c // 2, 2))[..., 0].movedim(-1, 1),
    ]
    run = rng.choice(runs if c % 2 == 0 else runs[:-1])
    block = Block(run)
    block.register_buffer("index", index)
    block.register_buffer("table", table)
    return block


@image
def statistic(shape: Shape, rng: Random) -> nn.Module | None:
    runs: list[Run] = [
        lambda m, x: x.cumsum(1),
        lambda m, x: F.normalize(x, dim=1),
        lambda m, x: x - x.logsumexp(1, keepdim=True),
        lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1),
        lambda m, x: x * x.std(1, keepdim=True),
        lambda m, x: x * x.abs().amax(1, keepdim=True).clamp(max=1),
        lambda m, x: x + x.median(1, keepdim=True).values,
        lambda m, x: x * (x > x.mean(1, keepdim=True)),
        lambda m, x: x.masked_fill(x > 2, 0.0),
        lambda m, x: torch.where(x > 0, x, x.mean()),
        lambda m, x: F.local_response_norm(x, 3),
        lambda m, x: F.softplus(x) - x.diff(dim=1, prepend=x[:, :1]),
    ]
    return Block(rng.choice(runs))


@image
def contraction(shape: Shape, rng: Random) -> nn.Module | None:
    c, outs = shape[0], width(rng, shape[0])
    weight = nn.Parameter(torch.randn(outs, c) / c**0.5)
    bias = nn.Parameter(torch.randn(outs))
    space = shape[1:]
    runs: list[Run] = [
        lambda m, x: torch.einsum("bc...,dc->bd...", x, m.weight),
        lambda m, x: torch.tensordot(x, m.weight, dims=([1], [1])).movedim(-1, 1),
        lambda m, x: (m.weight @ x.flatten(2)).unflatten(2, space),
        lambda m, x: (x.flatten(2).transpose(1, 2) @ m.weight.t()).mT.unflatten(2, space),
        lambda m, x: F.linear(x.movedim(1, -1), m.weight, m.bias).movedim(-1, 1),
        lambda m, x: torch.baddbmm(
            m.bias.view(1, -1, 1), m.weight.expand(x.size(0), -1, -1), x.flatten(2)
        ).unflatten(2, space),
        lambda m, x: (x.unsqueeze(1) * m.weight.view(outs, c, *[1] * len(space))).sum(2),
    ]
    return Block(rng.choice(runs), weight=weight, bias=bias)


@image
def recurrent(shape: Shape, rng: Random) -> nn.Module | None:
    kind = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    options: dict[str, Any] = {
        "num_layers": rng.randint(1, 2),
        "bidirectional": rng.random() < 0.5,
        "batch_first": True,
    }
    rnn = kind(shape[0], rng.randint(3, 6), **options)

    def run(m: Any, x: Tensor) -> Any:
        y = m.rnn(x.flatten(2).transpose(1, 2))[0]
        return y.transpose(1, 2).unflatten(2, shape[1:])

    return Block(run, rnn=rnn)


@image
def reparametrized(shape: Shape, rng: Random) -> nn.Module | None:
    inner = convolution(rng, len(shape) - 1, shape[0], width(rng, shape[0]), rng.choice([1, 3]))
    made: nn.Module = parametrizations.weight_norm(inner, dim=rng.choice([0, 1]))
    return made
