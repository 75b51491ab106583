"""The networks of the benchmarks: captured, cut to half their MACs, proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.bench import networks


@pytest.mark.parametrize("make", [networks.vgg16_bn, networks.depthwise, networks.vit])
def test_they_can_be_cut(make: Callable[[], nn.Module]) -> None:
    result = gp.compile(make().eval(), torch.randn(1, 1, 28, 28), target="macs=0.5", export=False)
    assert result.report.checks["surgery"].passed
    assert result.report.after.macs <= 0.5 * result.report.before.macs
