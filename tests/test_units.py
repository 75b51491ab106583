"""Units: what goes together goes in one unit, and every unit alone is a choice that breaks nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.units import find_units
from tests.blocks import Block
from tests.exactness import random_scores
from tests.models import resnet20, tiny_mobile, tiny_transformer


def analysed(model: nn.Module, *shape: int) -> DependencyGroups:
    return analyze(gp.capture(model.eval(), torch.randn(1, *(shape or (3, 16, 16)))))


@pytest.mark.parametrize("model", [tiny_mobile, tiny_transformer])
@pytest.mark.parametrize("granularity", ["channels", "heads"])
def test_every_unit_alone_breaks_nothing(model: type[nn.Module], granularity: str) -> None:
    groups = analysed(model())
    units = find_units(groups, random_scores(groups, 0), granularity=(granularity,))  # type: ignore[arg-type]
    for unit in range(len(units)):
        keep = groups.cost.everything()
        keep[units.members(unit)] = False
        assert groups.violations(groups.close(keep)) == []


def test_plain_channels_are_units_of_their_own() -> None:
    groups = analysed(resnet20(), 3, 32, 32)
    scores = random_scores(groups, 0)
    units = find_units(groups, scores)
    removable = sum(len(g) for g in groups if not g.pinned)
    assert len(units) == removable
    assert (np.diff(units.starts) == 1).all()
    assert np.array_equal(units.score, scores[units.channels])
    assert (np.diff(units.group) >= 0).all()
    assert not groups.pinned[units.channels].any()


def test_channels_of_different_heads_are_tied_the_least_important_first() -> None:
    groups = analysed(tiny_transformer())
    scores = random_scores(groups, 0)
    units = find_units(groups, scores)
    values = groups.channels_of(Place("blocks.0.attention.in_proj_weight", 0))[48:].reshape(4, 6)
    tied = [units.members(u) for u in range(len(units)) if np.isin(units.members(u), values).any()]
    assert len(tied) == 6
    for members in tied:
        assert [np.isin(members, head).sum() for head in values] == [1, 1, 1, 1]
    worst = next(t for t in tied if values[0][np.argmin(scores[values[0]])] in t)
    assert all(head[np.argmin(scores[head])] in worst for head in values)


def test_heads_are_units_with_all_that_they_hold() -> None:
    groups = analysed(tiny_transformer())
    units = find_units(groups, random_scores(groups, 0), granularity=("heads",))
    assert units.is_head.all()
    assert len(units) == 4 + 3
    rows = groups.channels_of(Place("blocks.0.attention.in_proj_weight", 0)).reshape(3, 4, 6)
    first = next(u for u in range(len(units)) if rows[2, 0, 0] in units.members(u))
    assert np.isin(rows[:, 0], units.members(first)).all()
    assert not np.isin(rows[:, 1:], units.members(first)).any()


def test_row_with_a_pinned_channel_holds_the_others_back() -> None:
    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 5, 1)}

    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        halves = y.view(x.shape[0], 2, 4, *x.shape[2:])
        return m.b(halves.flatten(1, 2)) + y[:, 1:2].flip(1)

    groups = analysed(Block(run, **parts))
    assert len(find_units(groups, random_scores(groups, 0))) == 0


def test_tied_units_take_the_same_fraction_of_cells_of_different_size() -> None:
    """Groups of a convolution and a shuffle over other rows: 12 channels in rows of 4 and of 6."""
    parts = {
        "a": nn.Conv2d(3, 12, 1),
        "b": nn.Conv2d(12, 12, 1, groups=3),
        "c": nn.Conv2d(12, 12, 1, groups=2),
        "d": nn.Conv2d(12, 2, 1),
    }
    groups = analysed(Block(lambda m, x: m.d(m.c(m.b(m.a(x)))), **parts))
    units = find_units(groups, random_scores(groups, 0))
    for unit in range(len(units)):
        keep = groups.cost.everything()
        keep[units.members(unit)] = False
        assert groups.violations(groups.close(keep)) == []
    assert len(units) > 0


def test_program_without_channels_has_no_units() -> None:
    groups = analysed(Block(lambda m, x: x * 2), 4)
    units = find_units(groups, np.zeros(0), granularity=("channels", "heads"))
    assert len(units) == 0
