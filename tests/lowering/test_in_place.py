"""``y += x`` is captured as what it is: a write where others see it, plain arithmetic where nobody can."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from tests.models import resnet20

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Two convolutions, and a function of them."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 8, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.run(self, x)
        return out


def held_by_a_list(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    states = [y]
    y += m.b(y)
    return torch.cat([y, *states], 1)


def part_of_another(m: Any, x: Tensor) -> Any:
    y = m.a(x) * 2
    u, v = y.chunk(2, 1)
    u *= v.sigmoid()
    u -= 1
    u /= 2
    return y + m.b(y)


def of_its_own(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = m.b(y)
    z += y
    z *= 2
    return z.relu()


def of_an_activation(m: Any, x: Tensor) -> Any:
    y = F.relu(m.a(x))
    y += 1
    z = m.b(y).sigmoid()
    z *= y
    return z


def of_an_activation_in_place(m: Any, x: Tensor) -> Any:
    """The sum is in `y` too."""
    y = m.a(x)
    z = F.relu(y, inplace=True)
    z += 1
    return y + m.b(z)


def a_number(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    height = y.shape[2]
    old = height
    height += 2
    return y.reshape(y.shape[0], -1, old, height - 2)


def program_of(run: Forward) -> tuple[nn.Module, gp.Program]:
    torch.manual_seed(0)
    net = Net(run).eval()
    return net, gp.capture(net, torch.randn(2, 3, 4, 4))


def in_place(program: gp.Program) -> list[str]:
    targets = [node.target for node in program.module.graph.nodes if node.op == "call_function"]
    names = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
    return [getattr(t, "__name__", "") for t in targets if t in names]


@pytest.mark.parametrize(
    ("run", "writes"),
    [
        (held_by_a_list, ["iadd"]),
        (part_of_another, ["imul", "isub", "itruediv"]),
        (of_its_own, []),
        (of_an_activation, []),
        (of_an_activation_in_place, ["iadd"]),
        (a_number, []),
    ],
)
def test_the_graph_computes_what_the_model_computes(run: Forward, writes: list[str]) -> None:
    net, program = program_of(run)
    assert program.dialect == "fx"
    assert in_place(program) == writes
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(program.module(x), net(x))


def test_a_residual_network_has_no_writes() -> None:
    program = gp.capture(resnet20().eval(), torch.randn(1, 3, 32, 32))
    assert in_place(program) == []
    assert operator.add in [node.target for node in program.module.graph.nodes]


@pytest.mark.parametrize("run", [held_by_a_list, part_of_another])
def test_writes_are_cut_and_exported(run: Forward) -> None:
    net = Net(run).eval()
    model = nn.Sequential(net, nn.Conv2d(16 if run is held_by_a_list else 8, 4, 1)).eval()
    report = gp.compile(model, torch.randn(1, 3, 4, 4), target="ratio=0.5", round_to=1).report
    assert {"capture", "surgery", "onnx", "exported_program"} <= set(report.checks)
    assert all(check is not None and check.passed for check in report.checks.values())
    assert report.removed.channels


def added_to_a_constant(m: Any, x: Tensor) -> Any:
    weights = torch.tensor([1.0, 2.0]).repeat(4)
    weights += x.mean()
    return m.b(m.a(x)) * weights.view(1, 8, 1, 1)


def written_into_a_constant(m: Any, x: Tensor) -> Any:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).view(2, 4)
    weights[0] = x.sum()
    return m.b(m.a(x)) * weights.sum(0).repeat(2).view(1, 8, 1, 1)


@pytest.mark.parametrize("run", [added_to_a_constant, written_into_a_constant])
@pytest.mark.parametrize("is_exported", [False, True])
def test_a_constant_is_made_anew_in_every_call(run: Forward, is_exported: bool) -> None:
    net, x = Net(run).eval(), torch.randn(2, 3, 5, 5)
    program = gp.capture(torch.export.export(net, (x,)) if is_exported else net, x)
    assert program.dialect == "export"
    for seed in range(3):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(program.module(x), net(x))
    result = gp.compile(program, target="macs=0.6", export=False)
    surgery = result.report.checks["surgery"]
    assert surgery is not None
    assert surgery.passed
