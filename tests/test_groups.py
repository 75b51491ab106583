"""Dependency groups: what they say, how blocks close, and what violates a constraint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.program import Program
from tests.blocks import Block
from tests.models import resnet20, tiny_residual, tiny_transformer


@pytest.fixture
def program() -> Program:
    return gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16))


@pytest.fixture
def groups(program: Program) -> DependencyGroups:
    return analyze(program)


def test_print_says_where_channels_live_and_why_they_stay(groups: DependencyGroups) -> None:
    text = str(groups)
    assert (
        text.splitlines()[0]
        == f"{len(groups)} dependency groups, {sum(map(len, groups))} coupled channels"
    )
    assert (
        "  group 0: 12 channels in 13 places (stem.0.weight[0], stem.1.weight[0], stem.1.bias[0], "
        "stem.1.running_mean[0], ...)\n" in text
    )
    assert "pinned: graph output (node output)" in text
    assert "pinned: meets a dimension whose size cannot change (node stem_0)" in text


def test_kept_names_every_pinned_group(groups: DependencyGroups) -> None:
    assert [k.what for k in groups.kept] == [
        "stem.0.weight[1] (3 channels)",
        "fc.weight[0] (10 channels)",
    ]


def test_groups_share_no_channel(groups: DependencyGroups) -> None:
    channels = np.concatenate([g.channels for g in groups])
    assert len(np.unique(channels)) == len(channels)
    assert groups[0] is next(iter(groups))
    assert groups[0].name == "stem.0.weight[0]"


def test_analysis_changes_nothing_and_repeats(program: Program) -> None:
    before, values = str(program), [t.clone() for _, t in program.named_tensors()]
    first, second = str(analyze(program)), str(analyze(program))
    assert first == second
    assert str(program) == before
    for (_, tensor), value in zip(program.named_tensors(), values, strict=True):
        assert torch.equal(tensor, value)


def test_both_dialects_find_the_same_groups() -> None:
    model, example = tiny_residual(), torch.randn(1, 3, 16, 16)
    exported = torch.export.export(model, (example,))
    assert {frozenset(map(str, g.places)) for g in analyze(gp.capture(model, example))} == {
        frozenset(map(str, g.places)) for g in analyze(gp.capture(exported))
    }


def test_shortcut_without_parameters_couples_shifted_channels() -> None:
    groups = analyze(gp.capture(resnet20(), torch.randn(1, 3, 32, 32)))
    narrow = groups.channels_of(Place("layer1.0.conv2.weight", 0))
    wide = groups.channels_of(Place("layer2.0.conv2.weight", 0))
    assert np.array_equal(narrow, wide[8:24])
    assert not np.isin(narrow, wide[:8]).any()


def test_networkx_is_bipartite(groups: DependencyGroups) -> None:
    graph = groups.to_networkx()
    kinds = {node: data["kind"] for node, data in graph.nodes(data=True)}
    assert sum(k == "group" for k in kinds.values()) == len(groups)
    assert all(kinds[a] != kinds[b] for a, b in graph.edges)
    assert graph.nodes["fc.weight[1]"] == {"kind": "place", "parameter": "fc.weight", "dim": 1}
    assert graph.nodes["group 0"]["channels"] == 12
    assert graph.has_edge("group 0", "stem.0.weight[0]")


def test_program_without_parameters_has_no_groups() -> None:
    groups = analyze(gp.capture(Block(lambda m, x: x.relu() * 2).eval(), torch.randn(1, 3, 4)))
    assert len(groups) == 0
    assert str(groups) == "0 dependency groups, 0 coupled channels"
    assert groups.cost.total().params == 0


class TestBlocks:
    @pytest.fixture
    def groups(self) -> DependencyGroups:
        return analyze(gp.capture(tiny_transformer(), torch.randn(1, 3, 16, 16)))

    @pytest.fixture
    def values(self, groups: DependencyGroups) -> np.ndarray:
        """The coupled channels of the first layer's value projection, one row per head."""
        rows = groups.channels_of(Place("blocks.0.attention.in_proj_weight", 0))
        return np.asarray(rows[48:]).reshape(4, 6)

    def test_head_goes_with_its_last_member(
        self, groups: DependencyGroups, values: np.ndarray
    ) -> None:
        keep = groups.cost.everything()
        keep[values[1]] = False
        closed = groups.close(keep)
        queries = groups.channels_of(Place("blocks.0.attention.in_proj_weight", 0))[:24]
        assert not closed[queries.reshape(4, 6)[1]].any()
        assert closed[queries.reshape(4, 6)[[0, 2, 3]]].all()
        assert groups.violations(closed) == []
        assert groups.violations(keep) != []

    def test_unequal_heads_are_a_violation(
        self, groups: DependencyGroups, values: np.ndarray
    ) -> None:
        keep = groups.cost.everything()
        keep[values[1, 0]] = False
        (message, *_) = groups.violations(keep)
        assert message.startswith("blocks at node ")
        assert "would keep unequal counts" in message
        assert groups.broken(keep)

    def test_equal_heads_are_none(self, groups: DependencyGroups, values: np.ndarray) -> None:
        keep = groups.cost.everything()
        keep[values[[0, 1, 2, 3], [0, 3, 5, 1]]] = False
        assert groups.violations(keep) == []
        assert groups.broken(keep) == []


def test_pinned_channels_may_not_go(groups: DependencyGroups) -> None:
    keep = groups.cost.everything()
    keep[groups.channels_of(Place("fc.weight", 0))[:2]] = False
    assert groups.violations(keep) == ["2 pinned channels would go"]


def test_tensor_may_not_become_empty(groups: DependencyGroups) -> None:
    keep = groups.cost.everything()
    keep[groups[0].channels] = False
    assert "a tensor would lose all its channels" in groups.violations(keep)


def test_shared_module_has_one_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.stem = nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.conv(self.conv(self.stem(x))))
            return out

    groups = analyze(gp.capture(Twice().eval(), torch.randn(1, 3, 4, 4)))
    assert sorted(map(str, groups[0].places)) == [
        "conv.bias[0]",
        "conv.weight[0]",
        "conv.weight[1]",
        "last.weight[1]",
        "stem.bias[0]",
        "stem.weight[0]",
    ]
