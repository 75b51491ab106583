"""Module attributes: every kind of module says its new sizes, and runs with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.cut.attributes import _RULES, attributes_of
from graphprune.errors import AnalysisError
from graphprune.groups import Place, analyze
from graphprune.target import Target
from tests.blocks import Block
from tests.exactness import assert_cut_is_exact, random_scores

CASES: dict[str, tuple[list[nn.Module], str, dict[str, Any]]] = {
    "convolution": ([nn.Conv2d(3, 8, 3)], "0", {"out_channels": 4}),
    "depthwise": (
        [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)],
        "1",
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "grouped": (
        [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)],
        "1",
        {"in_channels": 4, "out_channels": 4},
    ),
    "transposed": (
        [nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 3)],
        "1",
        {"in_channels": 4, "out_channels": 4},
    ),
    "depthwise transposed": (
        [nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 3, groups=8)],
        "1",
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "batch norm": ([nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)], "1", {"num_features": 4}),
    "instance norm": (
        [nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True)],
        "1",
        {"num_features": 4},
    ),
    "group norm": ([nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)], "1", {"num_channels": 4}),
    "group norm of single channels": (
        [nn.Conv2d(3, 8, 1), nn.GroupNorm(8, 8)],
        "1",
        {"num_channels": 4, "num_groups": 4},
    ),
    "layer norm": (
        [nn.Conv2d(3, 8, 1), nn.LayerNorm((8, 6, 6))],
        "1",
        {"normalized_shape": (4, 6, 6)},
    ),
    "prelu": ([nn.Conv2d(3, 8, 1), nn.PReLU(8)], "1", {"num_parameters": 4}),
    "constant pad": (
        [nn.Conv2d(3, 8, 1), nn.ConstantPad3d((0, 0, 0, 0, 2, 2), 1.0), nn.Conv2d(12, 8, 1)],
        "1",
        {"padding": (0, 0, 0, 0, 1, 1)},
    ),
    "unflatten": (
        [nn.Conv2d(3, 8, 1), nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2)],
        "1",
        {"unflattened_size": (2, 2)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attributes_say_the_new_sizes(name: str) -> None:
    modules, target, expected = CASES[name]
    model = nn.Sequential(*modules, nn.Conv2d(8, 3, 1)).eval()
    program = gp.capture(model, torch.randn(1, 3, 6, 6))
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep
    assert_cut_is_exact(program, groups, keep)
    cut = cut_program(program, groups, keep)
    module = cut.program.module.get_submodule(target)
    assert {k: getattr(module, k) for k in expected} == expected
    assert dict(cut.attributes[target]) == expected


def test_linear_and_embedding() -> None:
    parts = {"table": nn.Embedding(7, 8), "fc": nn.Linear(8, 6), "out": nn.Linear(6, 2)}
    program = gp.capture(
        Block(lambda m, x: m.out(torch.relu(m.fc(m.table(x)))), **parts).eval(),
        torch.zeros(1, 4, dtype=torch.int64),
    )
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep
    cut = cut_program(program, groups, keep)
    assert cut.attributes == {
        "table": {"embedding_dim": 4},
        "fc": {"in_features": 4, "out_features": 3},
        "out": {"in_features": 3},
    }
    assert_cut_is_exact(program, groups, keep)


class Scaled(nn.Conv2d):
    """A user's subclass follows the rule of its base class."""


class Unknown(nn.Module):
    """A module with parameters that the tracer is told to leave whole."""

    __module__ = "torch.nn.unknown"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.width
        return x * self.weight


def unknown_program() -> gp.Program:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Unknown(8), nn.Conv2d(8, 3, 1)).eval()
    return gp.capture(model, torch.randn(1, 3, 6, 6))


def test_module_without_a_rule_is_refused_where_its_parameters_were_cut() -> None:
    program = unknown_program()
    groups = analyze(program)
    keep = groups.cost.everything()
    keep[groups.channels_of(Place("0.weight", 0))[:3]] = False
    with pytest.raises(AnalysisError, match="module 1 is a Unknown, whose parameters were cut"):
        cut_program(program, groups, keep)


def test_rule_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.cut.attributes._RULES", _RULES)
    program = unknown_program()
    groups = analyze(program)
    keep = groups.cost.everything()
    keep[groups.channels_of(Place("0.weight", 0))[:3]] = False
    attributes_of(Unknown)(lambda m, s, before, after: {"width": s.size(before, 1)})
    try:
        cut = cut_program(program, groups, keep)
    finally:
        del _RULES[Unknown]
    assert cut.attributes["1"] == {"width": 5}


def test_subclass_follows_its_base() -> None:
    model = nn.Sequential(Scaled(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    program = gp.capture(model, torch.randn(1, 3, 6, 6))
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep
    assert_cut_is_exact(program, groups, keep)
