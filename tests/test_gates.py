"""Gates: their function, their cost, and that a gate of 0 is the removal, in random networks of both dialects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphprune.budget import choose, parse_target
from graphprune.cost import Keep
from graphprune.cut import cut_program
from graphprune.errors import TargetError
from graphprune.gates import LIMIT, SHAPES, GateCost, Shape, trainable_gate
from graphprune.gating import PREFIX, Gated, insert_gates
from graphprune.groups import DependencyGroups, analyze
from graphprune.program import Program
from graphprune.scores import Scores
from graphprune.training.forms import training_form
from graphprune.units import Granularity
from tests import gate_networks
from tests.exactness import ERROR, capture_as, random_scores
from tests.models import tiny_dense, tiny_mobile, tiny_transformer
from tests.strategies import Recipe, build, recipes

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
QUICK_EXPORT = settings(QUICK, max_examples=12)


def literal(w: Tensor, shape: Shape, m: float) -> Tensor:
    """Return the trainable gate function as the paper writes it: step + sawtooth * gradient shape."""
    scaled = m * w
    sawtooth = (scaled - torch.floor(scaled).detach()) / m
    return (w >= 0).to(w.dtype) + sawtooth * SHAPES[shape](w)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_is_the_limit_of_the_literal_formula(shape: Shape) -> None:
    # The paper's M is finite: value and derivative differ by at most 1/M times |g| and |g'|, which are at most one.
    m = 1e6
    w = torch.linspace(-LIMIT, LIMIT, 101, dtype=torch.float64) + 1e-4 / 3
    ours, theirs = (w.clone().requires_grad_() for _ in range(2))
    weights = torch.linspace(-2, 2, len(w), dtype=torch.float64)
    a, b = trainable_gate(ours, shape), literal(theirs, shape, m)
    assert set(a.tolist()) == {0.0, 1.0}
    assert (a - b).abs().max() <= 1.01 / m
    for value in (a, b):
        (weights * value).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= 4 / m
    assert (SHAPES[shape](w) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_is_exact_in_bfloat16(shape: Shape) -> None:
    w = torch.tensor([-0.5, -1e-3, 0.0, 1e-3, 0.5], dtype=torch.bfloat16, requires_grad=True)
    gates = trainable_gate(w, shape)
    assert gates.tolist() == [0, 0, 1, 1, 1]
    gates.sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()
    assert (w.grad > 0).all()
    # The literal formula has nothing to say there: M w has no fraction left.
    scaled = torch.tensor([0.1, 0.3], dtype=torch.bfloat16) * 1e5
    assert torch.equal(scaled, scaled.floor())


def doubled(program: Program) -> Program:
    return program.map_floating(lambda t: t.double())


def gate(
    program: Program,
    groups: DependencyGroups,
    *,
    granularity: tuple[Granularity, ...] = ("channels",),
    shape: Shape = "one",
) -> Gated:
    scores = Scores(values=random_scores(groups, 0), method="random")
    return insert_gates(program, groups, scores, granularity=granularity, shape=shape)


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            return [t for t in tree_leaves(module(*inputs)) if isinstance(t, Tensor)]
    finally:
        torch.set_default_dtype(previous)


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        same = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, (x - y).abs().double()).max() if x.numel() else torch.zeros(())
        scale = x.abs().max() if x.numel() else torch.ones(())
        assert gap <= ERROR * max(1e-300, float(scale)), float(gap)


def assert_gates_are_the_cut(
    program: Program, groups: DependencyGroups, gated: Gated, keep: Keep
) -> None:
    """Freeze the gates at a choice and compare with the cut."""
    inputs = doubled(program).batch(3, seed=5, dtype=torch.float64)
    cut = cut_program(program, groups, keep).program
    gated.gates.freeze(torch.from_numpy(keep))
    assert_equal(outputs(cut.module, inputs), outputs(gated.program.module, inputs))


def assert_random_cut(recipe: Recipe, seed: int, text: str, dialect: str) -> None:
    program = doubled(capture_as(*build(recipe), dialect))
    groups = analyze(program)
    gated = gate(program, groups)
    inputs = program.batch(2, dtype=torch.float64)
    assert_equal(outputs(program.module, inputs), outputs(gated.program.module, inputs))
    assume(len(gated.units) > 0)
    try:
        choice = choose(gated.groups, random_scores(groups, seed), parse_target(text))
    except TargetError:
        assume(False)
    assert_gates_are_the_cut(program, groups, gated, choice.keep)


@QUICK
@given(recipe=recipes(), seed=st.integers(0, 9), target=st.sampled_from(["ratio=0.5", "macs=0.6"]))
def test_gates_of_the_fx_dialect_are_the_cut(recipe: Recipe, seed: int, target: str) -> None:
    assert_random_cut(recipe, seed, target, "fx")


@QUICK_EXPORT
@given(recipe=recipes(most=4), seed=st.integers(0, 9))
def test_gates_of_the_export_dialect_are_the_cut(recipe: Recipe, seed: int) -> None:
    assert_random_cut(recipe, seed, "ratio=0.5", "export")
