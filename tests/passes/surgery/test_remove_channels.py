"""Removing channels: printed form, meaning, accounting; and that a second run finds nothing to do."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.budget import choose
from graphprune.contract import Context, SurgeryResult
from graphprune.groups import DependencyGroups, analyze
from graphprune.pipeline import Pipeline
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.target import Target
from graphprune.verify import assert_exact
from tests.exactness import capture_as, random_scores
from tests.strategies import randomize


class Net(nn.Module):
    """A shortcut that pads channels, a split, and a flatten: one size of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = self.conv2(x) + F.pad(x, (0, 0, 0, 0, 2, 2))
        a, b = x.split(6, dim=1)
        logits: Tensor = self.fc((a * b).reshape(-1, 6 * 16))
        return logits


def network() -> nn.Module:
    model = Net()
    randomize(model)
    return model.eval()


def context_of(program: Program, ratio: float) -> Context:
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=ratio)).keep
    facts = {DependencyGroups: groups, Plan: Plan.of(program, groups, keep)}
    return Context(facts=facts, dense=program)


def assert_removal(program: Program, ratio: float) -> Program:
    """Check meaning and accounting of the pass, and that doing it with an empty plan does nothing."""
    before = str(program)
    context = context_of(program, ratio)
    (remove_channels,) = Pipeline.parse("remove-channels").passes
    groups, plan = context.need(DependencyGroups), context.need(Plan)
    result = remove_channels.run(program, context)
    assert isinstance(result, SurgeryResult)
    assert_exact(program, result.program, result.reference)
    with torch.inference_mode():
        outputs = result.program.module(*program.batch(4))
    assert bool(torch.isfinite(outputs).all())
    assert float(outputs.std()) > 0
    assert result.modified
    assert result.removed == plan.removed
    assert result.removed.channels > 0
    assert result.kept == groups.kept
    assert analyze(result.program).cost.total() == groups.cost.total(plan.keep(program, groups))
    assert str(program) == before
    again = remove_channels.run(result.program, context_of(result.program, 0.0))
    assert isinstance(again, SurgeryResult)
    assert not again.modified
    assert again.program is result.program
    assert not again.removed
    return result.program


class TestPrintedForm(expecttest.TestCase):
    def test_fx(self) -> None:
        torch.manual_seed(0)
        cut = assert_removal(capture_as(network(), torch.randn(1, 3, 4, 4), "fx"), 0.5)
        self.assertExpectedInline(
            str(cut),
            """\
program Net (fx, dynamic batch) inputs [float32[1, 3, 4, 4]]
  %x = input
  %conv1 = conv1(%x) : Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
  %norm = norm(%conv1) : BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
  %relu = torch.nn.functional.relu(%norm, inplace=False)
  %conv2 = conv2(%relu) : Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
  %pad = torch.nn.functional.pad(%relu, (0, 0, 0, 0, 2, 0), mode='constant', value=None)
  %add = operator.add(%conv2, %pad)
  %split = .split(%add, 3, dim=1)
  %getitem = operator.getitem(%split, 0)
  %getitem_1 = operator.getitem(%split, 1)
  %mul = operator.mul(%getitem, %getitem_1)
  %reshape = .reshape(%mul, -1, 48)
  %fc = fc(%reshape) : Linear(in_features=48, out_features=5, bias=True)
  return %fc
  after remove-channels: 3 channels""",
        )

    def test_export(self) -> None:
        torch.manual_seed(0)
        cut = assert_removal(capture_as(network(), torch.randn(1, 3, 4, 4), "export"), 0.5)
        self.assertExpectedInline(
            str(cut),
            """\
program Net (export, dynamic batch) inputs [float32[1, 3, 4, 4]]
  %conv1_weight = attribute conv1.weight : float32[4, 3, 3, 3]
  %conv1_bias = attribute conv1.bias : float32[4]
  %norm_weight = attribute norm.weight : float32[4]
  %norm_bias = attribute norm.bias : float32[4]
  %conv2_weight = attribute conv2.weight : float32[6, 4, 3, 3]
  %conv2_bias = attribute conv2.bias : float32[6]
  %fc_weight = attribute fc.weight : float32[5, 48]
  %fc_bias = attribute fc.bias : float32[5]
  %norm_running_mean = attribute norm.running_mean : float32[4]
  %norm_running_var = attribute norm.running_var : float32[4]
  %x = input
  %conv2d = aten.conv2d.default(%x, %conv1_weight, %conv1_bias, [1, 1], [1, 1])
  %batch_norm = aten.batch_norm.default(%conv2d, %norm_weight, %norm_bias, %norm_running_mean, %norm_running_var, False, 0.1, 1e-05, False)
  %relu = aten.relu.default(%batch_norm)
  %conv2d_1 = aten.conv2d.default(%relu, %conv2_weight, %conv2_bias, [1, 1], [1, 1])
  %pad = aten.pad.default(%relu, [0, 0, 0, 0, 2, 0])
  %add = aten.add.Tensor(%conv2d_1, %pad)
  %split = aten.split.Tensor(%add, 3, 1)
  %getitem = operator.getitem(%split, 0)
  %getitem_1 = operator.getitem(%split, 1)
  %mul = aten.mul.Tensor(%getitem, %getitem_1)
  %reshape = aten.reshape.default(%mul, (-1, 48))
  %linear = aten.linear.default(%reshape, %fc_weight, %fc_bias)
  return %linear
  after remove-channels: 3 channels""",  # noqa: E501 - printed form
        )


@pytest.mark.parametrize("ratio", [0.2, 0.34, 0.75])
def test_removal_is_exact_and_accounted_for(ratio: float) -> None:
    assert_removal(capture_as(network(), torch.randn(1, 3, 4, 4), "fx"), ratio)


def test_driver_proves_the_cut_and_drops_the_facts() -> None:
    program = gp.capture(network(), torch.randn(1, 3, 4, 4))
    text = 'dependency-groups,magnitude,choose-channels{target="macs=0.5"},remove-channels'
    result = Pipeline.parse(text).run(program)
    assert result.checks["surgery"].passed
    assert [r.modified for r in result.records] == [False, False, False, True]
    assert result.program.history[0].startswith("remove-channels: ")
    plan = result.facts[Plan]
    assert isinstance(plan, Plan)
    assert result.removed == plan.removed
