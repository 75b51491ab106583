"""Structural copies share tensors and nothing else that a run or a trace could change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune import capture
from graphprune.lowering.copies import copy_structure, meta_copy


class _Caching(nn.Module):
    """Keeps what it computed, a bound method of a child, and a list of children beside the registry."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.call: Any = self.first.forward
        self.plain: list[Any] = [self.first, (self.first,)]
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.first.bias * 2
        y: Tensor = self.second(x) + self.cache["bias"] + self.plain[0](x)
        return y


def test_copy_shares_tensors_and_leads_into_itself() -> None:
    model = _Caching()
    copied = copy_structure(model)
    assert isinstance(copied, _Caching)
    assert copied.first is copied.second
    assert copied.first is not model.first
    assert copied.first.weight is model.first.weight
    assert copied.call.__self__ is copied.first
    assert copied.plain == [copied.first, (copied.first,)]
    assert copied.cache is not model.cache


def test_graph_modules_keep_their_forward() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    assert meta_copy(model, {})(torch.empty(4, 3, device="meta")).shape == (4, 2)
    assert not any(p.is_meta for p in model.parameters())


def test_capture_leaves_no_symbolic_value_in_a_cache() -> None:
    model = _Caching().eval()
    for _ in range(2):
        program = capture(model, torch.randn(2, 3))
        assert model.cache == {}
        x = torch.randn(4, 3)
        torch.testing.assert_close(program.module(x), _Caching.forward(copy_structure(model), x))  # type: ignore[arg-type]
