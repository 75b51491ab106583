"""Fold-constants: numbers move into biases where that is exact, outputs stay, and whatever is not certain stays too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.capture import capture
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.program import Program
from tests.exactness import capture_as, outputs_of

FOLD = "dependency-groups,fold-constants,dependency-groups,remove-zeros"


class _Net(nn.Module):
    """Readers of every kind: without padding and bias, grouped, padded with zeros, padded otherwise, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="circular")
        self.bn3 = nn.BatchNorm2d(8)
        self.conv4 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1 = nn.Linear(8, 10)
        self.fc2 = nn.Linear(10, 5, bias=False)
        for bn in (self.bn1, self.bn2, self.bn3):
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        x = torch.relu(self.conv4(x)).mean((2, 3))
        out: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return out


def _net() -> _Net:
    torch.manual_seed(0)
    model = _Net().eval()
    with torch.no_grad():
        for bn in (model.bn1, model.bn2, model.bn3):
            bn.weight[[1, 2, 5, 6]] = 0
            bn.bias[[1, 2, 5, 6]] = torch.tensor([0.7, 0.7, -0.7, 1.5])  # channel 5: a dead ReLU
        model.fc1.weight[4] = 0
        model.fc1.bias[4] = 2.0
    return model


def _run(program: Program, pipeline: str = FOLD) -> PipelineResult:
    before = outputs_of(program)
    result = Pipeline.parse(pipeline).run(program)
    assert result.passed, result.checks
    for old, again in zip(before, outputs_of(program), strict=True):
        torch.testing.assert_close(old, again, rtol=0, atol=0)  # what came in stays as it was
    for old, new in zip(before, outputs_of(result.program), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    return result


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_constants_become_biases_and_go(dialect: str) -> None:
    program = capture_as(_net(), torch.randn(2, 3, 9, 9), dialect)
    result = _run(program)
    sizes = {n: tuple(p.shape) for n, p in result.program.module.named_parameters()}
    assert sizes["conv1.weight"] == (4, 3, 3, 3)  # all four: conv2 reads them without padding
    assert sizes["conv2.weight"] == (4, 4, 1, 1)  # and so does conv3, as circles have no border
    # conv4 pads with zeros, so only the dead one of conv3 could go, and its two groups stay equal
    assert sizes["conv3.weight"] == (8, 2, 3, 3)
    assert sizes["fc2.weight"] == (5, 9)
    assert any("3 constant channels" in kept.what for kept in result.kept)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_layers_without_a_bias_get_one(dialect: str) -> None:
    program = capture_as(_net(), torch.randn(2, 3, 9, 9), dialect)
    result = _run(program, "dependency-groups,fold-constants")
    before = {n for n, _ in program.module.named_parameters()}
    after = {n for n, _ in result.program.module.named_parameters()}
    assert len(after - before) == 2  # conv2's and fc2's
    again = Pipeline.parse("dependency-groups,fold-constants").run(result.program)
    assert not again.records[-1].modified


def test_nothing_constant_is_nothing_to_do() -> None:
    torch.manual_seed(0)
    result = _run(capture(_Net().eval(), torch.randn(2, 3, 9, 9)))
    assert not any(record.modified for record in result.records)


class _Tied(nn.Module):
    """A matrix that reads a constant, and is used a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.second(x) + 1) + self.second(torch.relu(self.first(x)))
        return y


def test_weights_that_are_used_twice_stay() -> None:
    torch.manual_seed(0)
    model = _Tied().eval()
    with torch.no_grad():
        model.first.weight[2] = 0
        model.first.bias[2] = 1.0
    result = _run(capture(model, torch.randn(2, 6)))
    assert not any(record.modified for record in result.records)


def test_a_constant_that_is_read_elsewhere_stays() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.second = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            z: Tensor = self.second(y) + y.sum(1, keepdim=True)
            return z

    torch.manual_seed(0)
    model = Sum().eval()
    with torch.no_grad():
        model.first.weight[2] = 0
        model.first.bias[2] = 1.0
    result = _run(capture(model, torch.randn(2, 6)))
    assert not any(record.modified for record in result.records)


def test_biases_that_have_to_be_rounded_are_equal_to_their_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)
    ).eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[:3], norm.bias[:3] = 0.0, 1.1
    result = _run(capture(model, torch.randn(1, 1, 9, 9)))
    assert result.removed.channels == 3
    error = result.checks["surgery"].max_abs_err
    assert error is not None
    assert 1e-9 < error < 1e-6
