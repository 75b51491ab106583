"""Propagation: labels are handed out again as long as the graph is the same."""

from __future__ import annotations

import torch
from torch import nn

import graphprune as gp
from graphprune.labels import propagate
from graphprune.program import Program


def _program() -> Program:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return gp.capture(model.eval(), torch.randn(1, 3, 9, 9))


def test_analysis_uses_the_labels_of_capture() -> None:
    program = _program()
    first = propagate(program)
    assert propagate(program) is first
    assert propagate(program.clone()) is first
    assert first.batch == 2  # what capture ran with, to see whether the batch of one may vary


def test_a_changed_graph_is_labelled_anew() -> None:
    program = _program()
    first = propagate(program)
    relu = next(n for n in program.module.graph.nodes if n.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    program.module.graph.erase_node(relu)
    second = propagate(program)
    assert second is not first
    assert relu.name not in second.values


def test_a_changed_module_is_labelled_anew() -> None:
    program = _program()
    first = propagate(program)
    last = program.module.get_submodule("2")
    assert isinstance(last, nn.Conv2d)
    last.stride = (2, 2)
    assert propagate(program) is not first


def test_values_may_change() -> None:
    program = _program()
    first = propagate(program)
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.mul_(2)
    assert propagate(program) is first


def test_a_given_batch_is_used() -> None:
    program = _program()
    labels = propagate(program, batch=5)
    assert labels.batch == 5
    assert labels.values["output"].shape[0] == 5
