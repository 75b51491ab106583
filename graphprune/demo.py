"""The demonstration: train a small residual network on scikit-learn's digits, save it, compile it.

Takes under a minute on one CPU core. The digits are 1797 images of 8x8 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.compiler import CompileResult, compile
from graphprune.data import load_data
from graphprune.files import prepare_out, write_atomic
from graphprune.progress import Progress, SilentProgress

__all__ = ["Block", "DemoResult", "DigitsNet", "run_demo", "train_digits"]

EPOCHS = 6
BATCH_SIZE = 64
LEARNING_RATE = 0.01
WEIGHT_DECAY = 5e-4


class Block(nn.Module):
    """Two convolutions and a shortcut, which strides and widens where they do."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        """Build the block."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in, h, w] to [batch, out, h/stride, w/stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for 8x8 images: a stem, two stages of two blocks, a linear classifier."""

    def __init__(self, *, width: int = 24, num_classes: int = 10) -> None:
        """Build the network; the second stage is twice as wide as the first."""
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(Block(width, width), Block(width, width))
        self.stage2 = nn.Sequential(Block(width, 2 * width, stride=2), Block(2 * width, 2 * width))
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 1, 8, 8] to [batch, num_classes]."""
        y = functional.relu(self.bn(self.stem(x)))
        y = self.stage2(self.stage1(y))
        logits: Tensor = self.classifier(y.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demonstration made."""

    model_path: Path
    """The trained model, pickled."""
    result: CompileResult
    """What came out of the compiler."""


def run_demo(
    out: str | Path, *, device: str = "auto", seed: int = 0, progress: Progress | None = None
) -> DemoResult:
    """Train, save ``model.pt`` into `out`, and compile that file to half its MACs in multiples of 8 channels.

    Raises:
        DataError: scikit-learn is not installed.
        OutputError: `out` cannot be written.
    """
    folder = prepare_out(out)
    model = train_digits(seed=seed, progress=progress)
    path = folder / "model.pt"
    with write_atomic(path) as temporary:
        torch.save(model, temporary)
    result = compile(
        str(path),
        target="macs=0.5",
        round_to=8,  # what runtimes compute fastest
        data="digits",
        out=folder,
        device=device,
        seed=seed,
        trust=("graphprune.demo.Block", "graphprune.demo.DigitsNet"),
        progress=progress,
    )
    return DemoResult(model_path=path, result=result)


def train_digits(
    *, seed: int = 0, epochs: int = EPOCHS, progress: Progress | None = None
) -> DigitsNet:
    """Return a `DigitsNet` trained on the CPU, in evaluation mode."""
    data = load_data("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    loader = data.train(BATCH_SIZE, shuffle=True, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs * len(loader)
    )
    model.train()
    with (progress or SilentProgress()).task("training on digits", epochs) as task:
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
            task.advance()
    return model.eval()
