"""The repetition of the paper's table: shares, counts, masks in retraining, and the tool from end to end."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from graphprune.bench.l_obs import (
    ITERATIONS,
    RECIPES,
    Augmentation,
    Images,
    Recipe,
    Row,
    Run,
    dense_network,
    mirrored_and_moved,
    nudged,
    run,
    to_markdown,
    train,
)
from graphprune.data import DataSource

_TOOL = Path(__file__).parents[2] / "tools" / "bench_l_obs"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


def _images() -> Images:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 1, 4, 4, generator=generator)
    labels = torch.arange(400) % 4
    x = centres[labels] + 0.5 * torch.randn(400, 1, 4, 4, generator=generator)
    dataset = TensorDataset(x, labels)
    source = DataSource(name="t", input_shape=(1, 4, 4), num_classes=4, split=lambda _: dataset)
    return Images(source)


def _recipe(*runs: Run) -> Recipe:
    return Recipe(
        name="net",
        build=_Net,
        data="mnist",
        epochs=20,
        lr=0.05,
        weight_decay=1e-4,
        augment=None,
        runs=runs,
    )


def test_the_recipes_keep_the_papers_shares_within_its_iterations() -> None:
    wanted = {"lenet-300-100": (0.07, 0.015), "lenet-5": (0.07, 0.009), "cifarnet": (0.09,)}
    sizes = {"lenet-300-100": 266_200, "lenet-5": 430_500, "cifarnet": 145_376}
    for name, recipe in RECIPES.items():
        tensors = dict(recipe.build().named_parameters())
        weights = {n.split(".")[0]: p.numel() for n, p in tensors.items() if p.dim() > 1}
        assert sum(weights.values()) == sizes[name]
        for one in recipe.runs:
            last = one.stages[-1]
            share = sum(round(last[n] * size) for n, size in weights.items()) / sizes[name]
            limit = min(wanted[name]) if len(one.stages) > 1 else max(wanted[name])
            assert 0.97 * limit < share <= limit
            assert (sum(one.iterations) == ITERATIONS) != ("longer" in one.label)
            assert len(one.iterations) == len(one.stages)
            for before, after in zip(one.stages, one.stages[1:], strict=False):
                assert all(after[n] <= before[n] for n in after)


@pytest.mark.parametrize("method", ["random", "magnitude", "obd", "static", "refit", "exact"])
def test_every_method_keeps_what_it_is_told(method: str) -> None:
    images = _images()
    shares = ({"fc1": 0.5, "fc2": 0.5}, {"fc1": 0.25, "fc2": 0.5})
    one = Run(method=method, stages=shares, iterations=(5, 5), lr=0.05, batch=64)  # type: ignore[arg-type]
    recipe = _recipe(one)
    dense = dense_network(recipe, images)
    before = {n: t.clone() for n, t in dense.named_tensors()}
    row = run(recipe, dense, images, one)
    assert (row.weights, row.kept) == (16 * 12 + 12 * 4, 16 * 12 // 4 + 12 * 4 // 2)
    assert row.iterations == 10
    assert row.dense_error < 0.05
    assert 0 <= row.error < 0.3
    assert row == run(recipe, dense, images, one)
    assert all(torch.equal(before[n], t) for n, t in dense.named_tensors())


def test_held_out_images_are_in_no_other_part() -> None:
    images = _images()
    assert len(images.held_out[0]) == 40
    assert len(images.train[0]) == 360
    seen = {tuple(x.flatten().tolist()) for x in images.train[0]}
    assert not any(tuple(x.flatten().tolist()) in seen for x in images.held_out[0])


def test_training_holds_zeros() -> None:
    images, net = _images(), _Net()
    with torch.no_grad():
        net.fc1.weight[:, ::2] = 0
    old = net.fc1.weight.detach().clone()
    train(net, images, iterations=7, lr=0.1, batch=50, weight_decay=0.0, augment=nudged, seed=0)
    assert (net.fc1.weight[:, ::2] == 0).all()
    assert (net.fc1.weight[:, 1::2] != old[:, 1::2]).any()


@pytest.mark.parametrize(("augment", "reach"), [(nudged, 1), (mirrored_and_moved, 4)])
def test_images_are_moved_and_nothing_else(augment: Augmentation, reach: int) -> None:
    x = torch.zeros(64, 1, 12, 12)
    x[:, :, 6, 5] = 1.0
    moved = augment(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert (moved.sum((1, 2, 3)) == 1).all()
    row, column = moved.flatten(1).argmax(1) // 12, moved.flatten(1).argmax(1) % 12
    assert (row - 6).abs().max() == reach
    last = 6 if augment is mirrored_and_moved else 5  # where a mirror puts the pixel
    assert column.min() == 5 - reach
    assert column.max() == last + reach
    assert ((row == 6) & (column == 5)).any() or augment is mirrored_and_moved
    assert not torch.equal(moved, x)


def test_the_table() -> None:
    row = Row(
        network="N",
        method="m",
        dense_error=0.0176,
        weights=1000,
        kept=70,
        pruned_error=0.031,
        error=0.0182,
        iterations=510,
        seconds=1.25,
    )
    last = to_markdown([row, dataclasses.replace(row, weights=2000)]).splitlines()
    assert last[-2] == "| N | m | 1.76 | 70 | 1,000 | 7.00 | 3.10 | 1.82 | 510 | 1.2 |"
    assert len(last) == 4


def test_the_tool_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(_TOOL), "--quick", "--mnist", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "LeNet-5: left out, data 'mnist:" in done.stderr
    assert "CIFAR-Net: left out, --cifar10 DIR is not given" in done.stderr
    assert "error: no data for any of the networks" in done.stderr


@pytest.mark.slow
def test_the_tool_runs_from_end_to_end(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for prefix in ("train", "t10k"):
        pixels = torch.randint(0, 256, (700, 28, 28), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(700) % 10).to(torch.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, 700, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, 700))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    out = tmp_path / "table.md"
    command = [sys.executable, str(_TOOL), "--quick", "--mnist", str(tmp_path), "--out", str(out)]
    command += ["--networks", "lenet-300-100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_text().count("| LeNet-300-100 |") == len(RECIPES["lenet-300-100"].runs)
