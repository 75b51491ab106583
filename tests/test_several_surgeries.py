"""Pipelines of several surgeries: one plan tells all that went, or the report says why none can."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import graphprune as gp
from graphprune.compiler import CompileResult
from graphprune.contract import Context, Pass, SurgeryResult
from graphprune.data import DataSource
from graphprune.errors import PlanError
from graphprune.pipeline import Pipeline
from graphprune.program import Program, Slices, compose

X = torch.zeros(1, 8)
CUT = 'dependency-groups,magnitude,choose-channels{target="macs=%s"},remove-channels,clean-up'
BLOCKS = 'dependency-groups,choose-blocks{target="macs=%s"},remove-blocks'


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 16] to the same."""
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Gated(nn.Module):
    """Two branches in one block, of which a cut may make either the larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(16, 60), nn.ReLU(), nn.Linear(60, 16))
        self.gate = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.last = Block(12)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 16] to the same."""
        out: Tensor = self.last(x + self.deep(x) * self.gate(x))
        return out


def stack(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 3)).eval()


def blocks(count: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return stack(*(Block(12) for _ in range(count)))


def compiled(model: nn.Module, passes: str | Pipeline) -> CompileResult:
    samples = TensorDataset(torch.randn(40, 8), torch.arange(40) % 3)
    data = DataSource(name="noise", input_shape=(8,), num_classes=3, split=lambda _: samples)
    return gp.compile(model, X, data=data, passes=passes, export=False)


def must_replay(result: CompileResult, model: nn.Module) -> None:
    assert result.passed
    assert result.plan is not None
    again = gp.apply(result.plan, model, X, export=False)
    assert again.passed
    y = torch.randn(5, 8)
    assert torch.equal(again.program.module(y), result.program.module(y))


@pytest.mark.parametrize(
    "steps",
    [
        (BLOCKS % 0.8, BLOCKS % 0.5),
        (BLOCKS % 0.5, BLOCKS % 0.6),
        (CUT % 0.9, BLOCKS % 0.7, CUT % 0.6, BLOCKS % 0.4),
        (BLOCKS % 0.8, CUT % 0.5, CUT % 0.3),
    ],
)
def test_blocks_and_channels_go_in_turns(steps: tuple[str, ...]) -> None:
    model = blocks()
    result = compiled(model, ",".join(steps))
    must_replay(result, model)
    assert result.plan is not None
    assert set(result.plan.blocks) == set(result.report.removed.blocks)
    assert result.plan.blocks


def test_a_block_that_a_cut_has_renamed_is_told_by_the_name_that_it_had() -> None:
    model = stack(Gated())
    with torch.no_grad():
        model.get_parameter("1.deep.0.weight")[4:] *= 1e-3
        model.get_parameter("1.deep.2.weight")[:, 4:] *= 1e-3
        model.get_parameter("1.gate.0.weight").mul_(10)
    text = f"{CUT % 0.4},dependency-groups,remove-blocks{{names=(1.gate)}}"
    result = compiled(model, text)
    assert result.report.removed.blocks == ("1.gate",)
    assert result.plan is not None
    assert result.plan.blocks == ("1.deep",)
    must_replay(result, model)


def test_tied_weights_whose_first_holder_goes_are_told_of_the_next() -> None:
    model = blocks(3)
    for number in (2, 3):
        later = model.get_submodule(f"{number}.up")
        later.weight = model.get_parameter("1.up.weight")
    text = f"{CUT % 0.8},dependency-groups,remove-blocks{{names=(1)}},{CUT % 0.3}"
    result = compiled(model, text)
    must_replay(result, model)
    assert result.plan is not None
    assert "2.up.weight" in result.plan.slices


@dataclass(frozen=True, kw_only=True)
class Reshape(Pass):
    """A surgery that changes a layer's width by itself, and leaves no note of it."""

    name: ClassVar[str] = "reshape"
    grow: bool

    def run(self, program: Program, context: Context) -> SurgeryResult:
        """Give the first block one hidden unit more, which nobody reads, or take away its first."""
        module = copy.deepcopy(program.module)
        up, down = (module.get_submodule(f"1.{name}") for name in ("up", "down"))
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        with torch.no_grad():
            if self.grow:
                up.weight = nn.Parameter(torch.cat([up.weight, up.weight[:1]]))
                up.bias = nn.Parameter(torch.cat([up.bias, up.bias[:1]]))
                down.weight = nn.Parameter(torch.cat([down.weight, 0 * down.weight[:, :1]], 1))
            else:
                up.weight, up.bias = nn.Parameter(up.weight[1:]), nn.Parameter(up.bias[1:])
                down.weight = nn.Parameter(down.weight[:, 1:])
        return SurgeryResult(program=program.evolve(module, step=self.spec()), modified=True)


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_surgery_without_a_note_ends_the_plan_and_not_the_run(at: int, grow: bool) -> None:
    model = blocks(2)
    with torch.no_grad():
        model.get_parameter("1.down.weight")[:, 0] = 0.0
    parts = [Pipeline.parse(CUT % target).passes for target in (0.8, 0.5)]
    parts.insert(at, (Reshape(grow=grow),))
    samples = Pipeline([step for part in parts for step in part])
    result = gp.compile(model, X, passes=samples, export=False, verify=False)
    assert result.plan is None
    whys = [kept.why for kept in result.report.kept if kept.what == "plan.json"]
    assert whys == ["a surgery of somebody else's has cut 1.up.weight, and left no note of it"]
    assert result.report.target == "macs=0.5"
    with pytest.raises(PlanError, match="expected a result with a plan, but a surgery of somebody"):
        result.apply_to(model)


def test_cuts_compose() -> None:
    first: Slices = {"a": {0: (0, 2, 3, 5), 1: (1, 2)}, "b": {0: (4,)}}
    second: Slices = {"a": {0: (1, 3)}, "c": {1: (0,)}}
    assert compose(first, second) == {
        "a": {0: (2, 5), 1: (1, 2)},
        "b": {0: (4,)},
        "c": {1: (0,)},
    }
