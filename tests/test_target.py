"""Targets: the text is read, mistakes are named, and fractions are of the model that came in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import graphprune as gp
from graphprune.budget import choose
from graphprune.cost import Cost
from graphprune.errors import TargetError
from graphprune.groups import analyze
from graphprune.program import Origin
from graphprune.target import Target, parse_target
from tests import models
from tests.exactness import random_scores


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("macs=0.5", Target(macs=0.5)),
        ("params=0.4,macs=0.5", Target(params=0.4, macs=0.5)),
        (" macs = 1.2G , params=5M", Target(macs=1.2e9, params=5e6)),
        ("params=300k", Target(params=3e5)),
        ("macs=1e6", Target(macs=1e6)),
        ("macs=.5", Target(macs=0.5)),
        ("ratio=0", Target(ratio=0.0)),
        ("ratio=0.3", Target(ratio=0.3)),
        ("size=0.4", Target(size=0.4)),
        ("size=500KB", Target(size=5e5)),
        ("size=1.5 MiB", Target(size=1.5 * 2**20)),
        ("latency=0.6", Target(latency=0.6)),
        ("latency=3ms", Target(latency=3.0)),
        (
            "latency=.8ms,macs=0.5",
            Target(latency=0.8, macs=0.5, is_amount=frozenset({"latency"})),
        ),
        ("latency=250us", Target(latency=0.25, is_amount=frozenset({"latency"}))),
    ],
)
def test_text_is_read(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not understood. Expected macs=, params="),
        ("macs", "'macs' is not understood"),
        ("flops=0.5", "'flops=0.5' is not understood"),
        ("macs=0.5,", "'' is not understood"),
        ("macs=0.5,macs=0.4", "gives macs= twice"),
        ("macs=", "'' is not a number such as 0.5 or 1.2G"),
        ("macs=half", "'half' is not a number"),
        ("macs=nan", "'nan' is not a number"),
        ("macs=-0.5", "'-0.5' is not a number"),
        ("macs=50%", "'50%' is not a number"),
        ("macs=0", "macs must be more than 0, not 0"),
        ("params=0.0", "params must be more than 0, not 0.0"),
        ("size=3ms", "'3ms' is not a number such as 0.5 or 500KB; units are b, kb, mb"),
        (
            "latency=3",
            "a latency of more than the dense program's; give a fraction, or a unit: 3ms",
        ),
        ("latency=3MB", "'3MB' is not a number such as 0.5 or 3ms; units are us, ms, s"),
        ("ratio=3k", "'3k' is not a number such as 0.3"),
        ("ratio=1", "ratio must be at least 0 and less than 1, not 1"),
        ("ratio=1.5", "ratio must be at least 0 and less than 1, not 1.5"),
        ("ratio=0.5,macs=0.5", "ratio= stands alone; it says itself how much goes"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target(text)
    assert message in str(caught.value)
    assert repr(text) in str(caught.value)


def test_fractions_are_of_what_the_program_was_before_anything_went() -> None:
    program = gp.capture(models.tiny_residual(), torch.randn(1, 3, 16, 16))
    groups = analyze(program)
    target = parse_target("macs=0.25,params=400,latency=0.5")
    assert target.of(program, groups) == target
    lost = program.evolve(program.module, origin=Origin(params=2000, macs=10000))
    cost = dataclasses.replace(groups.cost, measured_before={"size": 900.0, "latency": 6.0})
    measured = dataclasses.replace(groups, cost=cost)
    left = Cost(params=1000, macs=5000, size=700, latency=4.0)
    assert target.of(lost, measured).limits(left) == Cost(
        params=400, macs=2500, size=700, latency=3.0
    )
    assert parse_target("params=0.3").of(lost, groups).limits(left) == Cost(
        params=600, macs=5000, size=700, latency=4.0
    )
    big = program.evolve(program.module, origin=Origin(params=10**6, macs=10**8))
    with pytest.raises(
        TargetError, match=r"target macs=1e-05 cannot be .* at macs=0.00\d+ \(.* of 100,000,000\)"
    ):
        choose(groups, random_scores(groups, 0), parse_target("macs=0.00001").of(big, groups))
