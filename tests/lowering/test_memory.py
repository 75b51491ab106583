"""Shared memory: views and writes in place are found in both dialects, and new tensors are told from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphprune.lowering.memory import Memory, is_alias, written_by
from graphprune.program import Program
from tests.exactness import capture_as


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.flat = nn.Flatten()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        parts = self.drop(self.flat(y)).view(-1, 2, 4).transpose(1, 2)
        parts.mul_(2)
        z = torch.zeros_like(y)
        torch.add(y, 1, out=z)
        return F.gelu(y), z, x[:, :3]


@pytest.fixture(params=["fx", "export"])
def program(request: pytest.FixtureRequest) -> Program:
    return capture_as(_Net().eval(), torch.randn(2, 8), request.param)


def _node(program: Program, name: str) -> fx.Node:
    nodes: dict[str, fx.Node] = {node.name: node for node in program.module.graph.nodes}
    return nodes[name]


def test_a_view_shares_memory_and_a_result_does_not(program: Program) -> None:
    memory = Memory(program.module.graph, program.module)
    linear = _node(program, "linear")
    view, mul, gelu = (_node(program, word) for word in ("transpose", "mul_", "gelu"))
    assert {view, mul} <= memory.sharing(linear)
    assert gelu not in memory.sharing(linear)
    assert is_alias(view, program.module)
    assert not is_alias(gelu, program.module)
    assert memory.is_given(program.module.graph.output_node().all_input_nodes[-1])
    assert not memory.is_given(linear)


def test_whoever_writes_is_known_with_what_it_writes_into() -> None:
    program = capture_as(_Net().eval(), torch.randn(2, 8), "fx")
    memory = Memory(program.module.graph, program.module)
    linear, zeros, add = (_node(program, word) for word in ("linear", "zeros_like", "add"))
    assert [node.name for node in memory.writers(linear)] == ["mul_"]
    assert memory.writers(zeros) == [add]
    assert written_by(add, program.module) is zeros
    assert written_by(linear, program.module) is None
    assert add in memory.after(linear)
    assert linear not in memory.after(linear)
