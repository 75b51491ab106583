"""Tasks that are no classification go through gates, surgery and fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from graphprune.capture import capture
from graphprune.data import DataSource
from graphprune.pipeline import Pipeline
from graphprune.training import Task
from tests.training.networks import images

HERE = "tests.passes.training.test_other_tasks"


def bright_places() -> DataSource:
    """Return images, and for each pixel whether its neighbourhood is bright."""

    def split(name: str) -> TensorDataset:
        pixels, _ = images(256, seed=0) if name == "train" else images(64, seed=1)
        bright = F.avg_pool2d(pixels, 3, stride=1, padding=1).squeeze(1) > 1.0
        return TensorDataset(pixels, bright.long())

    return DataSource(name="places", input_shape=(1, 8, 8), num_classes=2, split=split)


def segmentation() -> Task:
    """Return a task with logits for every pixel, which a dense program can teach."""

    def distance(outputs: Tensor, dense: Tensor) -> Tensor:
        return F.mse_loss(outputs, dense)

    return Task(
        loss=lambda outputs, target: F.cross_entropy(outputs.float(), target),
        metric=lambda outputs, target: (outputs.argmax(1) == target).double().mean(),
        metric_name="pixel_accuracy",
        distill=distance,
    )


def places() -> nn.Module:
    """Return a network that says of every pixel what it is."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        nn.Conv2d(12, 2, 1),
    )


@pytest.mark.parametrize("extra", ["", " mixup=0.3 average=0.9 clip=1.0 optimizer=adamw lr=0.01"])
def test_a_segmentation_is_trained_with_gates_cut_and_trained_on(extra: str) -> None:
    common = f'task="{HERE}:segmentation" batch_size=32'
    pipeline = Pipeline.parse(
        f'dependency-groups,trainable-gates{{target="macs=0.5" epochs=6 {common}}},'
        f"remove-channels,clean-up,fine-tune{{epochs=4 {common}{extra}}}"
    )
    program = capture(places().eval(), torch.zeros(1, 1, 8, 8))
    result = pipeline.run(program, data=bright_places(), device="cpu")
    assert result.checks["surgery"].passed
    assert result.measurements["trainable-gates.chosen_macs"] <= 0.5
    assert result.measurements["fine-tune.test_pixel_accuracy"] > 0.93
