"""One architecture of every kind in torchvision: captured, analysed, cut at half of its MACs, and proven exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision

import graphprune as gp
from graphprune.budget import Target, choose
from graphprune.cut import cut_program
from graphprune.groups import analyze
from graphprune.verify import Masked, verify_surgery
from tests.exactness import random_scores

# name -> (size of the input, options): as small as each architecture allows, so that the proof is quick.
ZOO: dict[str, tuple[int, dict[str, Any]]] = {
    "convnext_tiny": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "googlenet": (32, {"init_weights": False, "aux_logits": False}),
    "inception_v3": (80, {"init_weights": False, "aux_logits": False}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {}),
    "resnext50_32x4d": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_0": (32, {}),
    "swin_t": (64, {}),
    "vgg11_bn": (32, {}),
    "vit_b_32": (64, {"image_size": 64}),
}
TARGET = 0.5


@pytest.mark.parametrize("name", ZOO)
def test_cut_at_half_the_macs_is_exact(name: str) -> None:
    size, options = ZOO[name]
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    program = gp.capture(model, torch.randn(1, 3, size, size))
    groups = analyze(program)
    assert groups.labels.unknown == {}
    choice = choose(groups, random_scores(groups, 0), Target(macs=TARGET))
    assert TARGET - 0.005 <= choice.cost.macs / groups.cost.macs <= TARGET
    assert groups.violations(choice.keep) == []
    cut = cut_program(program, groups, choice.keep).program
    assert sum(p.numel() for p in cut.module.parameters()) == choice.cost.params
    check = verify_surgery(program, cut, Masked(groups, choice.keep))
    assert check.passed, check.detail
