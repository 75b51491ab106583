"""What the training tests train: tiny networks for digits, tasks, data sets; nothing takes more than seconds."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from graphprune.data import DataSource
from graphprune.program import Dialect, Program
from graphprune.training import Hook, Moment, Task
from graphprune.training.metrics import EVENTS

__all__ = [
    "Net",
    "Stop",
    "StopAfter",
    "children",
    "data",
    "files",
    "images",
    "norm_free",
    "program",
    "regression",
    "regression_data",
]


def children() -> Any:
    """Return a multiprocessing context whose processes start at once, with everything imported and nothing run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "graphprune.training", __name__])
    return context


def files(folder: Path) -> set[str]:
    """Return what is visible in a folder, but for the event files that come where TensorBoard is installed."""
    return {path.name for path in folder.glob("[!.]*")} - {EVENTS}


class Stop(Exception):
    """Interrupts a training."""


class StopAfter(Hook):
    """Interrupts it after so many steps; never if 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def after_step(self, moment: Moment) -> None:
        """Stop, where it is time."""
        if moment.steps == self.steps:
            raise Stop


class Net(nn.Module):
    """Two convolutions with batch norms, dropout, a linear layer; for images of one channel."""

    def __init__(self, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(10)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.fc(self.drop(torch.flatten(x, 1)))
        return logits


def program(dialect: Dialect = "fx", *, dropout: float = 0.1, seed: int = 0) -> Program:
    """Return `Net` captured in one of the two dialects."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(dropout=dropout).eval()
    example = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if (
        dialect == "fx"
    ):  # as capture makes it, without what capture imports: some tests start processes
        return Program(
            module=fx.symbolic_trace(net),
            example_inputs=(example,),
            dialect="fx",
            dynamic_batch=True,
            source="Net",
        )
    from graphprune.capture import capture

    batch = torch.export.Dim("batch")
    exported = torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
    return capture(exported, example, source="Net")


def norm_free(seed: int = 0) -> nn.Module:
    """Return a network without batch statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 10)
        )


def images(samples: int = 96, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images whose label is the brightest of ten places."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(samples, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, 1 + label // 5 * 3 : 4 + label // 5 * 3, label % 5 : label % 5 + 3] += 2.0
    return pixels, labels


def data(samples: int = 96) -> DataSource:
    """Return a small classification."""
    train, test = TensorDataset(*images(samples)), TensorDataset(*images(40, seed=1))
    return DataSource(
        name="bright",
        input_shape=(1, 8, 8),
        num_classes=10,
        split=lambda name: train if name == "train" else test,
    )


def regression_data() -> tuple[TensorDataset, TensorDataset]:
    """Return images and their mean brightness: what ``--data module:function`` names."""
    train, _ = images(128)
    test, _ = images(32, seed=1)
    return (
        TensorDataset(train, train.mean((1, 2, 3))[:, None]),
        TensorDataset(test, test.mean((1, 2, 3))[:, None]),
    )


def regression() -> Task:
    """Return a task that predicts one number: what ``--task module:factory`` names."""
    return Task(
        loss=lambda outputs, target: F.mse_loss(outputs, target),
        metric=lambda outputs, target: (outputs - target).abs().mean(),
        metric_name="error",
    )
