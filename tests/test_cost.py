"""Cost: equal to what torch counts, before and after a cut, without running the cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphprune as gp
from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.groups import analyze
from graphprune.program import Program
from graphprune.target import parse_target
from tests import models
from tests.exactness import random_scores

TINY = ("tiny_residual", "tiny_inception", "tiny_dense", "tiny_mobile", "tiny_transformer")
ZOO: dict[str, Callable[[], nn.Module]] = {
    **{name: getattr(models, name) for name in TINY},
    "resnet20": models.resnet20,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "resnet18": torchvision.models.resnet18,
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
}


def counted(program: Program) -> tuple[int, int]:
    """Return parameters by their tensors, and MACs for one sample as torch counts them."""
    inputs = program.batch(2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.module(*inputs)
    params = sum(p.numel() for p in program.module.parameters())
    return params, counter.get_total_flops() // 2 // 2


@pytest.mark.parametrize("name", ZOO)
def test_cost_is_what_torch_counts_before_and_after_a_cut(name: str) -> None:
    size = 16 if name in TINY else 32
    program = gp.capture(ZOO[name]().eval(), torch.randn(1, 3, size, size))
    groups = analyze(program)
    assert (groups.cost.params, groups.cost.macs) == counted(program)
    choice = choose(groups, random_scores(groups, 0), parse_target("ratio=0.4"))
    predicted = groups.cost.total(choice.keep)
    cut = cut_program(program, groups, choice.keep).program
    assert predicted.macs < groups.cost.macs
    assert (predicted.params, predicted.macs) == counted(cut)


def test_nodes_add_up() -> None:
    groups = analyze(gp.capture(models.tiny_mobile(), torch.randn(1, 3, 16, 16)))
    keep = choose(groups, random_scores(groups, 0), parse_target("ratio=0.4")).keep
    for choice in (None, keep):
        nodes, total = groups.cost.per_node(choice), groups.cost.total(choice)
        assert sum(n.params for n in nodes) == total.params
        assert sum(n.macs for n in nodes) == total.macs
        assert len({n.node for n in nodes}) == len(nodes)


def test_node_costs_are_those_of_the_layer() -> None:
    groups = analyze(gp.capture(models.tiny_residual(), torch.randn(1, 3, 16, 16)))
    costs = {n.node: (n.params, n.macs) for n in groups.cost.per_node()}
    assert costs["stem_0"] == (12 * 3 * 9, 12 * 3 * 9 * 16 * 16)
    assert costs["stem_1"] == (24, 0)
    assert costs["fc"] == (20 * 10 + 10, 200)


def test_macs_are_for_one_sample_whatever_the_example() -> None:
    costs = [
        analyze(gp.capture(models.tiny_residual(), torch.randn(n, 3, 16, 16))).cost.macs
        for n in (1, 4)
    ]
    assert costs[0] == costs[1]


def test_shared_parameters_count_once_and_their_work_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(self.fc(x))
            return out

    cost = analyze(gp.capture(Twice().eval(), torch.randn(1, 4))).cost
    assert (cost.params, cost.macs) == (16, 32)
    assert [n.params for n in cost.per_node()] == [16, 0]
