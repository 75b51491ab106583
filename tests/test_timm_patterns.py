"""One small network for every way in which models of timm defeated a rule: each is cut, and exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.budget import choose
from graphprune.cost import Cost
from graphprune.groups import analyze
from graphprune.target import parse_target
from tests.exactness import assert_cut_is_exact, capture_as, random_scores


class Net(nn.Module):
    """Parts, and a function that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.run(self, x)
        return result


def cut(net: nn.Module, *shape: int, target: str, dialect: str = "fx") -> tuple[Cost, Cost]:
    """Cut exactly, and return the costs before and after."""
    program = capture_as(net.eval(), torch.randn(1, *shape), dialect)
    groups = analyze(program)
    choice = choose(groups, random_scores(groups, 0), parse_target(target))
    assert_cut_is_exact(program, groups, choice.keep)
    return groups.cost.total(), groups.cost.total(choice.keep)


def convs(width: int = 12) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(3, width, 3, padding=1), "c": nn.Conv2d(width, 5, 1)}


def response_norm(m: Any, x: Tensor) -> Any:
    """GRN of ConvNeXt V2."""
    y = m.a(x)
    power = y.square().sum((2, 3), keepdim=True)
    y = y + torch.addcmul(m.bias.view(1, -1, 1, 1), m.weight.view(1, -1, 1, 1), y * power)
    return m.c(y / (power.mean(dim=1, keepdim=True) + 1e-6))


def written_out_rms_norm(m: Any, x: Tensor) -> Any:
    y = m.a(x).flatten(2).transpose(1, 2)
    return m.d(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight)


def mean_of_everything(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.c(y * torch.sigmoid(y.mean((-1, 1, 2))[:, None, None, None]))


MEANS = {
    "response norm": Net(response_norm, weight=torch.randn(12), bias=torch.randn(12), **convs()),
    "written-out rms norm": Net(
        written_out_rms_norm,
        a=nn.Conv2d(3, 12, 3),
        weight=torch.randn(12),
        d=nn.Linear(12, 5),
    ),
    "spatial gate": Net(lambda m, x: m.c((y := m.a(x)) * y.mean(1, keepdim=True)), **convs()),
    "mean of everything": Net(mean_of_everything, **convs()),
}


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_channels_keeps_its_old_divisor(name: str, dialect: str) -> None:
    dense, after = cut(MEANS[name], 3, 7, 9, target="macs=0.5", dialect=dialect)
    assert after.macs <= 0.5 * dense.macs


def test_heads_that_are_folded_into_the_batch_are_cut() -> None:
    """Halo and bottleneck attention: samples and heads share dimension 0."""

    def run(m: Any, x: Tensor) -> Any:
        b, _, h, w = x.shape
        q, k, v = (part(m.a(x)).reshape(b * 4, 6, h * w) for part in (m.q, m.k, m.v))
        out = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return m.c(out.reshape(b, 24, h, w))

    parts = {name: nn.Conv2d(10, 24, 1) for name in "qkv"}
    net = Net(run, a=nn.Conv2d(3, 10, 1), c=nn.Conv2d(24, 5, 1), **parts)
    dense, after = cut(net, 3, 5, 7, target="macs=0.5")
    assert after.macs <= 0.5 * dense.macs


def test_a_shape_that_the_graph_computes_as_a_whole_keeps_its_batch() -> None:
    """MaxViT: ``reshape(x.shape[:-1] + (-1,))``."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).permute(0, 2, 3, 1)
        lead = y.shape[:-1]
        y = y.reshape(lead + (-1,))  # noqa: RUF005 - as it is written there
        z = m.d(y.reshape(lead + (4, 3)).flatten(-2))  # noqa: RUF005
        return m.e(z.reshape(z.shape))

    net = Net(run, a=nn.Conv2d(3, 12, 3), d=nn.Linear(12, 8), e=nn.Linear(8, 5))
    dense, after = cut(net, 3, 7, 9, target="macs=0.5")
    assert after.macs <= 0.5 * dense.macs


class Standardized(nn.Conv2d):
    """A convolution whose filters are standardized as it runs (NF-Nets, BiT, ScaledStdConv2d)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_filters_are_standardized_over_the_inputs_that_are_kept() -> None:
    net = nn.Sequential(
        Standardized(3, 10, 3), nn.ReLU(), Standardized(10, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 1)
    )
    dense, after = cut(net, 3, 7, 9, target="macs=0.5")
    assert after.macs <= 0.5 * dense.macs
