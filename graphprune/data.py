"""Data sets by name, as loaders of normalised batches, and top-1 accuracy.

    cifar10:DIR   mnist:DIR   fashion-mnist:DIR   imagefolder:DIR   digits   package.module:function

Options follow after commas: ``normalize=imagenet|cifar10|mnist|none|0.5|m1/m2/m3:s1/s2/s3``, ``size=N``, and for every
source ``holdout=0.1``, which tests on that fraction of the training set. Nothing is ever downloaded. The small sets are
held as one uint8 tensor and normalised batch by batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from graphprune._data_spec import DataOptions, Statistics, split_spec
from graphprune._predictor import Predictor
from graphprune.errors import DataError
from graphprune.named import find_callable, is_name
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress
from graphprune.runtime import Session

__all__ = ["DataSource", "TensorImages", "evaluate", "innermost", "load_data"]

Split = Literal["train", "test"]
_KINDS = (
    "cifar10:DIR",
    "mnist:DIR",
    "fashion-mnist:DIR",
    "imagefolder:DIR",
    "digits",
    "package.module:function",
)
_LAYOUTS = {
    "cifar10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
    "mnist": "MNIST/raw/ with the four unpacked *-ubyte files",
    "fashion-mnist": "FashionMNIST/raw/ with the four unpacked *-ubyte files",
    "imagefolder": "one folder per class with images in it, or train/ and val/ (or test/) of that kind",
}


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A training and a test set, and what a model must take and give to fit them."""

    name: str
    """What the user called it."""
    input_shape: tuple[int, ...]
    """Shape of one sample; empty where only a task can read samples."""
    num_classes: int
    """Number of labels; 0 where targets are no integers."""
    split: Callable[[Split], Dataset[Any]]
    """Returns the data set of one split; the training set is read when it is first asked for."""

    def train(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        limit: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> DataLoader[Any]:
        """Return batches of the training set; the same seed gives the same samples in the same order.

        Args:
            batch_size: Samples in a batch; the last batch may be smaller.
            shuffle: Whether each epoch has an order of its own.
            seed: Seed of the order, and of the choice of samples where there is a limit.
            limit: How many samples to take, drawn at random; None takes all.
            collate: Samples -> batch, where the data set gives no whole batches; None stacks them.
        """
        dataset = self.split("train")
        generator = torch.Generator().manual_seed(seed)
        if limit is not None and limit < _length(dataset):
            chosen = torch.randperm(_length(dataset), generator=generator)[:limit]
            dataset = Subset(dataset, sorted(chosen.tolist()))
        return _loader(dataset, batch_size, shuffle=shuffle, generator=generator, collate=collate)

    def test(
        self,
        batch_size: int,
        *,
        limit: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> DataLoader[Any]:
        """Return batches of the test set in a fixed order; a limit takes samples evenly spaced over the whole set."""
        dataset = self.split("test")
        total = _length(dataset)
        if limit is not None and limit < total:
            dataset = Subset(dataset, [index * total // limit for index in range(limit)])
        return _loader(dataset, batch_size, shuffle=False, generator=None, collate=collate)

    def hold_out(self, fraction: float) -> DataSource:
        """Return a source that tests on a fraction of this one's training set, and trains on the rest.

        For choices: what is chosen by looking at the test set is measured too well there. The samples are drawn once
        and for all, whatever the seed of a run.

        Raises:
            DataError: The fraction leaves one of the two parts empty.
        """
        total = _length(self.split("train"))
        count = round(fraction * total)
        if not 0 < count < total:
            raise DataError(
                f"expected holdout= to be a fraction that leaves samples in both parts of {total}, found {fraction}"
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
        parts = {"train": sorted(order[count:]), "test": sorted(order[:count])}
        return replace(self, split=lambda name: Subset(self.split("train"), parts[name]))


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Images held as one uint8 tensor; batches are scaled, resized and normalised when they are taken."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        white: float,
        statistics: Statistics,
        size: int | None,
    ) -> None:
        """Hold `images` (N, C, H, W); `white` is the value that becomes 1.0."""
        self.images = images
        self.labels = labels
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
        self.factor = 1.0 / (white * std)
        self.offset = -mean / std
        self.size = size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one normalised image and its label."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch; DataLoader asks for it this way, and takes it as it is."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen].to(torch.float32)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(
                images,
                size=(self.size, self.size),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
        return images * self.factor + self.offset, self.labels[chosen]


def load_data(spec: str, *, is_classification: bool = True) -> DataSource:
    """Return the data set that `spec` names.

    Each set is normalised by its own usual constants unless ``normalize=`` says otherwise; `digits` is left in 0..1.

    Args:
        spec: A name, with options after commas.
        is_classification: Whether samples of a function are (tensor, label); else a task reads them, whatever they are.

    Raises:
        DataError: The name or an option is unknown, or the folder does not hold what it should.
    """
    head, options = split_spec(spec)
    if (fraction := options.pop("holdout", None)) is not None:
        rest = ",".join([head, *(f"{name}={value}" for name, value in options.items())])
        try:
            whole = load_data(rest, is_classification=is_classification)
            held_out = whole.hold_out(float(fraction))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"data {spec!r}: expected holdout= to be a fraction, found {fraction!r}"
            ) from error
        return replace(held_out, name=spec)
    kind, _, where = head.partition(":")
    if head == "digits":
        return _digits(spec, DataOptions(spec, options, default="none"))
    if kind in ("cifar10", "mnist", "fashion-mnist", "imagefolder"):
        if not where:
            raise DataError(
                f"expected {kind}:DIR, found {spec!r}; the folder holds {_LAYOUTS[kind]}"
            )
        folder = Path(where).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"data {spec!r}: expected a folder with {_LAYOUTS[kind]}, found no folder at {str(folder)!r}"
            )
        if kind == "imagefolder":
            return _image_folder(spec, folder, DataOptions(spec, options, default="imagenet"))
        return _torchvision(spec, kind, folder, DataOptions(spec, options, default=kind))
    if is_name(head):
        if options:
            raise DataError(
                f"data {spec!r}: a function takes no options, found {', '.join(options)}"
            )
        return _from_function(spec, where.strip(), is_classification=is_classification)
    raise DataError(f"expected data as one of {', '.join(_KINDS)}, found {spec!r}")


@torch.no_grad()
def evaluate(
    model: nn.Module | Program | Session,
    loader: DataLoader[Any],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> float:
    """Return top-1 accuracy, as a fraction of the samples.

    The first tensor of the model's output counts as its logits. A model with a fixed batch gets every batch cut into,
    or filled up to, its own size.

    Args:
        model: A module, a program, or a file in ONNX Runtime.
        loader: Batches of (inputs, labels).
        device: Where a module or program computes; it comes back to where it was. A session keeps its own provider.
        progress: Where to show progress; None shows nothing.

    Raises:
        DataError: The samples do not fit the model's input, or its output is not one row of logits per sample.
    """
    total = correct = 0
    with (
        Predictor(model, device) as predict,
        (progress or SilentProgress()).task("evaluate", len(loader)) as task,
    ):
        for inputs, labels in loader:
            logits = predict(inputs)
            if logits.dim() != 2 or len(logits) != len(labels):
                raise DataError(
                    f"expected logits of shape ({len(labels)}, classes), found {tuple(logits.shape)}; "
                    "top-1 accuracy needs a classifier"
                )
            if labels.is_floating_point() or labels.dim() != 1:
                raise DataError(
                    "expected one integer label per sample, found targets "
                    f"{str(labels.dtype).removeprefix('torch.')}{list(labels.shape)}; top-1 accuracy needs a classifier"
                )
            if int(labels.max()) >= logits.shape[1]:
                raise DataError(
                    f"found label {int(labels.max())}, but the model tells {logits.shape[1]} classes apart"
                )
            correct += int((logits.argmax(1).cpu() == labels).sum())
            total += len(labels)
            task.advance()
    if not total:
        raise DataError("expected at least one test sample, found none")
    return correct / total


def _torchvision(spec: str, kind: str, folder: Path, options: DataOptions) -> DataSource:
    from torchvision import datasets

    builders: dict[str, Callable[..., Any]] = {
        "cifar10": datasets.CIFAR10,
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
    }
    channels = 3 if kind == "cifar10" else 1
    statistics, size = options.statistics(channels), options.size

    @functools.cache
    def split(name: Split) -> TensorImages:
        try:
            dataset = builders[kind](str(folder), train=name == "train", download=False)
        except (RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
            raise DataError(
                f"data {spec!r}: expected {_LAYOUTS[kind]} in {str(folder)!r}, found it missing, incomplete or damaged"
            ) from error
        raw = torch.as_tensor(dataset.data)
        images = raw.permute(0, 3, 1, 2).contiguous() if channels == 3 else raw.unsqueeze(1)
        labels = torch.as_tensor(dataset.targets)
        return TensorImages(images, labels, white=255.0, statistics=statistics, size=size)

    return _source(spec, split, num_classes=10)


def _digits(spec: str, options: DataOptions) -> DataSource:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "data 'digits' needs scikit-learn, which is not installed; install it with: "
            "pip install 'graphprune[demo]'"
        ) from error
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.uint8).unsqueeze(1)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=360, stratify=labels.numpy(), random_state=0
    )
    statistics, size = options.statistics(1), options.size

    def split(name: Split) -> TensorImages:
        chosen = torch.as_tensor(train if name == "train" else test)
        return TensorImages(
            images[chosen], labels[chosen], white=16.0, statistics=statistics, size=size
        )

    return _source(spec, functools.cache(split), num_classes=10)


def _image_folder(spec: str, folder: Path, options: DataOptions) -> DataSource:
    from torchvision import datasets, transforms

    mean, std = options.statistics(3)
    size = options.size or 224
    transform = transforms.Compose(
        [
            # The usual evaluation crop: the shorter side to 256/224 of the size, then the centre.
            transforms.Resize(round(size * 256 / 224)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    train, test = folder, folder
    if (folder / "train").is_dir():
        train = folder / "train"
        found = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
        if not found:
            raise DataError(
                f"data {spec!r}: expected val/ or test/ beside {str(train)!r}, found neither"
            )
        test = found[0]

    @functools.cache
    def read(where: Path) -> datasets.ImageFolder:
        try:
            return datasets.ImageFolder(str(where), transform=transform)
        except (FileNotFoundError, OSError) as error:
            raise DataError(
                f"data {spec!r}: expected {_LAYOUTS['imagefolder']} in {str(where)!r}: {error}"
            ) from error

    if read(train).classes != read(test).classes:
        raise DataError(
            f"data {spec!r}: {str(train)!r} holds {len(read(train).classes)} classes and {str(test)!r} "
            f"{len(read(test).classes)}, or under other names; expected the same class folders in both"
        )
    return _source(
        spec,
        lambda name: read(train if name == "train" else test),
        num_classes=len(read(test).classes),
    )


def _from_function(spec: str, name: str, *, is_classification: bool) -> DataSource:
    function = find_callable(
        "data",
        spec.strip(),
        error=DataError,
        advice=f"; expected one of {', '.join(_KINDS)}",
    )
    try:
        pair = function()
    # Whatever the user's own code raises is what the user needs to read.
    except Exception as error:
        raise DataError(
            f"data {spec!r}: {name}() failed: {type(error).__name__}: {error}"
        ) from error
    if not (
        isinstance(pair, tuple) and len(pair) == 2 and all(hasattr(d, "__getitem__") for d in pair)
    ):
        raise DataError(
            f"data {spec!r}: expected {name}() to return (train_dataset, test_dataset), found {type(pair)}"
        )
    train, test = pair

    return _source(
        spec,
        lambda name: train if name == "train" else test,
        num_classes=None,
        is_classification=is_classification,
    )


def _source(
    spec: str,
    split: Callable[[Split], Dataset[Any]],
    *,
    num_classes: int | None,
    is_classification: bool = True,
) -> DataSource:
    test = split("test")
    if not _length(test):
        raise DataError(f"data {spec!r}: the test set is empty")
    if not is_classification:
        return DataSource(name=spec, input_shape=(), num_classes=0, split=split)
    sample = test[0]
    if not (
        isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], Tensor)
    ):
        raise DataError(
            f"data {spec!r}: expected samples (tensor, label), found {type(sample).__name__}; "
            "a task= of your own (--task) may read others"
        )
    if num_classes is None:
        if named := getattr(test, "classes", None):
            num_classes = len(named)
        elif _label(sample[1]) < 0:  # then the others are not looked for
            num_classes = 0
        else:
            num_classes = 1 + max(_label(test[i][1]) for i in range(_length(test)))
    return DataSource(
        name=spec, input_shape=tuple(sample[0].shape), num_classes=num_classes, split=split
    )


def _loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1, found {batch_size}")
    if isinstance(innermost(dataset), TensorImages):
        collate = _as_is
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)


def innermost(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return the data set that a chain of subsets draws from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _as_is(batch: Any) -> Any:
    return batch


def _label(target: Any) -> int:
    """Return an integer label, or -1 for a target of another kind."""
    value = target.item() if isinstance(target, Tensor) and target.dim() == 0 else target
    return int(value) if isinstance(value, (int, np.integer)) else -1


def _length(dataset: Dataset[Any]) -> int:
    return len(cast("Sized", dataset))
