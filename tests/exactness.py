"""What every cut of every program must fulfil, in one assertion."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphprune as gp
from graphprune.budget import Choice, choose
from graphprune.capture import _export_module
from graphprune.cost import Keep
from graphprune.cut import cut_program
from graphprune.errors import TargetError
from graphprune.groups import DependencyGroups, analyze
from graphprune.program import Program
from graphprune.target import Target
from graphprune.verify import Masked, verify_surgery

__all__ = [
    "ERROR",
    "assert_cut_is_exact",
    "assert_identity",
    "capture_as",
    "choose_or_none",
    "in_double",
    "outputs_of",
    "random_scores",
]

ERROR = 1e-9
"""Largest relative difference in float64: rounding is near 1e-15, a wrong channel near 1."""


def capture_as(model: nn.Module, example: Tensor, dialect: str) -> Program:
    """Capture in the dialect asked for; ``fx`` falls back to export where the tracer cannot follow."""
    if dialect == "export":
        return _export_module(model, (example,), type(model).__name__, [])
    return gp.capture(model, example)


def in_double(program: Program) -> Program:
    """Return a clone in float64, with the types that torch.export writes into its graph."""
    clone = program.map_floating(lambda t: t.double())
    for node in clone.module.graph.nodes:
        if node.kwargs.get("dtype") == torch.float32:
            node.update_kwarg("dtype", torch.float64)
    clone.module.recompile()
    return clone


def random_scores(groups: DependencyGroups, seed: int) -> NDArray[np.float64]:
    """Return uniform scores."""
    return np.random.default_rng(seed).random(groups.num_channels)


def outputs_of(program: Program, size: int = 2) -> list[Tensor]:
    """Return the output tensors on random inputs."""
    with torch.inference_mode():
        return [
            t for t in tree_leaves(program.module(*program.batch(size))) if isinstance(t, Tensor)
        ]


def assert_cut_is_exact(program: Program, groups: DependencyGroups, keep: Keep) -> Program:
    """Cut, and check constraints, cost, meaning, signature, and that the input stays as it was; return the cut."""
    text = str(program)
    values = {name: tensor.clone() for name, tensor in program.named_tensors()}
    assert groups.violations(keep) == []
    predicted = groups.cost.total(keep)
    cut = cut_program(program, groups, keep).program
    assert predicted == analyze(cut).cost.total(), "predicted cost is not that of the cut program"
    assert predicted.params == sum(p.numel() for p in cut.module.parameters())
    check = verify_surgery(program, cut, Masked(groups, keep))
    assert check.passed, check.detail
    assert check.max_abs_err is not None
    assert check.max_abs_err < ERROR
    assert [t.shape for t in outputs_of(cut)] == [t.shape for t in outputs_of(program)]
    assert str(program) == text, "the input program was changed"
    for name, tensor in program.named_tensors():
        assert torch.equal(tensor, values[name]), f"{name} of the input program was changed"
    return cut


def assert_identity(program: Program, groups: DependencyGroups) -> None:
    """Check that keeping everything changes nothing."""
    cut = cut_program(program, groups, groups.cost.everything())
    assert not cut.attributes
    assert not cut.literals
    history = str(cut.program).splitlines()[:-1]
    assert history == str(program).splitlines()
    for old, new in zip(outputs_of(program), outputs_of(cut.program), strict=True):
        assert torch.equal(old, new)


def choose_or_none(groups: DependencyGroups, seed: int, target: Target) -> Choice | None:
    """Choose by random scores; None where the target cannot be reached."""
    try:
        return choose(groups, random_scores(groups, seed), target)
    except TargetError:
        return None
