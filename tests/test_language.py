"""Heads, their dimensions, feed-forward and embedding width of a decoder: each goes alone, and exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import ApplyError, UsageError
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.units import find_units, parse_granularity
from tests.exactness import assert_cut_is_exact, capture_as, random_scores
from tests.language import Decoder, Norm

TOKENS = torch.arange(11).view(1, 11) * 2 % 31
Q, K, V, O = (f"attentions.0.{name}.weight" for name in "qkvo")  # noqa: E741 - what everyone calls it


@pytest.fixture(scope="module", params=["fx", "export"])
def decoder(request: Any) -> tuple[Program, DependencyGroups]:
    """The decoder in both dialects."""
    program = capture_as(Decoder().eval(), TOKENS, request.param)
    return program, gp.analyze(program)


def _cut(decoder: tuple[Program, DependencyGroups], granularity: str, count: int) -> Any:
    """Remove the first `count` units of a kind, prove it, and return the shapes of what is left."""
    program, groups = decoder
    units = find_units(groups, random_scores(groups, 0), granularity=parse_granularity(granularity))
    removed = np.zeros(len(units), np.bool_)
    removed[:count] = True
    keep = groups.close(units.without(removed, groups.num_channels))
    cut = assert_cut_is_exact(program, groups, keep)
    return {name: tuple(t.shape) for name, t in cut.named_tensors()}


def _names(decoder: tuple[Program, DependencyGroups], granularity: Sequence[Any]) -> set[str]:
    """Return the parameter dimensions that units of a kind touch."""
    _, groups = decoder
    units = find_units(groups, random_scores(groups, 0), granularity=granularity)
    touched = np.zeros(groups.num_channels, np.bool_)
    touched[units.channels] = True
    return {str(p) for p in groups.places if touched[groups.channels_of(p)].any()}


def test_a_head_goes_with_its_group_of_queries(
    decoder: tuple[Program, DependencyGroups],
) -> None:
    shapes = _cut(decoder, "heads", 1)
    assert (shapes[Q], shapes[K], shapes[V], shapes[O]) == ((32, 20), (16, 20), (16, 20), (20, 32))
    assert shapes["attentions.1.q.weight"] == (48, 20)
    assert shapes["frequencies"] == (4,)


def test_query_heads_go_alone_as_many_of_each_group(
    decoder: tuple[Program, DependencyGroups],
) -> None:
    shapes = _cut(decoder, "query-heads", 1)
    assert (shapes[Q], shapes[K], shapes[V], shapes[O]) == ((24, 20), (24, 20), (24, 20), (20, 24))
    assert shapes["attentions.1.q.weight"] == (48, 20)
    # A group, and one query head of each that is left.
    both = _cut(decoder, "heads,query-heads", 1)
    assert (both[Q], both[K]) == ((32, 20), (16, 20))
    program, groups = decoder
    units = find_units(groups, random_scores(groups, 1), granularity=["heads", "query-heads"])
    first = units.group == units.group[0]
    lengths = np.diff(units.starts)
    removed = np.zeros(len(units), np.bool_)
    # The sets of one layer's query heads are the longest; the first of its groups goes too.
    removed[np.flatnonzero(first & (lengths == lengths[first].max()))[:1]] = True
    removed[np.flatnonzero(first & (lengths < lengths[first].max()))[:1]] = True
    cut = assert_cut_is_exact(
        program, groups, groups.close(units.without(removed, groups.num_channels))
    )
    shapes = {name: tuple(t.shape) for name, t in cut.named_tensors()}
    assert (shapes[Q], shapes[K], shapes[O]) == ((16, 20), (16, 20), (20, 16))


def test_query_heads_that_are_viewed_beside_their_keys_go_alone() -> None:
    class Viewed(nn.Module):
        """Four query heads in two groups, as ``(batch, groups, queries, ...)`` beside ``(batch, groups, 1, ...)``."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = nn.Linear(9, 24), nn.Linear(9, 8), nn.Linear(9, 8)
            self.o = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            b, t = x.shape[:2]
            q = self.q(x).view(b, t, 2, 3, 4).permute(0, 2, 3, 1, 4)
            k, v = (p(x).view(b, t, 2, 1, 4).permute(0, 2, 3, 1, 4) for p in (self.k, self.v))
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            return self.o(y.permute(0, 3, 1, 2, 4).reshape(b, t, -1))  # type: ignore[no-any-return]

    program = gp.capture(Viewed().eval(), torch.randn(1, 7, 9))
    groups = gp.analyze(program)
    scores = np.random.default_rng(0).random(groups.num_channels)
    units = find_units(groups, scores, granularity=["query-heads"])
    assert len(units) == 3
    removed = np.array([True, False, False])
    keep = groups.close(units.without(removed, groups.num_channels))
    left = np.asarray(keep[groups.channels_of(Place("q.weight", 0))]).reshape(2, 3, 4)
    assert left.all(axis=2).sum(axis=1).tolist() == [2, 2]
    assert (left[0] != left[1]).any()
    cut = assert_cut_is_exact(program, groups, keep)
    assert {n: tuple(t.shape) for n, t in cut.named_tensors() if "weight" in n} == {
        "q.weight": (16, 9),
        "k.weight": (8, 9),
        "v.weight": (8, 9),
        "o.weight": (5, 16),
    }


def test_the_users_class_takes_fewer_query_heads() -> None:
    model = Decoder().eval()
    result = gp.compile(
        model, TOKENS, target="ratio=0.5", granularity="query-heads", export=False, round_to=1
    )
    smaller = result.apply_to(model)
    assert smaller.get_submodule("attentions.0").repeats == 1
    assert (len(smaller.get_parameter(Q)), len(smaller.get_parameter(K))) == (24, 24)


def test_a_rotation_goes_from_all_heads_of_all_layers(
    decoder: tuple[Program, DependencyGroups],
) -> None:
    shapes = _cut(decoder, "query-key-dims", 1)
    assert shapes["frequencies"] == (3,)
    assert shapes[Q] == shapes["attentions.1.q.weight"] == (36, 20)
    assert shapes[K] == (18, 20)
    assert shapes[V] == (24, 20)


def test_value_dimensions_go_alone(decoder: tuple[Program, DependencyGroups]) -> None:
    shapes = _cut(decoder, "value-dims", 1)
    assert (shapes[Q], shapes[V], shapes[O]) == ((48, 20), (21, 20), (20, 42))
    assert shapes["attentions.1.v.weight"] == (24, 20)


def test_widths_are_what_is_outside_of_heads(decoder: tuple[Program, DependencyGroups]) -> None:
    assert not {f"{Q}[0]", f"{V}[0]"} & _names(decoder, ["widths"])
    assert {f"{Q}[1]", "gates.0.weight[0]", "table.weight[1]"} <= _names(decoder, ["widths"])
    assert _names(decoder, ["head-dims"]) == _names(decoder, ["query-key-dims", "value-dims"])
    shapes = _cut(decoder, "widths", 5)
    assert shapes["table.weight"][1] < 20
    assert shapes["norms.0.weight"][0] == shapes["table.weight"][1]


def test_heads_and_dimensions_go_together(decoder: tuple[Program, DependencyGroups]) -> None:
    program, _ = decoder
    result = gp.Pipeline.parse(
        'dependency-groups,magnitude,choose-channels{target="macs=0.4" granularity="channels,heads"},remove-channels'
    ).run(program, device="cpu")
    assert result.checks["surgery"].passed


def test_a_choice_that_gives_heads_different_rotations_is_a_violation(
    decoder: tuple[Program, DependencyGroups],
) -> None:
    _, groups = decoder
    keep = np.ones(groups.num_channels, np.bool_)
    keep[groups.channels_of(Place(K, 0))[:1]] = False
    assert "heads would keep different dimensions" in groups.violations(keep)
    assert groups.broken(keep)


def test_grouped_queries_in_one_operator() -> None:
    program = gp.capture(Decoder(is_fused=True).eval(), TOKENS)
    decoder = program, gp.analyze(program)
    assert _cut(decoder, "heads", 1)[K] == (16, 20)
    assert _cut(decoder, "query-key-dims", 1)["frequencies"] == (3,)
    assert _cut(decoder, "value-dims", 2)[O] == (20, 36)


def test_the_users_class_holds_heads_and_widths() -> None:
    model = Decoder().eval()
    result = gp.compile(
        model, TOKENS, target="ratio=0.4", granularity="widths,heads", export=False, round_to=1
    )
    smaller = result.apply_to(model)
    assert smaller.get_parameter(K).shape[0] == 16
    torch.testing.assert_close(smaller(TOKENS), result.program.module(TOKENS))


def test_the_users_class_takes_dimensions_where_one_attribute_says_them_all() -> None:
    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.dims = 6
            self.enter = nn.Linear(10, 24)
            self.leave = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.relu(self.enter(x).view(-1, 4, self.dims))
            return self.leave(parts.flatten(1))  # type: ignore[no-any-return]

    model = Uniform().eval()
    result = gp.compile(model, torch.randn(1, 10), target="ratio=0.5", export=False, round_to=1)
    smaller = result.apply_to(model)
    assert smaller.dims == 3
    assert model.dims == 6


def test_a_class_that_cannot_hold_different_dimensions_says_what_would_do() -> None:
    model = Decoder().eval()
    result = gp.compile(
        model, TOKENS, target="ratio=0.5", granularity="value-dims", export=False, round_to=1
    )
    with pytest.raises(ApplyError, match="granularity='widths,heads'"):
        result.apply_to(model)


def test_a_mean_that_is_no_norm_keeps_its_divisor() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.enter(x).mean(-1)  # type: ignore[no-any-return]

    model = Mean().eval()
    program = gp.capture(model, torch.randn(1, 6))
    groups = gp.analyze(program)
    keep = np.ones(groups.num_channels, np.bool_)
    keep[groups.channels_of(Place("enter.weight", 0))[:5]] = False
    cut = assert_cut_is_exact(program, groups, keep)
    x = torch.randn(3, 6)
    torch.testing.assert_close(cut.module(x), model.enter(x)[:, 5:].sum(-1) / 12)


@pytest.mark.parametrize("square", ["x.pow(2)", "x.square()", "x * x", "x ** 2"])
def test_squares_are_known_in_every_form(square: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            x = x * torch.rsqrt(eval(square).mean(-1, keepdim=True) + 1e-5)
            return self.leave(x)  # type: ignore[no-any-return]

    program = gp.capture(Net().eval(), torch.randn(1, 6))
    groups = gp.analyze(program)
    keep = np.ones(groups.num_channels, np.bool_)
    keep[groups.channels_of(Place("enter.weight", 0))[3:7]] = False
    assert_cut_is_exact(program, groups, keep)


def test_norm_is_what_torch_says() -> None:
    norm, x = Norm(6), torch.randn(3, 6)
    torch.testing.assert_close(norm(x), torch.rms_norm(x, (6,), norm.weight, 1e-6))


def test_unknown_granularity() -> None:
    with pytest.raises(UsageError, match="known: channels, widths, head-dims"):
        parse_granularity("blocks")
