"""Plans: what a file says comes back, and a plan that does not fit is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.errors import PlanError
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.plan import Plan, fingerprint
from graphprune.program import Origin, Program, Slices
from graphprune.residual import named_blocks, without_blocks
from graphprune.target import parse_target
from tests import gate_networks
from tests.exactness import random_scores
from tests.models import tiny_dense, tiny_residual, tiny_transformer


@pytest.fixture
def program() -> Program:
    return gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16), source="tiny")


@pytest.fixture
def groups(program: Program) -> DependencyGroups:
    return analyze(program)


@pytest.fixture
def plan(program: Program, groups: DependencyGroups) -> Plan:
    choice = choose(groups, random_scores(groups, 0), parse_target("macs=0.5"))
    return Plan.of(program, groups, choice.keep, method="random", target="macs=0.5", seed=3)


def test_plan_says_what_stays_where(program: Program, groups: DependencyGroups, plan: Plan) -> None:
    cut = cut_program(program, groups, plan.keep(program, groups)).program
    shapes = {name: tensor.shape for name, tensor in cut.named_tensors()}
    for name, dims in plan.slices.items():
        for dim, kept in dims.items():
            assert shapes[name][dim] == len(kept)
            assert list(kept) == sorted(set(kept))
    assert (plan.model, plan.method, plan.target, plan.seed) == ("tiny", "random", "macs=0.5", 3)
    assert plan.removed.channels > 0


@pytest.mark.parametrize("model", [tiny_residual, tiny_dense, tiny_transformer])
def test_file_comes_back_and_replays(model: Any, tmp_path: Path) -> None:
    program = gp.capture(model(), torch.randn(1, 3, 16, 16))
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 1), parse_target("macs=0.6")).keep
    plan = Plan.of(program, groups, keep)
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert json.loads(path.read_text()) == plan.to_json()
    replayed = loaded.keep(program, groups)
    places = [np.array_equal(keep[g.channels], replayed[g.channels]) for g in groups]
    assert all(places)
    first, second = (cut_program(program, groups, k).program for k in (keep, replayed))
    assert str(first) == str(second)
    for (_, a), (_, b) in zip(first.named_tensors(), second.named_tensors(), strict=True):
        assert torch.equal(a, b)


def test_plan_that_removes_nothing(program: Program, groups: DependencyGroups) -> None:
    plan = Plan.of(program, groups, groups.cost.everything())
    assert plan.slices == {}
    assert plan.removed.channels == 0
    assert plan.keep(program, groups).all()


def test_choice_that_breaks_constraints_makes_no_plan(
    program: Program, groups: DependencyGroups
) -> None:
    keep = groups.cost.everything()
    keep[groups[0].channels] = False
    with pytest.raises(PlanError, match="breaks .* constraints: a tensor would lose all"):
        Plan.of(program, groups, keep)


def test_fingerprint_follows_names_and_shapes_only(program: Program) -> None:
    same = gp.capture(tiny_residual(), torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        same.module.get_parameter("fc.bias").add_(1)
    assert fingerprint(same) == fingerprint(program)
    other = gp.capture(tiny_dense(), torch.randn(1, 3, 16, 16))
    assert fingerprint(other) != fingerprint(program)


def test_other_model_is_refused(plan: Plan) -> None:
    other = gp.capture(tiny_dense(), torch.randn(1, 3, 16, 16), source="dense")
    with pytest.raises(PlanError, match="made for 'tiny' with parameters .* but 'dense' has"):
        plan.keep(other, analyze(other))


def changed(plan: Plan, name: str, dim: int, kept: tuple[int, ...]) -> Plan:
    slices = {**plan.slices, name: {**plan.slices.get(name, {}), dim: kept}}
    return dataclasses.replace(plan, slices=slices)


@pytest.mark.parametrize(
    ("name", "dim", "kept", "message"),
    [
        ("fc.weight", 1, (0, 1), r"contradicts itself at .*: its channels are coupled with others"),
        ("fc.weight", 1, (0, 99), r"keeps indices \(0, 99\) of fc.weight\[1\], which has 20"),
        ("fc.weight", 1, (-1, 2), r"keeps indices \(-1, 2\) of fc.weight\[1\]"),
        ("fc.weight", 1, (), r"keeps indices \(\) of fc.weight\[1\]"),
        ("fc.weight", 0, (0,), r"breaks 1 constraints: 9 pinned channels would go"),
        (
            "stem.0.weight",
            2,
            (0,),
            r"cuts stem.0.weight\[2\], which holds no removable channels; known there: "
            r"stem.0.weight\[0\], stem.0.weight\[1\]",
        ),
        ("nothing", 0, (0,), r"cuts nothing\[0\], which holds no .*; known there: none"),
    ],
)
def test_slices_that_contradict_are_refused(
    program: Program,
    groups: DependencyGroups,
    plan: Plan,
    name: str,
    dim: int,
    kept: tuple[int, ...],
    message: str,
) -> None:
    with pytest.raises(PlanError, match=message):
        changed(plan, name, dim, kept).keep(program, groups)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read the plan"),
        ("{", "cannot read the plan"),
        ("[]", "not a plan .TypeError"),
        ("3", "not a plan .TypeError"),
        ("{}", "not a plan .KeyError: 'version'"),
        ('{"version": 9}', "version 9, this graphprune reads version 1"),
        ('{"version": 1, "slices": {}}', "not a plan .KeyError: 'model'"),
        (
            '{"version": 1, "model": "m", "fingerprint": "f", "slices": {"a": {"x": [1]}}}',
            "not a plan .ValueError",
        ),
        (
            '{"version": 1, "model": "m", "fingerprint": "f", "slices": {"a": [1]}}',
            "not a plan .AttributeError",
        ),
    ],
)
def test_file_that_is_no_plan_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "absent.json")
    binary = tmp_path / "plan.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(binary)


def test_residual_blocks_are_part_of_a_plan(tmp_path: Path) -> None:
    dense = gp.capture(gate_networks.residual(), torch.randn(2, 1, 8, 8))
    groups = analyze(dense)
    program = without_blocks(dense, groups, named_blocks(dense, groups, ["left"]))
    fewer = analyze(program)
    choice = choose(fewer, random_scores(fewer, 0), parse_target("macs=0.5"))
    plan = Plan.of(program, fewer, choice.keep)
    assert plan.blocks == ("left",)
    assert not any(name.startswith("left") for name in plan.slices)
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["blocks"] == ["left"]
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert (loaded.keep(program, fewer) == choice.keep).all()
    with pytest.raises(PlanError, match="without residual blocks left, and .* has all of its; put"):
        loaded.keep(dense, groups)


def test_a_plan_of_before_there_were_blocks_is_read(plan: Plan) -> None:
    data = plan.to_json()
    del data["blocks"]
    assert Plan.from_json(data) == plan


def test_two_cuts_are_one_in_the_names_of_what_came_in(
    program: Program, groups: DependencyGroups
) -> None:
    first = choose(groups, random_scores(groups, 0), parse_target("macs=0.8")).keep
    once = cut_program(program, groups, first).program
    inside = analyze(once)
    second = choose(inside, random_scores(inside, 1), parse_target("macs=0.8")).keep
    twice = cut_program(once, inside, second).program
    plan = Plan.between(program, groups, twice)
    assert plan.fingerprint == fingerprint(program)
    cut = cut_program(program, groups, plan.keep(program, groups)).program
    for (name, a), (other, b) in zip(cut.named_tensors(), twice.named_tensors(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert Plan.between(program, groups, once) == Plan.of(program, groups, first)


def test_a_cut_that_couplings_forbid_has_no_plan(
    program: Program, groups: DependencyGroups
) -> None:
    here = Place("fc.weight", 1)
    there = next(p for g in groups if here in g.places for p in g.places if p != here)
    slices: Slices = {here.name: {here.dim: (0, 1)}, there.name: {there.dim: (0, 1, 2)}}
    cut = program.evolve(program.module, origin=Origin(params=1, macs=1, slices=slices))
    with pytest.raises(
        PlanError, match=r"more of .*\[\d\] is left than the couplings of tiny leave"
    ):
        Plan.between(program, groups, cut)
