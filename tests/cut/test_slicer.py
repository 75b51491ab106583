"""The slicer: one function for every tensor, and a copy that shares nothing with what went in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.cut.slicer import slice_tensor
from graphprune.groups import analyze
from graphprune.program import Program
from graphprune.target import Target
from tests.blocks import Block
from tests.exactness import random_scores
from tests.models import tiny_mobile


@pytest.fixture
def program() -> Program:
    return gp.capture(tiny_mobile(), torch.randn(1, 3, 16, 16))


def test_slices_along_every_dimension() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    kept = {1: torch.tensor([0, 2]), 2: torch.tensor([1, 2, 3])}
    assert torch.equal(slice_tensor(tensor, kept), tensor[:, [0, 2]][:, :, [1, 2, 3]])


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameter_stays_a_parameter(requires_grad: bool) -> None:
    parameter = nn.Parameter(torch.rand(3, 2), requires_grad=requires_grad)
    found = slice_tensor(parameter, {0: torch.tensor([2])})
    assert isinstance(found, nn.Parameter)
    assert found.requires_grad is requires_grad
    assert torch.equal(found, parameter[[2]])


def test_whole_tensor_is_copied() -> None:
    tensor = torch.rand(3)
    found = slice_tensor(tensor, {})
    found.zero_()
    assert tensor.abs().sum() > 0


def test_cut_shares_nothing_with_its_input(program: Program) -> None:
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.3)).keep
    cut = cut_program(program, groups, keep).program
    storages = {t.untyped_storage().data_ptr() for _, t in program.named_tensors()}
    assert all(t.untyped_storage().data_ptr() not in storages for _, t in cut.named_tensors())
    modules = {id(m) for m in program.module.modules()}
    assert all(id(m) not in modules for m in cut.module.modules())


def test_history_says_what_was_done(program: Program) -> None:
    groups = analyze(program)
    cut = cut_program(program, groups, groups.cost.everything(), step="cut nothing").program
    assert cut.history == ("cut nothing",)
    assert str(cut).splitlines()[-1] == "  after cut nothing"


def test_tied_parameters_stay_tied() -> None:
    shared = nn.Linear(6, 6)
    other = nn.Linear(6, 6)
    other.weight = shared.weight
    parts = {"a": shared, "b": other, "stem": nn.Linear(3, 6), "out": nn.Linear(6, 2)}
    model = Block(lambda m, x: m.out(m.b(torch.relu(m.a(m.stem(x))))), **parts).eval()
    program = gp.capture(model, torch.randn(1, 3))
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep
    cut = cut_program(program, groups, keep).program.module
    assert cut.get_parameter("a.weight") is cut.get_parameter("b.weight")
    assert cut.get_parameter("a.weight").shape == (3, 3)


def test_plain_tensor_attribute_is_cut_along() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.offset = torch.rand(6, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x) + self.offset)
            return out

    program = gp.capture(Offset().eval(), torch.randn(1, 3, 4, 4))
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep
    cut = cut_program(program, groups, keep).program
    assert cut.module(torch.randn(2, 3, 4, 4)).shape == (2, 2, 4, 4)
