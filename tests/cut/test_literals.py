"""Sizes in the graph: whatever says one is rewritten, in both dialects, and only where the cut changes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.groups import analyze
from graphprune.target import Target
from tests.blocks import Block
from tests.exactness import assert_cut_is_exact, assert_identity, capture_as, random_scores

C, S = 8, 6
Run = Callable[[Tensor], Tensor]
CASES: dict[str, tuple[Run, int, dict[str, str]]] = {
    # name: (what happens between two convolutions, channels of the result, node -> new arguments in the fx dialect)
    "view": (
        lambda x: x.view(-1, 2, C // 2, S, S).sum(1),
        C // 2,
        {"view": "(a, -1, 2, 2, 6, 6)"},
    ),
    "reshape with a computed batch": (
        lambda x: x.reshape(x.shape[0], 2, C // 2, S * S).sum(1).reshape(x.shape[0], C // 2, S, S),
        C // 2,
        {"reshape": "(a, getitem, 2, 2, 36)", "reshape_1": "(sum_1, getitem_1, 2, 6, 6)"},
    ),
    "slice": (lambda x: x[:, : C // 2] + x[:, C // 2 :], C // 2, {}),
    "slice from the end": (lambda x: torch.cat([x, x[:, -3:]], 1), C + 3, {}),
    "narrow": (lambda x: x.narrow(1, 2, 5), 5, {}),
    "split by a size": (lambda x: sum(x.split(4, 1)[1:], x.split(4, 1)[0]), 4, {}),
    "split by sizes": (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), C, {}),
    "chunk": (lambda x: torch.mul(*x.chunk(2, 1)), C // 2, {}),
    "uneven chunk": (lambda x: torch.cat([p * 2 for p in x.chunk(3, 1)], 1), C, {}),
    "tensor_split": (lambda x: torch.cat([p * 2 for p in x.tensor_split(3, 1)], 1), C, {}),
    "pad": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), C + 3, {}),
    "pad that takes away": (lambda x: F.pad(x, (0, 0, 0, 0, -2, -1)), C - 3, {}),
    "expand": (
        lambda x: x + x.mean((2, 3), keepdim=True).expand(-1, C, S, S),
        C,
        {"expand": "(mean, -1, 4, 6, 6)"},
    ),
    "unflatten": (lambda x: x.unflatten(1, (4, 2)).sum(2), 4, {}),
    "zeros": (lambda x: torch.cat([x, x.new_zeros(x.shape[0], 3, S, S)], 1), C + 3, {}),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 2 * C, {}),
    "write into a slice": (lambda x: _written(x), C, {}),
    "layer norm": (
        lambda x: F.layer_norm(x, (C, S, S)),
        C,
        {"layer_norm": "(a, (4, 6, 6))"},
    ),
    "group norm of channels": (lambda x: F.group_norm(x, C), C, {"group_norm": "(a, 4)"}),
    "group norm of groups": (lambda x: F.group_norm(x, 2), C, {}),
    "scale by a size that goes": (lambda x: x / x.shape[1], C, {"truediv": "(a, 8)"}),
}


def _written(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 3:] = 0
    y[:, :3].copy_(x[:, 5:])
    return y


def network(run: Run, outs: int) -> nn.Module:
    parts = {"a": nn.Conv2d(3, C, 1), "b": nn.Conv2d(outs, 3, 1)}
    return Block(lambda m, x: m.b(run(m.a(x))), **parts).eval()


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("name", CASES)
def test_cut_is_exact_and_identity_changes_nothing(name: str, dialect: str) -> None:
    run, outs, _ = CASES[name]
    program = capture_as(network(run, outs), torch.randn(1, 3, S, S), dialect)
    groups = analyze(program)
    assert_identity(program, groups)
    for seed in range(2):
        keep = choose(groups, random_scores(groups, seed), Target(ratio=0.5)).keep
        cut = assert_cut_is_exact(program, groups, keep)
        assert cut.module.get_parameter("a.weight").shape[0] < C


@pytest.mark.parametrize("name", [n for n, (_, _, changes) in CASES.items() if changes])
def test_rewritten_arguments_are_those_expected(name: str) -> None:
    run, outs, expected = CASES[name]
    program = capture_as(network(run, outs), torch.randn(1, 3, S, S), "fx")
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=0.5)).keep
    cut = cut_program(program, groups, keep)
    found = {n.name: str(n.args) for n in cut.program.module.graph.nodes}
    assert {node: found[node] for node in expected} == expected
    written = {c.node: c.new for c in cut.literals if c.argument == "args"}
    assert {node: written.get(node) for node in expected} == expected


def test_sizes_that_no_cut_changes_stay_as_they_are() -> None:
    program = capture_as(
        network(lambda x: x.view(-1, C, S * S).view(-1, C, S, S), C), torch.randn(1, 3, S, S), "fx"
    )
    groups = analyze(program)
    keep = groups.cost.everything()
    cut = cut_program(program, groups, keep)
    assert cut.literals == ()
    assert cut.program.module.code == program.module.code
