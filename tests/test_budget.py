"""The budget: targets are read, met, and never by breaking a constraint; what cannot be reached is said."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.budget import choose
from graphprune.errors import TargetError
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.target import Target, parse_target
from tests import models
from tests.exactness import random_scores

SIZES = {"resnet20": 32, "resnet56": 32}
MODELS = (
    "resnet20",
    "resnet56",
    "tiny_residual",
    "tiny_inception",
    "tiny_dense",
    "tiny_mobile",
    "tiny_transformer",
)


@functools.cache
def analysed(name: str) -> DependencyGroups:
    model: nn.Module = getattr(models, name)()
    size = SIZES.get(name, 16)
    return analyze(gp.capture(model.eval(), torch.randn(1, 3, size, size)))


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("resource", ["macs", "params"])
@pytest.mark.parametrize("name", MODELS)
def test_choice_lands_at_or_just_under_the_target(
    name: str, resource: str, fraction: float
) -> None:
    groups = analysed(name)
    choice = choose(groups, random_scores(groups, 1), parse_target(f"{resource}={fraction}"))
    reached = getattr(choice.cost, resource) / getattr(groups.cost, resource)
    assert fraction - 0.01 <= reached <= fraction
    assert groups.violations(choice.keep) == []
    assert choice.cost == groups.cost.total(choice.keep)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("name", ["resnet20", "tiny_transformer"])
def test_either_scope_lands(name: str, scope: str) -> None:
    groups = analysed(name)
    target = Target(macs=0.5)
    choice = choose(groups, random_scores(groups, 2), target, scope=scope)  # type: ignore[arg-type]
    assert 0.49 <= choice.cost.macs / groups.cost.macs <= 0.5


def test_a_limit_that_was_not_measured_says_what_to_do() -> None:
    groups = analysed("tiny_residual")
    with pytest.raises(TargetError, match="put the pass measure-costs after dependency-groups"):
        choose(groups, random_scores(groups, 2), Target(latency=0.5))


def test_uniform_scope_takes_alike_from_every_group() -> None:
    groups = analysed("resnet20")
    choice = choose(groups, random_scores(groups, 2), Target(macs=0.5), scope="uniform")
    kept = [choice.keep[g.channels].mean() for g in groups if not g.pinned and len(g) >= 16]
    assert max(kept) - min(kept) < 0.15


@pytest.mark.parametrize(("params", "macs"), [(0.5, 0.5), (0.4, 0.7), (0.8, 0.5), (1.0, 0.5)])
def test_several_limits_all_hold_and_one_is_met(params: float, macs: float) -> None:
    groups = analysed("resnet20")
    choice = choose(groups, random_scores(groups, 3), Target(params=params, macs=macs))
    room = (
        params - choice.cost.params / groups.cost.params,
        macs - choice.cost.macs / groups.cost.macs,
    )
    assert min(room) >= 0
    assert min(room) <= 0.01


def test_limit_may_be_an_amount() -> None:
    groups = analysed("resnet20")
    choice = choose(groups, random_scores(groups, 3), parse_target("macs=20M"))
    assert 19.5e6 <= choice.cost.macs <= 20e6


def test_limit_above_the_dense_cost_removes_nothing() -> None:
    groups = analysed("resnet20")
    for target in (Target(macs=1.0), Target(params=1e12), Target(ratio=0.0)):
        assert choose(groups, random_scores(groups, 3), target).keep.all()


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.75])
def test_ratio_goes_from_every_group(ratio: float) -> None:
    groups = analysed("resnet20")
    keep = choose(groups, random_scores(groups, 4), Target(ratio=ratio)).keep
    for group in groups:
        removed = int((~keep[group.channels]).sum())
        assert removed == (0 if group.pinned else math.floor(ratio * len(group) + 1e-9))


def test_least_important_of_a_group_goes_first() -> None:
    groups = analysed("resnet20")
    scores = random_scores(groups, 5)
    keep = choose(groups, scores, Target(ratio=0.5)).keep
    for group in groups:
        gone, left = scores[group.channels[~keep[group.channels]]], scores[group.channels]
        assert group.pinned or gone.max() < np.sort(left)[len(gone)]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_becomes_empty(name: str) -> None:
    groups = analysed(name)
    keep = choose(groups, random_scores(groups, 6), Target(ratio=0.999)).keep
    assert groups.violations(keep) == []
    assert all(keep[groups.channels_of(place)].any() for place in groups.places)


def test_same_scores_make_the_same_choice() -> None:
    groups = analysed("tiny_mobile")
    first, second = (choose(groups, random_scores(groups, 7), Target(macs=0.5)) for _ in range(2))
    assert np.array_equal(first.keep, second.keep)
    equal = np.ones(groups.num_channels)
    assert groups.violations(choose(groups, equal, Target(macs=0.5)).keep) == []


class TestRound:
    @pytest.mark.parametrize("round_to", [2, 4, 8])
    @pytest.mark.parametrize("target", ["macs=0.6", "ratio=0.5"])
    def test_kept_channels_are_multiples(self, round_to: int, target: str) -> None:
        groups = analysed("resnet20")
        choice = choose(groups, random_scores(groups, 8), parse_target(target), round_to=round_to)
        assert groups.violations(choice.keep) == []
        for group in groups:
            if not group.pinned and len(group) % round_to == 0:
                assert int(choice.keep[group.channels].sum()) % round_to == 0

    def test_heads_keep_multiples(self) -> None:
        groups = analysed("tiny_transformer")
        keep = choose(groups, random_scores(groups, 8), Target(ratio=0.5), round_to=8).keep
        values = groups.channels_of(Place("blocks.0.attention.in_proj_weight", 0))[48:]
        assert int(keep[values].sum()) % 8 == 0

    def test_auto_prefers_eight_and_still_lands(self) -> None:
        groups = analysed("resnet56")
        choice = choose(groups, random_scores(groups, 8), Target(macs=0.5), round_to="auto")
        assert 0.49 <= choice.cost.macs / groups.cost.macs <= 0.5
        assert groups.violations(choice.keep) == []

    def test_auto_gives_way_in_small_networks(self) -> None:
        groups = analysed("tiny_residual")
        choice = choose(groups, random_scores(groups, 8), Target(macs=0.5), round_to="auto")
        assert 0.49 <= choice.cost.macs / groups.cost.macs <= 0.5


def test_max_ratio_holds() -> None:
    groups = analysed("resnet20")
    keep = choose(groups, random_scores(groups, 9), Target(macs=0.7), max_ratio=0.3).keep
    for group in groups:
        assert (~keep[group.channels]).mean() <= 0.3


class TestRefusals:
    @pytest.mark.parametrize("target", [Target(macs=1e-5), Target(params=3.0)])
    def test_unreachable_target_says_what_can_be_reached(self, target: Target) -> None:
        groups = analysed("resnet20")
        with pytest.raises(TargetError, match="cannot be reached") as caught:
            choose(groups, random_scores(groups, 0), target)
        message = str(caught.value)
        name = "macs" if target.macs else "params"
        reached = message.split(f"{name}=")[-1].split(" ")[0]
        assert 0 < float(reached) < 0.2
        assert "13 of" in message
        assert "coupled channels are pinned (graphprune inspect says why)" in message

    def test_what_is_said_to_be_reachable_is(self) -> None:
        groups = analysed("resnet20")
        with pytest.raises(TargetError) as caught:
            choose(groups, random_scores(groups, 0), Target(macs=1e-5))
        least = float(str(caught.value).split("macs=")[-1].split(" ")[0])
        choice = choose(groups, random_scores(groups, 0), Target(macs=least + 1e-4))
        assert choice.cost.macs <= (least + 1e-4) * groups.cost.macs

    def test_network_without_removable_channels(self) -> None:
        groups = analyze(gp.capture(nn.Linear(4, 3).eval(), torch.randn(1, 4)))
        with pytest.raises(TargetError, match=r"macs=1.0000 \(12 of 12\); 7 of 7 coupled"):
            choose(groups, random_scores(groups, 0), Target(macs=0.5))
        assert choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep.all()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_scores_must_be_finite(self, value: float) -> None:
        groups = analysed("resnet20")
        scores = random_scores(groups, 0)
        scores[3] = value
        with pytest.raises(TargetError, match="scores hold NaN or infinite values"):
            choose(groups, scores, Target(macs=0.5))
