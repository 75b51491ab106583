"""Table 1 of the L-OBS paper on our own dense networks: prune without labels, count what is kept, retrain a little.

    train a dense network on the training set less 5,000 held-out images
      --> prune to the given shares by each method --> error on the test set
      --> retrain with the zeros held for at most so many iterations --> error of the last iteration

The iterative form does both in several stages, the iterations shared out among them; for LeNet-300-100 and CIFAR-Net
also with many more of them. What is kept is counted, weights without biases. Shares per layer, damping and learning
rates were chosen on the held-out images, but for that of CIFAR-Net over 510 iterations, which has not been chosen yet.

Source: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", table 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.capture import capture
from graphprune.data import DataSource, Split
from graphprune.files import write_atomic
from graphprune.program import Program
from graphprune.second_order.layers import layers
from graphprune.second_order.layerwise import Amount, Update, prune_layers
from graphprune.training.processes import Precision, resolve_precision

__all__ = [
    "RECIPES",
    "Images",
    "Method",
    "Recipe",
    "Row",
    "Run",
    "dense_network",
    "run",
    "to_markdown",
]

Method = Literal["random", "magnitude", "obd", "static", "refit", "exact"]
"""How weights are chosen; the last three are the ways of `graphprune.second_order.layerwise`."""

HELD_OUT = 5000
"""Training images that no network sees: choices are made on them."""

ITERATIONS = 510
"""Retraining, all stages together."""

NUDGED = 0.6
"""Share of the images that are moved where images are nudged."""

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""A batch of images, and what is random about it -> the images that are trained on."""

SAMPLES = 1000
"""Unlabelled training images that second-order methods look at."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the table."""

    method: Method
    stages: tuple[Mapping[str, float], ...]
    """Share of each layer's weights that is kept, stage by stage."""
    iterations: tuple[int, ...]
    """Retraining after each stage."""
    lr: float
    """Learning rate at the start of each retraining; it falls to zero as a cosine does."""
    damping: float = 0.01
    inputs: Literal["dense", "pruned"] = "dense"
    batch: int = 256
    weight_decay: float | None = None
    """In retraining; None: half of what the dense network was trained with."""
    augment: Augmentation | None = None
    """In retraining; None: as the dense network was trained."""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One network, its dense training, and what is done to it."""

    name: str
    build: Callable[[], nn.Module]
    data: str
    """``mnist`` or ``cifar10``."""
    epochs: int
    lr: float
    weight_decay: float
    augment: Augmentation | None
    """How training images are varied."""
    runs: tuple[Run, ...]
    precision: Precision = "float32"
    """What training computes in; errors are measured in float32."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came out of one run; errors are fractions."""

    network: str
    method: str
    dense_error: float
    weights: int
    kept: int
    pruned_error: float
    """After the last stage of pruning, before its retraining."""
    error: float
    """After the last iteration."""
    iterations: int
    seconds: float = field(compare=False)
    """Of pruning alone."""


class Images:
    """A data set as tensors: training images less those held out, held-out images, test images."""

    def __init__(
        self, source: DataSource, *, device: str = "cpu", limit: int | None = None
    ) -> None:
        """Read all of `source`, or `limit` images of each split."""
        images, labels = self._read(source, "train", limit)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held = min(HELD_OUT, len(order) // 10)
        self.train = images[order[held:]].to(device), labels[order[held:]].to(device)
        self.held_out = images[order[:held]].to(device), labels[order[:held]].to(device)
        test = self._read(source, "test", limit)
        self.test = test[0].to(device), test[1].to(device)

    @staticmethod
    def _read(source: DataSource, split: Split, limit: int | None) -> tuple[Tensor, Tensor]:
        loader = (
            source.train(1000, shuffle=False, limit=limit)
            if split == "train"
            else source.test(1000, limit=limit)
        )
        parts = list(loader)
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random training batches without end, epoch by epoch."""
        images, labels = self.train
        while True:
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for chosen in order.split(size)[: max(1, len(order) // size)]:
                yield images[chosen], labels[chosen]


# -- networks ---------------------------------------------------------------------------------------------------


class LeNet300(nn.Module):
    """LeNet-300-100: 266,200 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images of 28x28."""
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 430,500 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images of 28x28."""
        x = self.pool(self.conv2(self.pool(self.conv1(x)))).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(x)))
        return logits


class CifarNet(nn.Module):
    """Three convolutions and two linear layers, after cuda-convnet: 145,376 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(1024, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images of 32x32."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(self.pool(conv(x)))  # in this order ReLU has a quarter of the values
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


# -- training ---------------------------------------------------------------------------------------------------


def train(
    module: nn.Module,
    images: Images,
    *,
    iterations: int,
    lr: float,
    batch: int,
    weight_decay: float,
    augment: Augmentation | None,
    seed: int,
    precision: Precision = "float32",
) -> None:
    """Train in place by SGD with momentum; what is zero at the start in a matrix stays zero.

    The learning rate falls from `lr` to zero as a cosine does.
    """
    device = images.train[0].device
    is_mixed = resolve_precision(precision, str(device)) == "bfloat16"
    layout = torch.channels_last if is_mixed else torch.contiguous_format
    module.to(memory_format=layout)
    masks = [(p, p.detach() != 0) for p in module.parameters() if p.dim() > 1]
    optimizer = torch.optim.SGD(
        module.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations))
    generator = torch.Generator().manual_seed(seed)
    batches = images.batches(batch, generator)
    for _ in range(iterations):
        x, y = next(batches)
        if augment is not None:
            x = augment(x, generator)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            loss = F.cross_entropy(module(x.contiguous(memory_format=layout)), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)
    module.to(memory_format=torch.contiguous_format)


def mirrored_and_moved(x: Tensor, generator: torch.Generator, *, reach: int = 4) -> Tensor:
    """Mirror half of the images and move all by up to `reach` pixels."""
    mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    steps = torch.randint(-reach, reach + 1, (2, len(x)), generator=generator)
    return _moved(x, steps, reach=reach, fill=0.0)


def nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move most of the images by up to a pixel."""
    chosen = torch.rand(len(x), generator=generator) < NUDGED
    steps = torch.randint(-1, 2, (2, len(x)), generator=generator) * chosen
    return _moved(x, steps, reach=1, fill=float(x.min()))


def _moved(x: Tensor, steps: Tensor, *, reach: int, fill: float) -> Tensor:
    """Move image i by ``steps[:, i]`` pixels, down and across; what comes in is `fill`."""
    height, width = x.shape[2:]
    padded = F.pad(x, (reach,) * 4, value=fill)
    down, across = (reach + steps).to(x.device)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = across[:, None] + torch.arange(width, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    moved: Tensor = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


@torch.no_grad()
def error_of(module: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Return the share of wrong answers."""
    wrong = 0
    for x, y in zip(images[0].split(1000), images[1].split(1000), strict=True):
        wrong += int((module(x).argmax(1) != y).sum())
    return wrong / len(images[1])


def dense_network(
    recipe: Recipe,
    images: Images,
    *,
    seed: int = 0,
    epochs: int | None = None,
    kept: Path | None = None,
) -> Program:
    """Train a network from scratch, or read what was trained and written to `kept` before."""
    torch.manual_seed(seed)
    program = capture(recipe.build().to(images.train[0].device), images.test[0][:2])
    if kept is not None and kept.exists():
        program.module.load_state_dict(load_file(kept))
        return program
    epochs = recipe.epochs if epochs is None else epochs
    train(
        program.module,
        images,
        iterations=epochs * max(1, len(images.train[0]) // 128),
        lr=recipe.lr,
        batch=128,
        weight_decay=recipe.weight_decay,
        augment=recipe.augment,
        seed=seed,
        precision=recipe.precision,
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with write_atomic(kept) as temporary:
            save_file(dict(program.module.state_dict()), temporary)
    return program


# -- pruning ----------------------------------------------------------------------------------------------------


def prune(
    program: Program, images: Images, shares: Mapping[str, float], run: Run, *, seed: int
) -> Program:
    """Return a clone that keeps the given share of each layer's weights."""
    tensors = dict(program.module.named_parameters())
    counts = {f"{n}.weight": round(s * tensors[f"{n}.weight"].numel()) for n, s in shares.items()}
    samples = images.train[0][:SAMPLES]
    if run.method in get_args(Update):
        update: Any = run.method
        amounts = {name: Amount(keep=count) for name, count in counts.items()}
        device = str(samples.device)
        pruned, _ = prune_layers(
            program,
            lambda: samples.split(200),
            amounts,
            update=update,
            inputs=run.inputs,
            damping=run.damping,
            device=device,
        )
        return pruned
    clone = program.clone()
    curvature = _fisher(program, images) if run.method == "obd" else {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, count in counts.items():
            weight = dict(clone.module.named_parameters())[name]
            if run.method == "random":
                scores = torch.rand(weight.shape, generator=generator).to(weight.device)
            elif run.method == "obd":
                scores = weight.square() * curvature[name]
            else:
                scores = weight.abs()
            scores = torch.where(weight == 0, -1.0, scores)  # what is out stays out
            going = scores.flatten().argsort(stable=True)[: weight.numel() - count]
            weight.view(-1)[going] = 0
    return clone


def _fisher(program: Program, images: Images) -> dict[str, Tensor]:
    """Return the mean square of each weight's gradient over single samples: the diagonal that OBD looks at.

    Source: LeCun, Denker and Solla 1990, "Optimal Brain Damage", with the empirical Fisher information for the Hessian.
    """
    module = program.module
    x, y = (t[:SAMPLES] for t in images.train)
    sums = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for one, label in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(module(one), label)
        grads = torch.autograd.grad(loss, list(module.parameters()))
        for (name, _), grad in zip(module.named_parameters(), grads, strict=True):
            sums[name] += grad.square()
    return {name: total / len(x) for name, total in sums.items()}


def run(
    recipe: Recipe,
    dense: Program,
    images: Images,
    one: Run,
    *,
    seed: int = 0,
    held_out: bool = False,
) -> Row:
    """Prune and retrain; errors are those of the test set, or of the held-out images to choose by."""
    wanted = images.held_out if held_out else images.test
    program, seconds, pruned_error = dense.clone(), 0.0, math.nan
    for shares, iterations in zip(one.stages, one.iterations, strict=True):
        started = time.perf_counter()
        program = prune(program, images, shares, one, seed=seed)
        seconds += time.perf_counter() - started
        pruned_error = error_of(program.module, wanted)
        train(
            program.module,
            images,
            iterations=iterations,
            lr=one.lr,
            batch=one.batch,
            weight_decay=recipe.weight_decay / 2 if one.weight_decay is None else one.weight_decay,
            augment=one.augment or recipe.augment,
            seed=seed,
            precision=recipe.precision,
        )
    tensors = dict(program.module.named_parameters())
    names = [layer.weight for layer in layers(program)]
    return Row(
        network=recipe.name,
        method=one.label or one.method,
        dense_error=error_of(dense.module, wanted),
        weights=sum(tensors[name].numel() for name in names),
        kept=sum(int(tensors[name].count_nonzero()) for name in names),
        pruned_error=pruned_error,
        error=error_of(program.module, wanted),
        iterations=sum(one.iterations),
        seconds=seconds,
    )


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    lines = [
        "| Network | Method | Dense error, % | Weights kept | of | Share, % | Error after pruning, % | "
        "Error after retraining, % | Iterations | Pruning, s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.network} | {r.method} | {100 * r.dense_error:.2f} | {r.kept:,} | {r.weights:,} | "
        f"{100 * r.kept / r.weights:.2f} | {100 * r.pruned_error:.2f} | {100 * r.error:.2f} | "
        f"{r.iterations} | {r.seconds:.1f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _runs(
    shares: Mapping[str, float],
    stages: Sequence[Mapping[str, float]],
    iterations: tuple[int, ...],
    *,
    lr: float,
    iterative_lr: float = 0.0,
    batch: int,
) -> tuple[Run, ...]:
    """Return one-shot runs of all methods at equal shares, and the iterative form where there are stages."""
    labels: dict[Method, str] = {
        "random": "random",
        "magnitude": "magnitude",
        "obd": "OBD",
        "static": "L-OBS, static",
        "refit": "L-OBS, refit",
        "exact": "L-OBS, exact",
    }
    runs = [
        Run(
            method=method,
            label=label,
            stages=(shares,),
            iterations=(ITERATIONS,),
            lr=lr,
            batch=batch,
            inputs="dense" if method == "static" else "pruned",
        )
        for method, label in labels.items()
    ]
    if stages:
        runs.append(
            Run(
                method="exact",
                label="L-OBS, iterative",
                stages=tuple(stages),
                iterations=iterations,
                lr=iterative_lr or lr,
                batch=batch,
                inputs="pruned",
            )
        )
    return tuple(runs)


_LENET300 = {"fc1": 0.06, "fc2": 0.13, "fc3": 0.6}
_LENET300_DOWN = (
    {"fc1": 0.0601, "fc2": 0.1301, "fc3": 0.6003},
    {"fc1": 0.0394, "fc2": 0.0964, "fc3": 0.5086},
    {"fc1": 0.0258, "fc2": 0.0711, "fc3": 0.429},
    {"fc1": 0.0168, "fc2": 0.0522, "fc3": 0.36},
    {"fc1": 0.0108, "fc2": 0.0381, "fc3": 0.3005},
)
_LENET5 = {"conv1": 0.6, "conv2": 0.25, "fc1": 0.055, "fc2": 0.3}
_CIFARNET = {"conv1": 0.45, "conv2": 0.127, "conv3": 0.093, "fc1": 0.055, "fc2": 0.6}

_LENET300_LONGER = Run(
    method="exact",
    label="L-OBS, iterative, longer, images nudged",
    stages=_LENET300_DOWN,
    iterations=(1000, 1000, 1000, 1000, 10_000),
    lr=0.1,
    batch=128,
    weight_decay=1e-4,
    augment=nudged,
    inputs="pruned",
)

_CIFARNET_LONGER = Run(
    method="exact",
    label="L-OBS, iterative, longer, images moved less",
    stages=tuple(
        {name: share**power for name, share in _CIFARNET.items()}
        for power in (0.5, 0.75, 0.9, 0.97, 1.0)
    ),
    iterations=(2000, 3000, 5000, 15_000, 60_000),
    lr=0.05,
    batch=128,
    augment=partial(mirrored_and_moved, reach=1),
    inputs="pruned",
)

RECIPES: dict[str, Recipe] = {
    "lenet-300-100": Recipe(
        name="LeNet-300-100",
        build=LeNet300,
        data="mnist",
        epochs=20,
        lr=0.1,
        weight_decay=1e-3,
        augment=None,
        runs=(
            *_runs(
                _LENET300,
                (
                    {"fc1": 0.0504, "fc2": 0.177, "fc3": 0.6},
                    {"fc1": 0.0252, "fc2": 0.0887, "fc3": 0.45},
                    {"fc1": 0.0169, "fc2": 0.0595, "fc3": 0.37},
                    {"fc1": 0.0135, "fc2": 0.0476, "fc3": 0.33},
                    {"fc1": 0.0108, "fc2": 0.038, "fc3": 0.3},
                ),
                (60, 60, 60, 60, 270),
                lr=0.1,
                iterative_lr=0.6,
                batch=1024,
            ),
            _LENET300_LONGER,
        ),
    ),
    "lenet-5": Recipe(
        name="LeNet-5",
        build=LeNet5,
        data="mnist",
        epochs=12,
        lr=0.05,
        weight_decay=5e-4,
        augment=None,
        runs=_runs(
            _LENET5,
            (
                _LENET5,
                {"conv1": 0.5, "conv2": 0.152, "fc1": 0.0214, "fc2": 0.3},
                {"conv1": 0.35, "conv2": 0.084, "fc1": 0.011, "fc2": 0.16},
                {"conv1": 0.29, "conv2": 0.058, "fc1": 0.0073, "fc2": 0.107},
                {"conv1": 0.25, "conv2": 0.045, "fc1": 0.0055, "fc2": 0.08},
            ),
            (40, 40, 50, 60, 320),
            lr=0.1,
            batch=512,
        ),
    ),
    "cifarnet": Recipe(
        name="CIFAR-Net",
        build=CifarNet,
        data="cifar10",
        epochs=60,
        lr=0.05,
        weight_decay=1e-4,
        augment=mirrored_and_moved,
        precision="auto",
        runs=(*_runs(_CIFARNET, (), (), lr=0.05, batch=256), _CIFARNET_LONGER),
    ),
}
"""Networks by the name that the tool takes."""
