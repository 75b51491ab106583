"""Networks that once went wrong, each under the name of what was wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.groups import analyze
from graphprune.target import parse_target
from tests.exactness import assert_cut_is_exact, assert_identity, capture_as, choose_or_none
from tests.strategies import Recipe, build

FOUND = {
    "write into a slice by a constant: the slice's end was not rewritten": Recipe(
        rank=2, blocks=(("write_slice", 402),), tokens=(("norm", 44),), head="first", seed=31
    ),
    "write into a slice by a tensor: the slice's end was not rewritten": Recipe(
        rank=2,
        blocks=(("write_slice", 417),),
        tokens=(("change_width", 858),),
        head="two",
        seed=123,
    ),
    "repeat_interleave: the copies were merged as a second label of the same dimension": Recipe(
        rank=1, blocks=(("concatenation", 747),), head="literal", seed=122
    ),
    "repeat_interleave of pinned channels: the number of copies was cut": Recipe(
        rank=3,
        blocks=(
            ("slice_channels", 618),
            ("concatenation", 542),
            ("activation", 649),
            ("statistic", 869),
            ("channel_attention", 501),
        ),
        head="flatten",
        seed=20145,
    ),
    "depthwise multiplier then GLU: a whole row and a part of a row went together": Recipe(
        rank=2,
        blocks=(
            ("linear_last", 70),
            ("depthwise", 389),
            ("glu", 396),
            ("norm", 925),
            ("order", 320),
        ),
        head="flatten",
        seed=1080,
    ),
    "pixel shuffle of coupled channels: the factor was cut": Recipe(
        rank=2, blocks=(("order", 658), ("residual", 748), ("pixels", 9)), head="view", seed=595
    ),
    "pixel shuffle then pad: the factor was cut": Recipe(
        rank=2,
        blocks=(
            ("norm", 354),
            ("shared", 4),
            ("norm", 397),
            ("pixels", 314),
            ("pad_channels", 105),
        ),
        head="flatten",
        seed=2150,
    ),
    "blocks that are members of each other: closing one emptied the tensor": Recipe(
        rank=2,
        blocks=(("residual", 218), ("pad_channels", 783)),
        tokens=(("mlp", 348), ("parameter", 246), ("convolve", 646)),
        head="view",
        seed=2259,
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_network_that_once_went_wrong_is_cut_exactly(what: str) -> None:
    recipe = FOUND[what]
    program = capture_as(*build(recipe), "fx")
    groups = analyze(program)
    assert_identity(program, groups)
    targets = map(parse_target, ("ratio=0.3", "ratio=0.6", "macs=0.6", "params=0.7"))
    choices = [choose_or_none(groups, recipe.seed, target) for target in targets]
    keeps = [choice.keep for choice in choices if choice is not None]
    assert keeps
    for keep in keeps:
        assert_cut_is_exact(program, groups, keep)


class _FoldedHeads(nn.Module):
    """Attention written for ``batch * heads``: a label over batch and channels in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        q, k, v = (
            t.reshape(n, 7, 3, 4).transpose(1, 2).reshape(n * 3, 7, 4)
            for t in self.qkv(x).split([12, 12, 12], dim=-1)
        )
        mixed = torch.softmax(q @ k.transpose(1, 2) * 0.5, dim=-1) @ v
        out: Tensor = self.out(mixed.reshape(n, 3, 7, 4).transpose(1, 2).reshape(n, 7, 12))
        return out


def test_the_proof_runs_on_the_batch_that_was_labelled() -> None:
    # Capture had labelled three samples, the proof ran on two: the labels of ``batch * heads`` did not fit.
    program = gp.capture(_FoldedHeads(), torch.randn(1, 7, 6))
    groups = analyze(program)
    for seed in range(3):
        choice = choose_or_none(groups, seed, parse_target("ratio=0.4"))
        assert choice is not None
        assert_cut_is_exact(program, groups, choice.keep)


class _GroupsAsInstances(nn.Module):
    """A group norm as exporters write it: an instance norm of ``[batch, groups, the rest]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(F.instance_norm(x.reshape(x.size(0), 2, -1)).reshape(x.shape))
        return out


def test_an_instance_norm_takes_statistics_over_all_that_lies_behind_the_channel() -> None:
    # Channels inside the normalised dimension were cut, and the statistics changed with them.
    program = gp.capture(_GroupsAsInstances(), torch.randn(1, 3, 5, 6))
    groups = analyze(program)
    for seed in range(3):
        choice = choose_or_none(groups, seed, parse_target("ratio=0.4"))
        assert choice is not None
        assert_cut_is_exact(program, groups, choice.keep)
