"""The networks of the benchmarks: captured, cut to half their MACs, proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.bench import networks
from graphprune.groups import analyze


@pytest.mark.parametrize("make", [networks.vgg16_bn, networks.depthwise, networks.vit])
def test_they_can_be_cut(make: Callable[[], nn.Module]) -> None:
    result = gp.compile(make().eval(), torch.randn(1, 1, 28, 28), target="macs=0.5", export=False)
    check = result.report.checks["surgery"]
    assert check is not None
    assert check.passed
    before, after = (analyze(program).cost.macs for program in (result.dense, result.program))
    assert after <= 0.5 * before
