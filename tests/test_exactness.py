"""Every cut of every small random network is exact, in both dialects; see tests/strategies.py for the networks."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphprune.budget import choose
from graphprune.groups import analyze
from graphprune.target import Target, parse_target
from tests.exactness import (
    assert_cut_is_exact,
    assert_identity,
    capture_as,
    choose_or_none,
    random_scores,
)
from tests.strategies import Recipe, build, recipes

TARGETS = ("ratio=0.3", "ratio=0.6", "macs=0.6", "params=0.7")
QUICK = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# torch.export takes about a second for each of these, the tracer a few milliseconds.
QUICK_EXPORT = settings(QUICK, max_examples=20)
NIGHTLY = settings(QUICK, max_examples=2000, derandomize=False, print_blob=True)


def assert_every_cut_is_exact(recipe: Recipe, seed: int, text: str, dialect: str) -> None:
    program = capture_as(*build(recipe), dialect)
    groups = analyze(program)
    assert_identity(program, groups)
    choice = choose_or_none(groups, seed, parse_target(text))
    assume(choice is not None)
    assert choice is not None
    assert_cut_is_exact(program, groups, choice.keep)


@QUICK
@given(recipe=recipes(), seed=st.integers(0, 9), target=st.sampled_from(TARGETS))
def test_cuts_of_the_fx_dialect_are_exact(recipe: Recipe, seed: int, target: str) -> None:
    assert_every_cut_is_exact(recipe, seed, target, "fx")


@QUICK_EXPORT
@given(recipe=recipes(most=4), seed=st.integers(0, 9), target=st.sampled_from(TARGETS))
def test_cuts_of_the_export_dialect_are_exact(recipe: Recipe, seed: int, target: str) -> None:
    assert_every_cut_is_exact(recipe, seed, target, "export")


@pytest.mark.slow
@NIGHTLY
@given(recipe=recipes(most=8), seed=st.integers(0, 9), target=st.sampled_from(TARGETS))
def test_many_cuts_of_the_fx_dialect_are_exact(recipe: Recipe, seed: int, target: str) -> None:
    assert_every_cut_is_exact(recipe, seed, target, "fx")


@pytest.mark.slow
@NIGHTLY
@given(recipe=recipes(), seed=st.integers(0, 9), target=st.sampled_from(TARGETS))
def test_many_cuts_of_the_export_dialect_are_exact(recipe: Recipe, seed: int, target: str) -> None:
    assert_every_cut_is_exact(recipe, seed, target, "export")


@pytest.mark.parametrize("granularity", [("heads",), ("channels", "heads")], ids=" ".join)
@pytest.mark.parametrize("seed", range(4))
def test_cuts_of_whole_heads_are_exact(granularity: tuple[str, ...], seed: int) -> None:
    recipe = Recipe(
        rank=2,
        blocks=(("norm", 3),),
        tokens=(("attention", seed), ("grouped_attention", seed), ("multihead", seed)),
        seed=seed,
    )
    program = capture_as(*build(recipe), "fx")
    groups = analyze(program)
    target = Target(ratio=0.5)
    choice = choose(
        groups,
        random_scores(groups, seed),
        target,
        granularity=granularity,  # type: ignore[arg-type]
    )
    assert_cut_is_exact(program, groups, choice.keep)
