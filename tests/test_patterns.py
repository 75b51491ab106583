"""Every one-pattern network is cut exactly, in both dialects, where its architecture allows; see tests/patterns/.

The proof of the project compares the cut network with the original, masked at its consumers, node by node. Beside it
stands one that knows nothing of labels: zeros in all removed slices of the user's own module must give the cut
network's outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphprune as gp
from graphprune.capture import _capture_exported, _export_module
from graphprune.cost import Keep
from graphprune.groups import DependencyGroups, analyze
from graphprune.program import Program
from graphprune.target import Target, parse_target
from tests.exactness import assert_cut_is_exact, assert_identity, choose_or_none, in_double
from tests.patterns import PATTERNS, Net, Pattern
from tests.strategies import randomize

HALF = Target(ratio=0.5)
EXPORTED_IN_CI = 8
"""torch.export takes a second for each; CI exports one pattern of this many, --slow all of them."""


def made(pattern: Pattern) -> Net:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old spellings are patterns too
        net = pattern.make().eval()
    randomize(net)
    return net


def captured(net: Net, dialect: str) -> Program:
    if dialect == "fx":
        return gp.capture(net, net.example)
    if dialect == "export":
        return _export_module(net, net.example, "Net", [])
    with torch.no_grad(), warnings.catch_warnings():
        # Recurrent modules list their parameters anew, and hooks compute a weight out of others.
        warnings.filterwarnings("ignore", "The tensor attributes? self", UserWarning)
        core = torch.export.export(net, net.example, strict=False).run_decompositions()
    return _capture_exported(core, net.example, source="Net")


def place(program: Program, name: str) -> tuple[str, int]:
    """Return parameter and dimension of ``a`` (a module's weight, dim 0), ``w``, or ``w[1]``."""
    base, _, dim = name.partition("[")
    names = {n for n, _ in program.module.named_parameters()}
    return base if base in names else f"{base}.weight", int(dim.removesuffix("]") or 0)


def removed(before: nn.Module, after: Program) -> set[tuple[str, int]]:
    new = dict(after.module.named_parameters())
    return {
        (name, dim)
        for name, old in before.named_parameters()
        for dim in range(old.dim())
        if name in new and new[name].shape[dim] < old.shape[dim]
    }


def zeroed(net: nn.Module, groups: DependencyGroups, keep: Keep) -> nn.Module:
    """Return the user's module, in float64, with zeros wherever the cut takes something away."""
    clone = copy.deepcopy(net).double()
    named: Mapping[str, Tensor] = dict(clone.named_parameters())
    with torch.no_grad():
        for name, source in groups.labels.sources.items():
            for dim, atoms in source.atoms.items():
                gone = torch.from_numpy(np.flatnonzero(~keep[groups.channel_of[atoms]]))
                if name in named:
                    named[name].index_fill_(dim, gone, 0.0)
    return clone


def assert_zeros_give_the_same(
    net: Net,
    program: Program,
    groups: DependencyGroups,
    keep: Keep,
    cut: Program,
) -> None:
    inputs = program.batch(2, seed=3, dtype=torch.float64)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            expected = tree_leaves(zeroed(net, groups, keep)(*inputs))
            found = tree_leaves(in_double(cut).module(*inputs))
    finally:
        torch.set_default_dtype(previous)
    for old, new in zip(expected, found, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


def check(pattern: Pattern, dialect: str, targets: tuple[str, ...]) -> None:
    net = made(pattern)
    program = captured(net, dialect)
    groups = analyze(program)
    assert_identity(program, groups)
    half = choose_or_none(groups, 0, HALF)
    assert half is not None
    cut = assert_cut_is_exact(program, groups, half.keep)
    if pattern.zeros:
        assert_zeros_give_the_same(net, program, groups, half.keep, cut)
    gone = removed(program.module, cut)
    missing = {place(program, name) for name in pattern.cut} - gone
    assert not missing, f"could be cut and were not: {missing}\n{groups}"
    for name in pattern.kept:
        parameter, dim = place(program, name)
        reasons = [
            g.pinned or ""
            for g in groups
            if any((p.name, p.dim) == (parameter, dim) for p in g.places)
        ]
        assert (parameter, dim) not in gone
        assert any(pattern.why in reason for reason in reasons), reasons
    for seed, text in enumerate(targets, start=1):
        choice = choose_or_none(groups, seed, parse_target(text))
        if choice is not None:
            assert_cut_is_exact(program, groups, choice.keep)


def test_there_are_many_patterns() -> None:
    assert len(PATTERNS) >= 120


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_cut_exactly(name: str) -> None:
    check(PATTERNS[name], "fx", ("macs=0.5",))


@pytest.mark.parametrize("name", [n for i, n in enumerate(PATTERNS) if i % EXPORTED_IN_CI == 0])
def test_exported_pattern_is_cut_exactly(name: str) -> None:
    check(PATTERNS[name], "export", ("macs=0.5",))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_cut_exactly_by_many_choices(name: str, dialect: str) -> None:
    check(
        PATTERNS[name],
        dialect,
        ("macs=0.5", "ratio=0.2", "ratio=0.4", "ratio=0.6", "ratio=0.8", "params=0.6"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_of_core_operators_is_cut_exactly(name: str) -> None:
    """As above, after torch.export has taken composite operators apart; what is cut may be less."""
    net = made(PATTERNS[name])
    program = captured(net, "core")
    groups = analyze(program)
    assert_identity(program, groups)
    for seed, text in enumerate(("ratio=0.3", "ratio=0.6", "macs=0.5")):
        choice = choose_or_none(groups, seed, parse_target(text))
        if choice is not None:
            assert_cut_is_exact(program, groups, choice.keep)
