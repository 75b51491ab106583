"""Training batches whose order and augmentation follow from (seed, epoch) alone.

Batch s of an epoch is a slice of that epoch's permutation. With several processes every one takes its share of each
batch, so that the number of processes changes neither what is in a batch nor how it is augmented. Random transforms
of a data set itself are seeded sample by sample. So a run can go on in the middle of an epoch as if it had never
been interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from graphprune.data import TensorImages, innermost
from graphprune.errors import DataError
from graphprune.training.randomness import seeded

__all__ = ["Augment", "Batches", "crop_flip", "shared_batch_size"]

Augment = Literal["auto", "none", "crop-flip"]

PADDING = 4
"""Pixels around an image from which a crop of the image's own size is taken."""

SMALL_IMAGE = 64
"""Images up to this size are augmented by ``auto``; larger ones only by their own data set."""


@dataclass(frozen=True)
class _Share:
    """What one process takes of one batch."""

    indices: tuple[int, ...]
    """Samples of this process."""
    first: int
    """Position of the first of them in the batch."""
    batch_size: int
    """Samples of the batch in all processes."""
    key: tuple[int, int, int]
    """Seed, epoch and step."""


class Batches:
    """The training set in batches."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int,
        collate: Callable[[list[Any]], Any],
        augment: Augment = "none",
        workers: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Take batches of `batch_size` samples over all processes; a last batch that is smaller is left out.

        Raises:
            DataError: The set is empty, the batch cannot be shared among the processes, or the samples are no images.
        """
        self.samples = len(cast("Sized", dataset))
        self.batch_size = shared_batch_size(self.samples, batch_size, processes)
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.processes = processes
        self.dataset = _Shares(dataset, collate, _augmentation(dataset, augment))

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.samples // self.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> DataLoader[Any]:
        """Return the batches of one epoch from batch `start` on."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self.samples, generator=generator).tolist()
        share = self.batch_size // self.processes
        shares = []
        for step in range(start, len(self)):
            first = self.rank * share
            begin = step * self.batch_size + first
            shares.append(
                _Share(
                    indices=tuple(order[begin : begin + share]),
                    first=first,
                    batch_size=self.batch_size,
                    key=(self.seed, epoch, step),
                )
            )
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=cast("Any", shares),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a seed for its workers; it must not come from the generator that dropout uses.
            generator=torch.Generator().manual_seed(_mix(self.seed, epoch)),
        )


def shared_batch_size(samples: int, batch_size: int, processes: int) -> int:
    """Return how many samples a batch has over all processes: `batch_size`, or less where there are fewer samples.

    Raises:
        DataError: There are no samples for every process, or the batch cannot be shared among them.
    """
    if batch_size < processes or batch_size % processes:
        raise DataError(
            f"expected a batch size that {processes} processes can share equally, found {batch_size}"
        )
    if samples < processes:
        raise DataError(
            f"expected at least {processes} training samples (one per process), found {samples}"
        )
    return min(batch_size, samples - samples % processes)


class _Shares(Dataset[Any]):
    """Whole batches of a data set, taken by their share."""

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        augmentation: Callable[[Any, torch.Generator, slice, int], Any] | None,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.augmentation = augmentation

    def __getitem__(self, share: _Share) -> Any:
        """Return one share of one batch."""
        batch = self._batch(share)
        if self.augmentation is None:
            return batch
        generator = torch.Generator().manual_seed(_mix(*share.key))
        mine = slice(share.first, share.first + len(share.indices))
        return self.augmentation(batch, generator, mine, share.batch_size)

    def _batch(self, share: _Share) -> Any:
        seed, epoch, _ = share.key
        if isinstance(innermost(self.dataset), TensorImages):
            return cast("Any", self.dataset).__getitems__(list(share.indices))
        with seeded() as reseed:
            whole = getattr(self.dataset, "__getitems__", None)
            if callable(whole):
                reseed(_mix(*share.key, share.first))
                return self.collate(whole(list(share.indices)))
            samples = []
            for index in share.indices:
                reseed(_mix(seed, epoch, index))
                samples.append(self.dataset[index])
        return self.collate(samples)


def crop_flip(
    images: Tensor,
    generator: torch.Generator,
    *,
    fill: Tensor | None = None,
    rows: slice = slice(None),
    batch_size: int | None = None,
) -> Tensor:
    """Return every image padded by four pixels, cropped to its size at random, and mirrored half of the time.

    Args:
        images: A batch of images.
        generator: Where the random numbers come from.
        fill: What the padding holds, per channel; None: zeros.
        rows: Which images of a larger batch these are; the numbers are drawn for the whole of it.
        batch_size: Images in that batch.

    Shapes:
        images: [batch, channels, height, width]
        fill: [channels, 1, 1]
    """
    count = len(images) if batch_size is None else batch_size
    height, width = images.shape[-2:]
    corner = torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator)[:, rows]
    is_mirrored = torch.randint(0, 2, (count,), generator=generator)[rows].bool()
    if fill is not None:
        images = images - fill
    padded = F.pad(images, (PADDING,) * 4)
    ys = corner[0][:, None] + torch.arange(height)
    xs = corner[1][:, None] + torch.arange(width)
    xs = torch.where(is_mirrored[:, None], xs.flip(1), xs)
    samples = torch.arange(len(images))[:, None, None]
    out = padded[samples, :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
    return out if fill is None else out + fill


def _augmentation(
    dataset: Dataset[Any], augment: Augment
) -> Callable[[Any, torch.Generator, slice, int], Any] | None:
    images = innermost(dataset)
    if augment == "auto":
        is_small = (
            isinstance(images, TensorImages)
            and images.images.shape[1] == 3
            and max(images[0][0].shape[-2:]) <= SMALL_IMAGE
        )
        augment = "crop-flip" if is_small else "none"
    if augment == "none":
        return None
    return _CropFlip(images.offset if isinstance(images, TensorImages) else None)


class _CropFlip:
    """`crop_flip` of the first element of a batch; a class, so that workers can be sent one."""

    def __init__(self, black: Tensor | None) -> None:
        self.black = black

    def __call__(self, batch: Any, generator: torch.Generator, rows: slice, size: int) -> Any:
        images, *rest = batch
        if not isinstance(images, Tensor) or images.dim() != 4:
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise DataError(
                f"augment=crop-flip expected batches of images [batch, channels, height, width], found {found}; "
                "use augment=none"
            )
        out = crop_flip(images, generator, fill=self.black, rows=rows, batch_size=size)
        return (out, *rest)


def _mix(*numbers: int) -> int:
    """Return a seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1)[0])
