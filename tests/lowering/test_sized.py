"""The tracer with known sizes: branches on shapes, hidden functions, constants, and what it must refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphprune.lowering import sized


def _hidden(x: Tensor, weight: Tensor) -> Tensor:
    b, t, _ = x.shape
    if t % 4 != 0:
        x = F.pad(x, (0, 0, 0, 4 - t % 4))
    mask = x.new_zeros((4, 4))
    mask[:2, 2:] = 1.0
    x = F.linear(x, weight).view(b * (x.shape[1] // 4), 4, weight.shape[0])
    return (mask @ x).reshape(b, -1, weight.shape[0])[:, :t]


fx.wrap("_hidden")


class _Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(_hidden(x, self.weight))
        if len(y.shape) != 3:
            raise ValueError
        first, *rest = y.split([2, 4], dim=-1)
        return torch.cat([first, *rest], dim=-1).to(x.dtype)


class _BatchBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 5 else x


class _ValueBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.5
        y[:, 1:] += x[:, 1:]
        y[:, :1].zero_()
        return y


@pytest.mark.parametrize("model", [_Windows(), _InPlace()])
def test_outputs_are_equal_at_every_batch(model: nn.Module) -> None:
    module = sized.trace(model.eval(), (torch.randn(2, 7, 5),), dynamic=True)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 7, 5)
        torch.testing.assert_close(module(x), model(x))


def test_constants_are_folded_and_the_model_is_left_alone() -> None:
    model = _Windows().eval()
    names = set(model.__dict__)
    module = sized.trace(model, (torch.randn(2, 7, 5),), dynamic=True)
    targets = [n.target for n in module.graph.nodes]
    assert "new_zeros" not in targets
    assert all(getattr(t, "__name__", "") != "_hidden" for t in targets)
    assert set(model.__dict__) == names
    assert dict(module.named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("model", [_BatchBranch(), _ValueBranch()])
def test_branches_on_batch_or_values_are_refused(model: nn.Module) -> None:
    with pytest.raises(fx.proxy.TraceError, match="depends on the batch|branches on"):
        sized.trace(model.eval(), (torch.randn(2, 7, 5),), dynamic=True)


def test_wrapped_functions_are_registered_again() -> None:
    before = dict(fx._symbolic_trace._wrapped_fns_to_patch)
    with pytest.raises(fx.proxy.TraceError):
        sized.trace(_ValueBranch(), (torch.randn(2, 3),), dynamic=True)
    assert fx._symbolic_trace._wrapped_fns_to_patch == before
