"""Choosing residual blocks: the least missed go first, as many as the target asks for, and errors say why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.data import load_data
from graphprune.errors import DataError, GraphpruneError, TargetError, UsageError
from graphprune.groups import analyze
from graphprune.passes.analysis.choose_blocks import ChooseBlocks
from graphprune.pipeline import Pipeline
from graphprune.plan import Plan
from graphprune.program import Program
from tests import gate_networks

pytest.importorskip("sklearn")


class _Stack(nn.Module):
    """Four equal blocks, which matter by a factor each."""

    def __init__(self, factors: tuple[float, ...] = (1.0, 0.01, 0.5, 0.0)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in factors)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            for layer, factor in zip(self.layers, factors, strict=True):
                layer.weight.mul_(factor)  # type: ignore[operator]
                layer.bias.mul_(factor)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = x + layer(x)
        result: Tensor = self.head(x)
        return result


@pytest.fixture(scope="module")
def stack() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return gp.capture(_Stack().eval(), torch.randn(2, 1, 8, 8))


def _plan(program: Program, options: str) -> Plan:
    text = f"dependency-groups,choose-blocks{{{options}}}"
    plan = Pipeline.parse(text).run(program, data=load_data("digits")).facts[Plan]
    assert isinstance(plan, Plan)
    return plan


def test_what_new_statistics_make_good_is_not_missed() -> None:
    data = load_data("digits")
    model = _Stack((0.3, 0.0))
    norm = nn.BatchNorm1d(64, momentum=None)
    model.head = nn.Sequential(norm, model.head)  # type: ignore[assignment]
    with torch.no_grad():
        model.layers[1].bias.fill_(5.0)  # type: ignore[operator]
        for x, _ in data.train(128):
            model(x)
    model.eval()
    for size, first in ((64, "layers.1"), (2, "layers.0")):  # two samples are no statistics
        exported = torch.export.export(model, (torch.randn(size, 1, 8, 8),))
        program = gp.capture(exported)
        before = {name: value.clone() for name, value in program.named_tensors()}
        assert _plan(program, 'target="macs=0.9"').blocks == (first,)
        assert all(torch.equal(value, before[name]) for name, value in program.named_tensors())
    program = gp.capture(model, torch.randn(2, 1, 8, 8))  # takes batches of any size
    assert _plan(program, 'target="macs=0.9"').blocks == ("layers.1",)
    assert _plan(program, 'target="macs=0.9" batch_size=2').blocks == ("layers.0",)
    assert len(_plan(program, 'target="macs=0.9" num_samples=1').blocks) == 1


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ('target="macs=1.0"', ()),
        ('target="macs=0.9"', ("layers.3",)),
        ('target="macs=0.6"', ("layers.1", "layers.3")),
        ('target="params=0.3"', ("layers.1", "layers.2", "layers.3")),
        ('target="macs=0.3" share=0.5', ("layers.1", "layers.3")),  # half of the way is 0.55
        ('target="macs=0.001" share=0.9', ("layers.0", "layers.1", "layers.2", "layers.3")),
        ('target="macs=9000"', ("layers.1", "layers.3")),
        ('target="macs=0.9,params=0.6"', ("layers.1", "layers.3")),
    ],
)
def test_the_least_missed_go_first(stack: Program, options: str, blocks: tuple[str, ...]) -> None:
    plan = _plan(stack, options)
    assert plan.blocks == blocks
    assert plan.slices == {}
    assert plan.method == "choose-blocks"
    result = Pipeline.parse(f"dependency-groups,choose-blocks{{{options}}},remove-blocks").run(
        stack, data=load_data("digits")
    )
    assert result.passed
    assert result.removed.blocks == blocks
    dense = analyze(stack).cost
    assert analyze(result.program).cost.macs == dense.macs - 64 * 64 * len(blocks)
    assert result.facts[Plan] == plan


def test_a_target_out_of_reach_says_what_is_left(stack: Program) -> None:
    with pytest.raises(
        TargetError, match="without any of its 4 residual blocks .* has 640 MACs"
    ) as error:
        _plan(stack, 'target="macs=0.01"')
    assert "granularity channels,blocks" in str(error.value)
    chain = gp.capture(gate_networks.branches(), torch.randn(2, 1, 8, 8))
    with pytest.raises(TargetError, match="has no residual block: no sum of a tensor and"):
        _plan(chain, 'target="macs=0.5"')


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "ratio=0.5"}, TargetError, r"expected a target of macs= or params=, found 'ra"),
        ({"target": "latency=0.5"}, TargetError, r"of macs= or params=, found 'latency=0.5'"),
        ({"share": 0.0}, UsageError, "share above 0 up to 1, found 0"),
        ({"num_samples": 0}, UsageError, "at least one sample, found num_samples=0"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_pass(
    stack: Program, options: dict[str, object], error: type[GraphpruneError], message: str
) -> None:
    pipeline = Pipeline([ChooseBlocks(**options)])  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        pipeline.run(stack, data=load_data("digits"))


def test_it_needs_data(stack: Program) -> None:
    with pytest.raises(DataError, match="choose-blocks expected training data, found none"):
        Pipeline([ChooseBlocks()]).run(stack)
