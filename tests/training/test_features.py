"""Distillation inside the network: which tensors are compared, and that training brings them near."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.capture import capture
from graphprune.cut import cut_program
from graphprune.errors import UsageError
from graphprune.gates.insertion import insert_gates
from graphprune.gates.training import GateHook
from graphprune.groups import analyze
from graphprune.pipeline import Pipeline
from graphprune.program import Dialect, Program
from graphprune.scores import Scores
from graphprune.target import parse_target
from graphprune.training import Hook, Recipe, Trainer
from graphprune.training.distill import Teacher
from graphprune.training.features import _shapes, attention_map, insert_taps, stages
from graphprune.training.task import classification
from tests import gate_networks
from tests.exactness import random_scores
from tests.training.networks import data, program

CUT = 'dependency-groups,magnitude,choose-channels{target="macs=0.5"},remove-channels'


NO_GATES = Hook()


def cut_of(dense: Program) -> Program:
    return Pipeline.parse(CUT).run(dense, device="cpu").program


def apart(student: Program, dense: Program, hook: Hook = NO_GATES) -> float:
    teacher = Teacher(
        dense,
        classification(),
        temperature=1.0,
        device=torch.device("cpu"),
        memory_format=torch.contiguous_format,
        stages=stages(student, dense),
    )
    clone = student.clone().module
    taps = insert_taps(clone, teacher.stages)
    x = data().split("test")[:][0]
    with torch.no_grad():
        teacher.look((x,))
        clone(x)
        gates = {name: found for name in taps if (found := hook.gates_of(name)) is not None}
        return float(teacher.feature_distance(taps, gates))


def test_a_map_has_length_one_and_no_channels() -> None:
    x = torch.randn(3, 5, 4, 4)
    found = attention_map(x, (1,))
    assert found.shape == (3, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    wide = torch.cat([x, x], 1)
    torch.testing.assert_close(attention_map(wide, (1,)), found)
    torch.testing.assert_close(attention_map(x.permute(0, 2, 3, 1), (3,)), found)
    heads = wide.unflatten(1, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(attention_map(heads, (1, 2)), found)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_the_last_tensor_of_each_resolution_is_compared(dialect: Dialect) -> None:
    dense = program(dialect)
    found = stages(cut_of(dense), dense)
    assert len(found) == 2  # 8x8 and 4x4
    assert set(found.values()) == {(1,)}
    assert all("relu" in name for name in found)


def test_tokens_have_their_channels_last() -> None:
    dense = capture(gate_networks.transformer().eval(), torch.randn(2, 1, 8, 8))
    found = stages(cut_of(dense), dense)
    shapes = {name: len(shape) for name, shape in _shapes(dense).items()}
    tokens = {name for name in found if shapes[name] == 3}
    assert tokens
    assert {found[name] for name in tokens} == {(2,)}


class ChannelsLast(nn.Module):
    """Stages of 4x4 and 2x2 places with channels behind the places, after stages of 8x8 with channels before them."""

    def __init__(self, *, is_mixed: bool) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU()) if is_mixed else None
        self.patches = nn.Conv2d(12 if is_mixed else 1, 20, 2, 2)
        self.norm = nn.LayerNorm(20)
        self.up, self.down = nn.Linear(20, 44), nn.Linear(44, 20)
        self.merge = nn.Linear(80, 28)
        self.fc = nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.convs is not None:
            x = self.convs(x)
        x = self.patches(x).permute(0, 2, 3, 1)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        quarters = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
        x = F.gelu(self.merge(torch.cat(quarters, -1)))
        logits: Tensor = self.fc(x.mean((1, 2)))
        return logits


@pytest.mark.parametrize("is_mixed", [False, True])
def test_channels_are_where_each_tensor_has_them(is_mixed: bool) -> None:
    torch.manual_seed(0)
    dense = capture(ChannelsLast(is_mixed=is_mixed).eval(), torch.randn(2, 1, 8, 8))
    cut = cut_of(dense)
    shapes = _shapes(cut)
    found = stages(cut, dense)
    places = [(dims, shapes[name][1:3]) for name, dims in found.items() if dims == (3,)]
    assert places == [((3,), (4, 4)), ((3,), (2, 2))]
    assert [shapes[name][2:] for name, dims in found.items() if dims == (1,)] == [(8, 8)] * is_mixed
    assert found == stages(dense, dense)
    assert apart(cut, dense) > apart(dense, dense) == 0


@pytest.mark.parametrize("network", [gate_networks.residual, gate_networks.transformer])
def test_channels_that_gates_have_shut_do_not_count(network: Callable[[], nn.Module]) -> None:
    dense = capture(network(), torch.randn(2, 1, 8, 8))
    groups = analyze(dense)
    scores = Scores(values=random_scores(groups, 0), method="random")
    gated = insert_gates(dense, groups, scores)
    hook = GateHook(
        *(gated, parse_target("ratio=0.4")),
        granularity=("channels",),
        round_to=1,
        lr=None,
        penalty=1.0,
        frozen=0.0,
    )
    assert apart(gated.program, dense, hook) < 1e-10
    keep = hook.freeze().keep
    cut = cut_program(dense, groups, keep).program
    assert apart(gated.program, dense, hook) == pytest.approx(apart(cut, dense), rel=1e-4)
    assert apart(gated.program, dense) != pytest.approx(apart(cut, dense), rel=0.1)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_training_brings_maps_near(dialect: Dialect) -> None:
    dense = program(dialect, dropout=0.0, seed=3)
    students = [cut_of(dense) for _ in range(2)]
    with torch.no_grad():
        for student in students:
            for parameter in student.module.parameters():
                torch.manual_seed(0)
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert apart(students[0], dense) == apart(students[1], dense) > 0
    for student, features in zip(students, (0.0, 30.0), strict=True):
        recipe = Recipe(
            epochs=4, batch_size=16, lr=0.02, features=features, precision="float32", augment="none"
        )
        Trainer(program=student, recipe=recipe, data=data(), teacher=dense).fit()
        assert not any("tap" in name for name, _ in student.module.named_modules())
    assert apart(students[1], dense) < 0.5 * apart(students[0], dense)


def test_the_engine_asks_hooks_for_gates() -> None:
    class Shut(Hook):
        def gates_of(self, node: str) -> Tensor:
            return torch.zeros(())

    losses = []
    for features in (0.0, 3.0):
        recipe = Recipe(
            epochs=1, batch_size=96, lr=1e-9, features=features, distill=0.0, precision="float32"
        )
        dense = program(dropout=0.0)
        trainer = Trainer(
            program=dense.clone(), recipe=recipe, data=data(), teacher=dense, hooks=[Shut()]
        )
        losses.append(trainer.fit().last["loss"])
    # Nothing counts in the student's maps, and the dense program's have length one.
    assert losses[1] - losses[0] == pytest.approx(3.0, rel=1e-4)


def test_refusals() -> None:
    flat = capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6))
    with pytest.raises(UsageError, match="no tensor that both programs have"):
        stages(flat, flat)
    with pytest.raises(UsageError, match="need a teacher"):
        Trainer(program=program(), recipe=Recipe(epochs=1, features=1.0), data=data()).fit()
    with pytest.raises(UsageError, match="features from 0 on"):
        Recipe(epochs=1, features=-1.0).check()
