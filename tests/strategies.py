"""Random small networks for property tests.

A network is drawn as a *recipe*, a tuple of plain numbers and names that prints in a failing example; `build` makes a
module of it, always with the same weights. Blocks are in `tests.blocks`,
`tests.channel_blocks`, `tests.operator_blocks` and `tests.token_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from tests.blocks import CONV, Maker, Shape, shape_after
from tests.operator_blocks import IMAGE_BLOCKS
from tests.token_blocks import TOKEN_BLOCKS

__all__ = ["HEADS", "Network", "Recipe", "build", "randomize", "recipes"]

MOST_CHANNELS = 24
"""Blocks that would make a wider tensor are left out."""


@dataclass(frozen=True)
class Recipe:
    """What a network consists of."""

    rank: int
    """Spatial dimensions of the input: 1, 2 or 3."""
    blocks: tuple[tuple[str, int], ...]
    """Names of image blocks, each with the seed of its own choices."""
    tokens: tuple[tuple[str, int], ...] = ()
    """Names of token blocks that follow, where there are any."""
    head: str = "mean"
    """What makes the output out of what the last block makes."""
    seed: int = 0
    """Seed of the weights."""


HEADS: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean": lambda m, x: m.fc(x.flatten(2).mean(2)),
    "flatten": lambda m, x: m.fc(torch.flatten(x, 1)),
    "view": lambda m, x: m.fc(x.reshape(x.size(0), -1)),
    "literal": lambda m, x: m.fc(x.reshape(-1, m.features)),
    "first": lambda m, x: m.fc(x[:, :, 0] if x.dim() == 3 else x.flatten(2)[:, :, 0]),
    "two": lambda m, x: (m.fc(x.flatten(2).mean(2)), x * 2),
    "dict": lambda m, x: {"out": m.fc(x.flatten(2).mean(2)), "max": x.flatten(1).amax(1)},
    "raw": lambda m, x: x,
}


class _Head(nn.Module):
    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        self.kind = kind
        whole = kind in ("flatten", "view", "literal")
        self.features = int(torch.Size(shape).numel()) if whole else shape[0]
        self.fc = nn.Linear(self.features, 5)

    def forward(self, x: Tensor) -> Any:
        return HEADS[self.kind](self, x)


class Network(nn.Module):
    """Image blocks, perhaps token blocks, and a head."""

    def __init__(self, blocks: list[nn.Module], tokens: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.tokens = nn.Sequential(*tokens)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(x)
        if len(self.tokens):
            x = self.tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.head(x)


def _made(
    table: dict[str, Maker], names: tuple[tuple[str, int], ...], shape: Shape, channel: int
) -> tuple[list[nn.Module], Shape]:
    modules: list[nn.Module] = []
    for name, seed in names:
        module = table[name](shape, Random(seed))
        if module is None:
            continue
        after = shape_after(module, shape)
        if 2 <= after[channel] <= MOST_CHANNELS and 2 <= min(after) and max(after) <= 64:
            modules.append(module)
            shape = after
    return modules, shape


def build(recipe: Recipe) -> tuple[nn.Module, Tensor]:
    """Return the network of a recipe in evaluation mode, and an example input of one sample."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        shape: Shape = (3, *{1: (12,), 2: (8, 6), 3: (4, 6, 4)}[recipe.rank])
        example = torch.randn(1, *shape)
        stem = CONV[recipe.rank](3, 8, 3, padding=1)
        blocks, after = _made(IMAGE_BLOCKS, recipe.blocks, (8, *shape[1:]), 0)
        tokens: list[nn.Module] = []
        if recipe.tokens:
            length = int(torch.Size(after[1:]).numel())
            tokens, (length, width) = _made(TOKEN_BLOCKS, recipe.tokens, (length, after[0]), 1)
            after = (width, length) if tokens else after
        network = Network([stem, *blocks], tokens, _Head(recipe.head, after))
        randomize(network)
    return network.eval(), example


def randomize(model: nn.Module) -> None:
    """Give normalisations affine weights and statistics that are not the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for name in ("running_mean", "weight", "bias"):
                    if (tensor := getattr(module, name)) is not None:
                        tensor.copy_(torch.randn(tensor.shape) * 0.3 + 0.5)
                if module.running_var is not None:
                    module.running_var.copy_(torch.rand(module.running_var.shape) + 0.5)
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 + 1)


def _names(table: Iterable[str]) -> st.SearchStrategy[tuple[str, int]]:
    return st.tuples(st.sampled_from(sorted(table)), st.integers(0, 999))


@st.composite
def recipes(draw: st.DrawFn, *, most: int = 6) -> Recipe:
    """Draw a recipe of up to `most` blocks."""
    with_tokens = draw(st.integers(0, 2)) == 0
    blocks = draw(st.lists(_names(IMAGE_BLOCKS), min_size=1, max_size=2 if with_tokens else most))
    tokens = draw(st.lists(_names(TOKEN_BLOCKS), min_size=1, max_size=4)) if with_tokens else []
    return Recipe(
        rank=draw(st.sampled_from([2, 2, 1, 3])),
        blocks=tuple(blocks),
        tokens=tuple(tokens),
        head=draw(st.sampled_from(sorted(HEADS))),
        seed=draw(st.integers(0, 99)),
    )
