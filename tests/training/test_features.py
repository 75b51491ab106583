"""Distillation inside the network: which tensors are compared, and that training brings them near."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.capture import capture
from graphprune.errors import UsageError
from graphprune.pipeline import Pipeline
from graphprune.program import Dialect, Program
from graphprune.training import Recipe, Trainer
from graphprune.training.distill import Teacher
from graphprune.training.features import _shapes, attention_map, insert_taps, stages
from graphprune.training.task import classification
from tests import gate_networks
from tests.training.networks import data, program

CUT = 'dependency-groups,magnitude,choose-channels{target="macs=0.5"},remove-channels'


def cut_of(dense: Program) -> Program:
    return Pipeline.parse(CUT).run(dense, device="cpu").program


def apart(student: Program, dense: Program) -> float:
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
        return float(teacher.feature_distance(taps))


def test_a_map_has_length_one_and_no_channels() -> None:
    x = torch.randn(3, 5, 4, 4)
    found = attention_map(x, 1)
    assert found.shape == (3, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    wide = torch.cat([x, x], 1)
    torch.testing.assert_close(attention_map(wide, 1), found)
    torch.testing.assert_close(attention_map(x.permute(0, 2, 3, 1), 3), found)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_the_last_tensor_of_each_resolution_is_compared(dialect: Dialect) -> None:
    dense = program(dialect)
    found = stages(cut_of(dense), dense)
    assert len(found) == 2  # 8x8 and 4x4
    assert set(found.values()) == {1}
    assert all("relu" in name for name in found)


def test_tokens_have_their_channels_last() -> None:
    dense = capture(gate_networks.transformer().eval(), torch.randn(2, 1, 8, 8))
    found = stages(cut_of(dense), dense)
    shapes = {name: len(shape) for name, shape in _shapes(dense).items()}
    tokens = {name for name in found if shapes[name] == 3}
    assert tokens
    assert {found[name] for name in tokens} == {2}


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


def test_refusals() -> None:
    flat = capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6))
    with pytest.raises(UsageError, match="no tensor that both programs have"):
        stages(flat, flat)
    with pytest.raises(UsageError, match="need a teacher"):
        Trainer(program=program(), recipe=Recipe(epochs=1, features=1.0), data=data()).fit()
    with pytest.raises(UsageError, match="features from 0 on"):
        Recipe(epochs=1, features=-1.0).check()
