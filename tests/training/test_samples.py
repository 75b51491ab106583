"""Samples that do not fit a program are told apart from errors of its own, wherever they are met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from graphprune.capture import capture
from graphprune.data import DataSource, Split
from graphprune.errors import DataError
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from graphprune.training import Recipe, Trainer
from graphprune.training.samples import must_be_labels, told_by_shape
from tests.training.networks import data, program


def train(program: Program, data: DataSource) -> None:
    Trainer(program=program, recipe=Recipe(epochs=1, precision="float32"), data=data).fit()


def score(program: Program, data: DataSource) -> None:
    Pipeline.parse("dependency-groups,taylor").run(program, data=data, device="cpu")


def reestimate(program: Program, data: DataSource) -> None:
    Pipeline.parse("reestimate-batch-norm").run(program, data=data, device="cpu")


@pytest.mark.parametrize(("split", "label"), [("train", 10), ("test", 12), ("train", -1)])
def test_a_label_of_no_class(split: Split, label: int) -> None:
    good = data()
    x, y = next(iter(good.train(96) if split == "train" else good.test(40)))
    bad = TensorDataset(x, torch.cat([y[:-1], torch.tensor([label])]))
    source = replace(good, split=lambda name: bad if name == split else good.split(name))
    message = (
        f"expected labels from 0 to 9, because the model tells 10 classes apart, found {label} "
        f"in the {split}"
    )
    for work in (train, score) if split == "train" else (train,):
        with pytest.raises(DataError, match=message):
            work(program(), source)


def test_what_is_no_label_of_a_class() -> None:
    must_be_labels(torch.tensor([0, 2, -100]), 3, "training set")  # cross-entropy leaves -100 out
    must_be_labels(torch.tensor([7.0]), 3, "training set")  # the task says what it needs
    must_be_labels({"label": 7}, 3, "training set")


@pytest.mark.parametrize("work", [train, score, reestimate])
def test_samples_of_another_shape(work: Callable[[Program, DataSource], None]) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 10))
    colour = capture(layers.eval(), torch.randn(2, 3, 8, 8))
    message = r"takes samples of shape 3x8x8, the data gives 1x8x8, and on these it fails: .*; give"
    with pytest.raises(DataError, match=message):
        work(colour, data())


def test_an_error_of_the_program_itself_stays_what_it_is() -> None:
    dense = program()
    for error in (RuntimeError("not implemented"), torch.OutOfMemoryError("too much")):
        with pytest.raises(type(error), match=str(error)), told_by_shape(dense, dense.batch(4)):
            raise error
    with (
        pytest.raises(torch.OutOfMemoryError, match="too much"),
        told_by_shape(dense, (torch.zeros(2, 1, 9, 9),)),
    ):
        raise torch.OutOfMemoryError("too much")
