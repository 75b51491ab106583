"""What operators do to labels, read off the groups that come out; and the table of rules itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 - registers operators of its own
from torch import Tensor, nn

import graphprune as gp
from graphprune.groups import DependencyGroups, analyze
from graphprune.labels.rules import find_rule, known_operators, rule
from tests.blocks import Block

Forward = Callable[[Any, Tensor], Any]


def groups_of(
    run: Forward, parts: Mapping[str, nn.Module], *, shape: tuple[int, ...] = (3, 8, 8)
) -> DependencyGroups:
    return analyze(gp.capture(Block(run, **parts).eval(), torch.randn(1, *shape)))


def lines_of(groups: DependencyGroups) -> list[str]:
    """Return one line per group, with every place."""
    return [
        f"{len(g)}: {' '.join(map(str, g.places))}" + (f" | {g.pinned}" if g.pinned else "")
        for g in groups
    ]


def wrapped(run: Callable[[Tensor], Tensor], outs: int, ins: int | None = None) -> list[str]:
    """Return the groups of ``conv(3, outs) -> run -> conv(ins, 5)`` without the pinned input and output."""
    a = nn.Conv2d(3, outs, 1, bias=False)
    b = nn.Conv2d(ins or outs, 5, 1, bias=False)
    found = lines_of(groups_of(lambda m, x: m.b(run(m.a(x))), {"a": a, "b": b}))
    input_line = "3: a.weight[1] | meets a dimension whose size cannot change (node a)"
    output_line = "5: b.weight[0] | graph output (node output)"
    assert input_line in found
    assert output_line in found
    return [line for line in found if line not in (input_line, output_line)]


STATISTIC = "a statistic is taken over it"
SIZE = (8, 8)
CASES: dict[str, tuple[Callable[[Tensor], Tensor], int, int, list[str]]] = {
    "relu": (F.relu, 6, 6, ["6: a.weight[0] b.weight[1]"]),
    "softmax over channels": (
        lambda x: F.softmax(x, 1),
        6,
        6,
        [
            f"6: a.weight[0] | {STATISTIC} (node softmax)",
            "6: b.weight[1] | meets a dimension whose size cannot change (node b)",
        ],
    ),
    "softmax over space": (lambda x: F.softmax(x, 3), 6, 6, ["6: a.weight[0] b.weight[1]"]),
    "glu": (lambda x: F.glu(x, 1), 6, 3, ["3: a.weight[0] b.weight[1]"]),
    "concatenation with itself": (
        lambda x: torch.cat([x, x], 1),
        4,
        8,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "slice": (
        lambda x: x[:, 2:5],
        6,
        3,
        ["3: a.weight[0]", "3: a.weight[0] b.weight[1]"],
    ),
    "slice with a step": (
        lambda x: x[:, ::2],
        6,
        3,
        ["3: a.weight[0] b.weight[1]"],
    ),
    "pad": (
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        4,
        7,
        ["4: a.weight[0] b.weight[1]", "3: b.weight[1]"],
    ),
    "reflect pad of space": (
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        4,
        4,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "sum of halves": (
        lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1],
        6,
        3,
        ["3: a.weight[0] b.weight[1]"],
    ),
    "shuffle": (
        lambda x: x.view(-1, 2, 3, *SIZE).transpose(1, 2).reshape(-1, 6, *SIZE),
        6,
        6,
        ["3: a.weight[0] b.weight[1]"],
    ),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 8, 2, ["2: a.weight[0] b.weight[1]"]),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 3, 12, ["3: a.weight[0] b.weight[1]"]),
    "flip of channels": (
        lambda x: x.flip(1),
        4,
        4,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "flip of space": (lambda x: x.flip(2), 4, 4, ["4: a.weight[0] b.weight[1]"]),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 4, 8, ["4: a.weight[0] b.weight[1]"]),
    "repeat_interleave": (
        lambda x: x.repeat_interleave(2, 1),
        4,
        8,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "sum over channels": (lambda x: x * x.sum(1, True), 4, 4, ["4: a.weight[0] b.weight[1]"]),
    "mean over channels": (
        lambda x: x * x.mean(1, True),
        4,
        4,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "mean over space": (lambda x: x * x.mean((2, 3), True), 4, 4, ["4: a.weight[0] b.weight[1]"]),
    "pooling": (lambda x: F.max_pool2d(x, 2), 4, 4, ["4: a.weight[0] b.weight[1]"]),
    "resampling": (
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        4,
        4,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "index": (
        lambda x: x[:, [2, 0, 1]],
        4,
        3,
        [
            "4: a.weight[0] | indexed by number (node getitem)",
            "3: b.weight[1] | meets a dimension whose size cannot change (node b)",
        ],
    ),
    "comparison with zero": (
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        4,
        4,
        ["4: a.weight[0] b.weight[1]"],
    ),
    "sort of space": (
        lambda x: x.sort(dim=3).values,
        4,
        4,
        ["4: a.weight[0] b.weight[1]"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    run, outs, ins, expected = CASES[name]
    assert wrapped(run, outs, ins) == expected


def test_residual_sum_couples_both_sides() -> None:
    parts = {
        "a": nn.Conv2d(3, 6, 1),
        "b": nn.Conv2d(6, 4, 1),
        "c": nn.Conv2d(4, 6, 1),
        "d": nn.Conv2d(6, 2, 1),
    }
    found = lines_of(groups_of(lambda m, x: m.d(m.a(x) + m.c(F.relu(m.b(m.a(x))))), parts))
    assert found == [
        "6: a.weight[0] a.bias[0] b.weight[1] c.weight[0] c.bias[0] d.weight[1]",
        "3: a.weight[1] | meets a dimension whose size cannot change (node a)",
        "4: b.weight[0] b.bias[0] c.weight[1]",
        "2: d.weight[0] d.bias[0] | graph output (node output)",
    ]


def test_depthwise_follows_its_input() -> None:
    parts = {
        "a": nn.Conv2d(3, 6, 1),
        "b": nn.Conv2d(6, 6, 3, groups=6),
        "n": nn.BatchNorm2d(6),
        "c": nn.Conv2d(6, 2, 1),
    }
    found = lines_of(groups_of(lambda m, x: m.c(m.n(m.b(m.a(x)))), parts))
    assert found[0] == (
        "6: a.weight[0] a.bias[0] b.weight[0] b.bias[0] "
        "n.weight[0] n.bias[0] n.running_mean[0] n.running_var[0] c.weight[1]"
    )


def test_grouped_convolution_takes_the_same_inputs_from_every_group() -> None:
    parts = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 4, 1, groups=2), "c": nn.Conv2d(4, 2, 1)}
    groups = groups_of(lambda m, x: m.c(m.b(m.a(x))), parts)
    found = lines_of(groups)
    assert found[0] == "3: a.weight[0] a.bias[0] b.weight[1]"
    assert found[2] == "4: b.weight[0] b.bias[0] c.weight[1]"
    (nest,) = groups.nests
    assert nest.shape == (2, 2)


def test_flatten_spreads_a_channel_over_its_positions() -> None:
    parts = {"a": nn.Conv2d(3, 6, 1), "fc": nn.Linear(6 * 64, 2)}
    groups = groups_of(lambda m, x: m.fc(torch.flatten(m.a(x), 1)), parts)
    assert lines_of(groups)[0] == "6: a.weight[0] a.bias[0] fc.weight[1]"
    columns = groups.channel_of[groups.labels.sources["fc.weight"].atoms[1]]
    assert columns.reshape(6, 64).std(axis=1).max() == 0


def test_heads_are_blocks_of_equal_size() -> None:
    parts = {"qkv": nn.Linear(6, 24), "out": nn.Linear(8, 6)}

    def run(m: Any, x: Tensor) -> Any:
        parts = m.qkv(x).chunk(3, -1)
        q, k, v = (p.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(1, 2).flatten(2))

    groups = groups_of(run, parts, shape=(5, 6))
    assert lines_of(groups)[0] == "8: qkv.weight[0] qkv.bias[0]"
    assert "8: qkv.weight[0] qkv.bias[0] out.weight[1]" in lines_of(groups)
    assert int(groups.blocks.is_head.sum()) > 0
    heads = groups.blocks.rows[groups.blocks.is_head]
    assert len(set(heads.tolist())) == 2
    assert all(nest.shape[-1] == 4 for nest in groups.nests)


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_operator_of_the_table_exists() -> None:
    missing = []
    has_transformers = importlib.util.find_spec("transformers") is not None
    if has_transformers:
        importlib.import_module("transformers.integrations.moe")  # it registers its own
    for name in known_operators():
        namespace, _, operator = name.partition("::")
        if namespace == "transformers" and not has_transformers:
            continue
        if not hasattr(getattr(torch.ops, namespace), operator):
            missing.append(name)
    assert missing == []


def test_in_place_form_shares_the_rule() -> None:
    assert find_rule(torch.ops.aten.relu_.default) is not None
    assert find_rule(torch.ops.aten.add_.Tensor) is not None
    assert find_rule(torch.ops.aten.view.default) is find_rule(torch.ops.aten.view.default)


def test_operator_cannot_have_two_rules() -> None:
    with pytest.raises(ValueError, match="operator aten::relu already has the rule same"):
        rule("relu")(lambda trace, call: None)


def test_operator_without_a_rule_pins_what_reaches_it_and_is_reported() -> None:
    parts = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 4, 1), "c": nn.Conv2d(4, 2, 1)}
    groups = groups_of(lambda m, x: m.c(m.b(m.a(x).masked_scatter(m.a(x) > 0, x))), parts)
    name = "aten.masked_scatter.default"
    assert groups.labels.unknown == {name: ("masked_scatter",)}
    why = f"operator {name} has no labelling rule (node masked_scatter)"
    assert lines_of(groups)[0] == f"6: a.weight[0] a.bias[0] | {why}"
    assert "4: b.weight[0] b.bias[0] c.weight[1]" in lines_of(groups)
    assert any(k.what == "a.weight[0] (6 channels)" and k.why == why for k in groups.kept)
    held = 100 * 2 * 18 / (2 * 18 + 24 + 8)  # of the MACs, those of a, which is called twice
    first = groups.kept[0]
    assert first.what == f"operator {name} at node masked_scatter"
    assert first.why.endswith(f"and with it {held:.1f}% of the MACs")
