"""Removing residual blocks: named or planned, proven, and the base that later targets are fractions of."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from graphprune.data import load_data
from graphprune.errors import PassError, PlanError
from graphprune.groups import analyze
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from tests import gate_networks


@pytest.fixture
def program() -> Program:
    return gp.capture(gate_networks.residual(), torch.randn(2, 1, 8, 8))


def test_blocks_go_by_name(program: Program) -> None:
    result = Pipeline.parse("dependency-groups,remove-blocks{names=(left)},clean-up").run(program)
    assert result.removed.blocks == ("left",)
    assert result.checks["surgery"].passed
    assert result.checks["surgery"].max_abs_err == 0.0
    assert not [n for n, _ in result.program.named_tensors() if n.startswith("left")]
    assert result.program.history[0] == "remove-blocks: left"


def test_a_plan_is_needed_where_no_names_are_given(program: Program) -> None:
    with pytest.raises(PassError, match="needs Plan"):
        Pipeline.parse("dependency-groups,remove-blocks").run(program)
    with pytest.raises(PlanError, match="has no residual block 'lift'; known: left, right"):
        Pipeline.parse("dependency-groups,remove-blocks{names=(lift)}").run(program)


@pytest.mark.parametrize("method", ["magnitude,choose-channels", "obs", "trainable-gates"])
def test_targets_stay_fractions_of_the_program_that_had_all_blocks(
    program: Program, method: str
) -> None:
    pytest.importorskip("sklearn")
    dense = analyze(program).cost.macs
    options = 'target="macs=0.3" round_to=1'
    options += " epochs=1" if method == "trainable-gates" else ""
    text = f"dependency-groups,remove-blocks{{names=(left)}},dependency-groups,{method}{{{options}}},remove-channels"
    result = Pipeline.parse(text).run(program, data=load_data("digits"))
    assert 0.27 * dense <= analyze(result.program).cost.macs <= 0.3 * dense
    assert result.removed.blocks == ("left",)
    assert result.removed.channels > 0
    assert result.passed
    if method == "trainable-gates":
        share = analyze(result.program).cost.macs / dense
        assert result.measurements["trainable-gates.chosen_macs"] == pytest.approx(share)


def test_blocks_that_go_one_after_the_other_are_all_known(program: Program) -> None:
    text = "dependency-groups,remove-blocks{names=(right)},dependency-groups,remove-blocks{names=(left)}"
    result = Pipeline.parse(text).run(program)
    assert result.program.origin is not None
    assert result.program.origin.blocks == ("right", "left")
    assert result.program.origin.macs == analyze(program).cost.macs
