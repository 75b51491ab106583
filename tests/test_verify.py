"""The proof: it passes on right cuts, and on every kind of wrong one it fails and names the first node that differs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.cost import Keep
from graphprune.cut import cut_program
from graphprune.errors import VerifyError
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.program import Program
from graphprune.verify import Masked, assert_exact, verify_surgery
from tests.models import tiny_residual
from tests.strategies import randomize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.norm = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = self.norm(self.conv2(x).mean((2, 3)))
        logits: Tensor = self.fc(x)
        return logits


@pytest.fixture
def program() -> Program:
    model = Net()
    randomize(model)
    return gp.capture(model.eval(), torch.randn(1, 3, 8, 8))


@pytest.fixture
def groups(program: Program) -> DependencyGroups:
    return analyze(program)


def without(groups: DependencyGroups, removed: dict[str, list[int]]) -> Keep:
    """Return the choice that removes indices of dimension 0 of parameters."""
    keep = groups.cost.everything()
    for name, indices in removed.items():
        keep[groups.channels_of(Place(name, 0))[indices]] = False
    assert groups.violations(keep) == []
    return keep


@pytest.fixture
def keep(groups: DependencyGroups) -> Keep:
    return without(groups, {"conv1.weight": [1, 4], "conv2.weight": [0, 5, 7]})


class DenseStatistics(nn.Module):
    """A layer norm over kept channels that still divides by the number of dense channels."""

    def __init__(self, norm: nn.LayerNorm, dense: int) -> None:
        super().__init__()
        self.norm, self.dense = norm, dense

    def forward(self, x: Tensor) -> Tensor:
        mean = x.sum(-1, keepdim=True) / self.dense
        variance = (x - mean).square().sum(-1, keepdim=True) / self.dense
        return (x - mean) * torch.rsqrt(
            variance + self.norm.eps
        ) * self.norm.weight + self.norm.bias


def swap_columns(cut: Program) -> None:
    weight = cut.module.get_parameter("conv2.weight")
    weight.data = weight.data[:, [1, 0, *range(2, weight.shape[1])]]


def swap_rows(cut: Program) -> None:
    weight = cut.module.get_parameter("conv2.weight")
    weight.data = weight.data[[1, 0, *range(2, len(weight))]]


def shift_bias(cut: Program) -> None:
    bias = cut.module.get_parameter("conv1.bias")
    bias.data = bias.data.roll(1)


def nudge_weight(cut: Program) -> None:
    with torch.no_grad():
        cut.module.get_parameter("conv2.weight")[0, 0, 0, 0] += 1e-6


def nudge_bias(cut: Program) -> None:
    with torch.no_grad():
        cut.module.get_parameter("fc.bias")[-1] += 1e-6


def nudge_statistics(cut: Program) -> None:
    with torch.no_grad():
        cut.module.get_buffer("bn.running_mean")[0] += 1e-6


def dense_statistics(cut: Program) -> None:
    norm = cut.module.get_submodule("norm")
    assert isinstance(norm, nn.LayerNorm)
    cut.module.norm = DenseStatistics(norm, 12)


def not_a_number(cut: Program) -> None:
    with torch.no_grad():
        cut.module.get_parameter("norm.weight")[0] = math.nan


def forget_relu(cut: Program) -> None:
    node = next(n for n in cut.module.graph.nodes if n.name == "relu")
    node.target = torch.clone
    node.kwargs = {}
    cut.module.recompile()


@pytest.mark.parametrize(
    ("damage", "node"),
    [
        (swap_columns, "conv2"),
        (swap_rows, "conv2"),
        (shift_bias, "conv1"),
        (nudge_weight, "conv2"),
        (nudge_bias, "fc"),
        (nudge_statistics, "bn"),
        (dense_statistics, "norm"),
        (not_a_number, "norm"),
        (forget_relu, "relu"),
    ],
)
def test_damage_is_caught_at_the_first_node_that_differs(
    program: Program,
    groups: DependencyGroups,
    keep: Keep,
    damage: Callable[[Program], None],
    node: str,
) -> None:
    cut = cut_program(program, groups, keep).program
    assert_exact(program, cut, Masked(groups, keep))
    damage(cut)
    check = verify_surgery(program, cut, Masked(groups, keep))
    assert not check.passed
    assert f"node {node} (call_" in check.detail
    assert "is the first that differs" in check.detail
    with pytest.raises(VerifyError, match=f"the surgery is not exact: node {node} "):
        assert_exact(program, cut, Masked(groups, keep))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (
            {"conv1.weight": [1, 4, 5], "conv2.weight": [0, 5, 7]},
            r"node conv1 \(call_module conv1\) has shape \(\d, 5, 8, 8\), expected \(\d, 6, 8, 8\)",
        ),
        (
            {"conv1.weight": [1], "conv2.weight": [0, 5, 7]},
            r"node conv1 \(call_module conv1\) has shape \(\d, 7, 8, 8\), expected \(\d, 6, 8, 8\)",
        ),
        (
            {"conv1.weight": [1, 4], "conv2.weight": [0, 5, 8]},
            r"node conv2 \(call_module conv2\) is the first that differs",
        ),
        ({}, r"node conv1 \(call_module conv1\) has shape \(\d, 8, 8, 8\)"),
    ],
    ids=["one too many", "one too few", "another channel", "nothing"],
)
def test_cut_of_other_channels_is_caught(
    program: Program,
    groups: DependencyGroups,
    keep: Keep,
    removed: dict[str, list[int]],
    message: str,
) -> None:
    cut = cut_program(program, groups, without(groups, removed)).program
    with pytest.raises(VerifyError, match=message):
        assert_exact(program, cut, Masked(groups, keep))


def test_column_too_many_in_one_parameter_is_caught(
    program: Program, groups: DependencyGroups, keep: Keep
) -> None:
    cut = cut_program(program, groups, keep).program
    weight = cut.module.get_parameter("conv2.weight")
    weight.data = weight.data[:, :-1]
    check = verify_surgery(program, cut, Masked(groups, keep))
    assert not check.passed
    assert "the cut program does not run" in check.detail


def test_difference_that_the_outputs_hide_is_caught(
    program: Program, groups: DependencyGroups, keep: Keep
) -> None:
    with torch.no_grad():
        program.module.get_parameter("fc.weight").zero_()
    cut = cut_program(program, groups, keep).program
    swap_columns(cut)
    assert verify_surgery(program, cut).passed, "the outputs are equal"
    check = verify_surgery(program, cut, Masked(groups, keep))
    assert not check.passed
    assert "node conv2 " in check.detail


def test_removed_channels_without_effect_cannot_excuse_a_wrong_mask(
    program: Program, groups: DependencyGroups, keep: Keep
) -> None:
    """The dense program is not what a cut promises: its removed channels still count."""
    cut = cut_program(program, groups, keep).program
    assert not verify_surgery(program, cut).passed


def test_proof_changes_neither_program(
    program: Program, groups: DependencyGroups, keep: Keep
) -> None:
    cut = cut_program(program, groups, keep).program
    before = [(str(p), [t.clone() for _, t in p.named_tensors()]) for p in (program, cut)]
    assert_exact(program, cut, Masked(groups, keep))
    assert torch.get_default_dtype() == torch.float32
    for p, (text, values) in zip((program, cut), before, strict=True):
        assert str(p) == text
        for (_, tensor), value in zip(p.named_tensors(), values, strict=True):
            assert tensor.dtype == value.dtype
            assert torch.equal(tensor, value)


def test_proof_says_what_it_compared(
    program: Program, groups: DependencyGroups, keep: Keep
) -> None:
    cut = cut_program(program, groups, keep).program
    check = verify_surgery(program, cut, Masked(groups, keep))
    assert check.passed
    assert check.tolerance == 1e-9
    assert check.max_abs_err is not None
    assert check.max_abs_err < 1e-12
    assert check.detail == (
        "float64, masked program on 2 random samples, relative to the largest value"
    )


class TestOtherSurgery:
    """Without a mask, only the outputs are compared."""

    def test_equal_outputs_pass(self) -> None:
        program = gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16))
        check = verify_surgery(program, program.clone())
        assert check.passed
        assert check.max_abs_err == 0.0
        assert "program before" in check.detail

    @pytest.mark.parametrize("amount", [1e-6, math.nan, math.inf])
    def test_other_values_fail(self, amount: float) -> None:
        program = gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16))
        after = program.clone()
        with torch.no_grad():
            after.module.get_parameter("fc.bias")[0] += amount
        check = verify_surgery(program, after)
        assert not check.passed

    def test_other_shapes_fail(self) -> None:
        program = gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16))
        after = program.clone()
        for name in ("fc.weight", "fc.bias"):
            parameter = after.module.get_parameter(name)
            parameter.data = parameter.data[:-1]
        check = verify_surgery(program, after)
        assert not check.passed
        assert check.detail == "outputs have shapes [(2, 9)], expected [(2, 10)]"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 3 * 2 * 4)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
            for p in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class TestHeadDim:
    """Columns of a head go; the scale is a constant of the model and stays."""

    @pytest.fixture
    def program(self) -> Program:
        return gp.capture(Attention().eval(), torch.randn(1, 5, 6))

    @pytest.fixture
    def keep(self, groups: DependencyGroups) -> Keep:
        keep = groups.cost.everything()
        channels = groups.channels_of(Place("qkv.weight", 0))
        keep[channels[[0, 4]]] = False  # the first query column of both heads, and so the keys'
        assert groups.violations(keep) == []
        return keep

    def test_old_scale_is_written_down(
        self, program: Program, groups: DependencyGroups, keep: Keep
    ) -> None:
        cut = cut_program(program, groups, keep)
        weight = cut.program.module.get_parameter("qkv.weight")
        assert weight.shape == (3 * 2 * 4 - 4, 6)
        node = next(n for n in cut.program.module.graph.nodes if "scaled_dot_product" in n.name)
        assert node.kwargs["scale"] == pytest.approx(4**-0.5)
        assert_exact(program, cut.program, Masked(groups, keep))

    def test_new_scale_is_caught(
        self, program: Program, groups: DependencyGroups, keep: Keep
    ) -> None:
        cut = cut_program(program, groups, keep).program
        node = next(n for n in cut.module.graph.nodes if "scaled_dot_product" in n.name)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}
        cut.module.recompile()
        with pytest.raises(VerifyError, match="node scaled_dot_product_attention "):
            assert_exact(program, cut, Masked(groups, keep))


def test_mask_covers_atoms_and_not_channels(groups: DependencyGroups, keep: Keep) -> None:
    atoms = Masked(groups, keep).atoms
    assert atoms.shape == groups.channel_of.shape
    assert np.array_equal(atoms, keep[groups.channel_of])
