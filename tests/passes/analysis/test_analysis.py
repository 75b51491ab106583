"""Analysis passes: the facts that they return, what they need, and that they change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.errors import PassError, PlanError, TargetError, UsageError
from graphprune.groups import DependencyGroups
from graphprune.pipeline import Pipeline
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.scores import Scores
from tests.models import tiny_dense, tiny_residual, tiny_transformer


@pytest.fixture
def program() -> Program:
    return gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16))


def test_dependency_groups_is_the_analysis(program: Program) -> None:
    facts = Pipeline.parse("dependency-groups").run(program).facts
    groups = facts[DependencyGroups]
    assert isinstance(groups, DependencyGroups)
    assert str(groups) == str(gp.analyze(program))


def plan_of(program: Program, step: str, **options: Any) -> Plan:
    pipeline = Pipeline.parse(f"dependency-groups,random,{step}")
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)
    result = pipeline.run(program, **options)
    assert not any(record.modified for record in result.records)
    plan = result.facts[Plan]
    assert isinstance(plan, Plan)
    return plan


def test_choose_channels_makes_the_plan(program: Program) -> None:
    plan = plan_of(program, 'choose-channels{target="macs=0.5"}', seed=4)
    assert (plan.method, plan.target, plan.seed) == ("random", "macs=0.5", 4)
    groups = gp.analyze(program)
    keep = plan.keep(program, groups)
    assert 0.49 <= groups.cost.total(keep).macs / groups.cost.macs <= 0.5
    assert plan.removed.channels == sum(int((~keep[g.channels]).sum()) for g in groups)


def test_options_reach_the_budget() -> None:
    program = gp.capture(tiny_transformer(), torch.randn(1, 3, 16, 16))
    groups = gp.analyze(program)
    rounded = plan_of(program, 'choose-channels{target="ratio=0.5" round_to=4}')
    for group in groups:
        if not group.pinned and len(group) % 4 == 0:
            assert int(rounded.keep(program, groups)[group.channels].sum()) % 4 == 0
    heads = plan_of(program, 'choose-channels{target="ratio=0.5" granularity=heads}')
    assert heads.removed.heads == 2 + 1
    gentle = plan_of(program, 'choose-channels{target="macs=0.9" max_ratio=0.25}')
    keep = gentle.keep(program, groups)
    assert all((~keep[g.channels]).mean() <= 0.25 for g in groups)
    uniform = plan_of(program, 'choose-channels{target="macs=0.5" scope=uniform}')
    assert uniform.slices


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ('target="flops=1"', TargetError, "'flops=1' is not understood"),
        ('target="macs=0.000001"', TargetError, "cannot be reached"),
        (
            "granularity=layers",
            UsageError,
            "granularity 'layers' is not known; known: channels, widths, head-dims",
        ),
        ("round_to=0", UsageError, "round_to: expected auto, or a number of at least 1, found '0'"),
        ("round_to=some", UsageError, "round_to: expected auto, or a number .*, found 'some'"),
        ("scope=local", UsageError, "scope"),
    ],
)
def test_wrong_options_are_refused(
    program: Program, options: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_of(program, f"choose-channels{{{options}}}")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("choose-channels", "dependency-groups"),
        ("dependency-groups,choose-channels", "magnitude"),
        ("magnitude", "dependency-groups"),
        ("load-plan{path=plan.json}", "dependency-groups"),
        ("dependency-groups,remove-channels", "choose-channels"),
    ],
)
def test_missing_facts_are_named(program: Program, text: str, missing: str) -> None:
    with pytest.raises(PassError, match=missing):
        Pipeline.parse(text).run(program)


class TestLoadPlan:
    def test_plan_of_a_file_is_the_plan(self, program: Program, tmp_path: Path) -> None:
        plan = plan_of(program, 'choose-channels{target="macs=0.5"}')
        path = tmp_path / "plan.json"
        plan.save(path)
        pipeline = Pipeline.parse(f'dependency-groups,load-plan{{path="{path}"}},remove-channels')
        result = pipeline.run(program)
        assert result.facts[Plan] == plan
        chosen = Pipeline.parse(
            'dependency-groups,random,choose-channels{target="macs=0.5"},remove-channels'
        ).run(program)
        for (_, a), (_, b) in zip(
            result.program.named_tensors(), chosen.program.named_tensors(), strict=True
        ):
            assert torch.equal(a, b)

    def test_plan_of_another_model_is_refused(self, program: Program, tmp_path: Path) -> None:
        plan_of(program, 'choose-channels{target="macs=0.5"}').save(tmp_path / "plan.json")
        other = gp.capture(tiny_dense(), torch.randn(1, 3, 16, 16))
        pipeline = Pipeline.parse(f'dependency-groups,load-plan{{path="{tmp_path}/plan.json"}}')
        with pytest.raises(PlanError, match="the plan was made for"):
            pipeline.run(other)

    def test_missing_file_is_refused(self, program: Program, tmp_path: Path) -> None:
        pipeline = Pipeline.parse(f'dependency-groups,load-plan{{path="{tmp_path}/none.json"}}')
        with pytest.raises(PlanError, match="cannot read the plan"):
            pipeline.run(program)


def test_scores_belong_to_channels(program: Program) -> None:
    facts = Pipeline.parse("dependency-groups,random").run(program, seed=1).facts
    scores = facts[Scores]
    assert isinstance(scores, Scores)
    assert np.isfinite(scores.values).all()
