"""Clean-up: what nothing needs goes; whatever writes into a tensor that is read later stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune import registry
from graphprune.capture import capture
from graphprune.contract import Context, SurgeryResult
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from tests.exactness import capture_as


def _slice_method(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2:5].zero_()
    return y


def _slice_function(x: Tensor) -> Tensor:
    y = x.clone()
    torch.relu_(y[:, 2:5])
    return y


def _item(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2:5] = 1.0
    return y


def _keyword(x: Tensor) -> Tensor:
    y = x.clone()
    F.relu(y, inplace=True)
    return y


def _position(x: Tensor) -> Tensor:
    y = x.clone()
    F.relu(y, True)
    return y


def _out(x: Tensor) -> Tensor:
    y = x.clone()
    torch.mul(x, 2.0, out=y)
    return y


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.function(x))
        return result


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        self.relu(y)
        result: Tensor = self.head(y)
        return result


def _clean(program: Program) -> SurgeryResult:
    result = registry.load("clean-up")().run(program, Context(facts={}, dense=program))
    assert isinstance(result, SurgeryResult)
    return result


@pytest.mark.parametrize(
    "model",
    [
        *(_Function(f) for f in (_slice_method, _slice_function, _item)),
        *(_Function(f) for f in (_keyword, _position, _out)),
        _Module(),
    ],
    ids=lambda m: m.function.__name__ if isinstance(m, _Function) else "module",
)
def test_writes_stay(model: nn.Module) -> None:
    program = capture(model, torch.randn(2, 8))
    assert program.dialect == "fx"
    result = _clean(program)
    assert not result.modified
    x = torch.randn(4, 8)
    expected = model(x)
    assert not torch.equal(expected, model.head(x))  # type: ignore[operator]
    assert torch.equal(result.program.module(x), expected)


class _Wasteful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.same = nn.Identity()
        self.unused = nn.Linear(6, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.first(x))
        torch.add(self.unused(x), 1.0)
        self.relu(x)
        result: Tensor = x * 2
        return result


def test_what_nothing_needs_goes_and_nothing_is_left_to_do() -> None:
    program = capture(_Wasteful(), torch.randn(2, 8))
    before = str(program)
    result = _clean(program)
    assert result.modified
    assert str(program) == before
    assert [n.name for n in result.program.module.graph.nodes] == ["x", "first", "mul", "output"]
    assert [name for name, _ in result.program.module.named_children()] == ["first"]
    assert result.program.history == ("clean-up",)
    x = torch.randn(4, 8)
    assert torch.equal(result.program.module(x), program.module(x))
    again = _clean(result.program)
    assert not again.modified
    assert again.program is result.program


def test_the_driver_proves_it() -> None:
    program = capture(_Wasteful(), torch.randn(2, 8))
    check = Pipeline.parse("clean-up").run(program, device="cpu").checks["surgery"]
    assert check.passed
    assert check.max_abs_err == 0.0


class _Repeated(nn.Module):
    """ReLUs of every kind, one after the other, as they stand once a block between two is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.relu(torch.relu(x))).relu()
        result: Tensor = self.head(self.relu(x) - 1)
        return result


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_a_relu_of_a_relu_goes(dialect: str) -> None:
    program = capture_as(_Repeated(), torch.randn(2, 8), dialect)
    result = _clean(program)
    left = [node for node in result.program.module.graph.nodes if "relu" in node.name]
    assert len(left) == 1
    x = torch.randn(4, 8)
    assert torch.equal(result.program.module(x), program.module(x))


def _written_after(x: Tensor) -> Tensor:
    y = torch.relu(x)
    z = torch.relu(y)
    z.sub_(1)
    return y + z


def _written_between(x: Tensor) -> Tensor:
    y = torch.relu(x)
    y.sub_(1)
    return torch.relu(y)


def _part_written_between(x: Tensor) -> Tensor:
    y = torch.relu(x)
    y[:, 0] = -1.0
    return torch.relu(y)


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("function", [_written_after, _written_between, _part_written_between])
def test_a_relu_stays_where_something_writes_into_it(
    function: Callable[[Tensor], Tensor], dialect: str
) -> None:
    program = capture_as(_Function(function), torch.randn(2, 8), dialect)
    result = Pipeline.parse("clean-up").run(program)
    assert result.passed
    x = torch.randn(4, 8)
    assert torch.equal(result.program.module(x.clone()), program.module(x.clone()))
