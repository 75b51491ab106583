"""A teacher says what the dense program says, compiled or not."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import DataError, UsageError
from graphprune.training.compiled import MANY_STEPS, Compiled
from graphprune.training.distill import Teacher
from graphprune.training.recipe import Recipe
from graphprune.training.task import Task, classification
from tests.strategies import randomize


def teacher(*, steps: int = 0, mirror: bool = False) -> Teacher:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)
    )
    return Teacher(
        gp.capture(model.eval(), torch.randn(1, 3, 8, 8)),
        classification(),
        temperature=4.0,
        mirror=mirror,
        device=torch.device("cpu"),
        memory_format=torch.channels_last,
        steps=steps,
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiled_teacher_says_the_same() -> None:
    plain, fast = teacher(steps=0), teacher(steps=MANY_STEPS)
    assert not isinstance(plain.module, Compiled)
    assert isinstance(fast.module, Compiled)
    torch.manual_seed(1)
    images = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast.look((images,)), plain.look((images,)))
    assert fast.module.run is not fast.module.module


def test_a_mirror_image_counts_as_much_as_the_image() -> None:
    images = torch.randn(6, 3, 8, 8)
    plain, both = teacher(), teacher(mirror=True)
    one, other = plain.look((images,)), plain.look((images.flip(3),))
    assert not torch.allclose(one, other)
    torch.testing.assert_close(both.look((images,)), (one + other) / 2)
    torch.testing.assert_close(both.look((images.flip(3),)), both.look((images,)))


def test_mirror_images_of_what_is_no_image_are_refused() -> None:
    with pytest.raises(DataError, match=r"mirror=true expected images.*found \[6, 3, 8\]"):
        teacher(mirror=True).look((torch.randn(6, 3, 8),))
    with pytest.raises(UsageError, match="mirror=true is about what the teacher says"):
        Recipe(epochs=1, mirror=True).check()


def test_a_task_whose_outputs_have_sides_takes_no_mirror_images() -> None:
    model = nn.Conv2d(3, 2, 1)
    with pytest.raises(UsageError, match="the task is no classification; use mirror=false"):
        Teacher(
            gp.capture(model, torch.randn(1, 3, 8, 8)),
            Task(loss=F.l1_loss, metric=F.l1_loss, distill=F.mse_loss),
            temperature=4.0,
            mirror=True,
            device=torch.device("cpu"),
            memory_format=torch.channels_last,
        )


def test_norms_are_folded_into_convolutions() -> None:
    kinds = {type(child) for child in teacher(steps=0).module.modules()}
    assert nn.Conv2d in kinds
    assert nn.BatchNorm2d not in kinds


class Shared(nn.Module):
    """One convolution with a norm of its own behind every call, as heads over several scales have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm in self.norms:
            x = norm(self.conv(x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_convolution_that_is_called_twice_keeps_its_norms() -> None:
    model = Shared()
    randomize(model)
    images = torch.randn(4, 3, 8, 8)
    look = Teacher(
        gp.capture(model.eval(), images[:1]),
        classification(),
        temperature=4.0,
        device=torch.device("cpu"),
        memory_format=torch.channels_last,
    ).look((images,))
    torch.testing.assert_close(look, model(images))
