"""A program is compared with the model that it was captured from."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import CaptureError
from graphprune.verify_capture import verify_capture


class Net(nn.Module):
    """A model with a number that its own code may change."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).relu().mean((2, 3))) * self.factor
        return out


class Noisy(Net):
    """Gives something else at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


def test_equal_outputs_pass() -> None:
    model = Net().eval()
    check = verify_capture(model, gp.capture(model, torch.randn(1, 3, 8, 8)))
    assert check.passed
    assert check.max_abs_err == 0.0


@pytest.mark.parametrize(("factor", "error"), [(1.5, 1 / 3), (math.nan, math.inf)])
def test_other_outputs_do_not(factor: float, error: float) -> None:
    model = Net().eval()
    program = gp.capture(model, torch.randn(1, 3, 8, 8))
    model.factor = factor
    check = verify_capture(model, program)
    assert not check.passed
    assert check.max_abs_err == pytest.approx(error, rel=1e-3)


def test_a_model_that_is_random_is_said_to_be() -> None:
    model = Noisy().eval()
    check = verify_capture(model, gp.capture(model, torch.randn(1, 3, 8, 8)))
    assert check.passed
    assert "something else at every call" in check.detail


def test_compile_reports_it_and_refuses_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    check = gp.compile(model, x, target="ratio=0.5", export=False).report.checks["capture"]
    assert check is not None
    assert check.passed
    other = gp.capture(Net(2.0).eval(), x)
    monkeypatch.setattr(sys.modules["graphprune.capture"], "capture", lambda *_, **__: other)
    with pytest.raises(CaptureError, match="does not compute what the model computes"):
        gp.compile(model, x, target="ratio=0.5", export=False)
    assert gp.compile(model, x, target="ratio=0.5", export=False, verify=False).plan is not None


def test_half_precision_may_round() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval().bfloat16()
    program = gp.capture(model, torch.randn(2, 5, 16, dtype=torch.bfloat16))
    check = verify_capture(model, program)
    assert check.passed
    assert check.tolerance > 1e-2


def test_an_exported_program_is_compiled_as_it_is() -> None:
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(Net().eval(), (x,))
    result = gp.compile(exported, x, target="ratio=0.5", export=False)  # type: ignore[arg-type]
    assert result.report.removed.channels
    assert "capture" not in result.report.checks
