"""Batches: a function of (seed, epoch), shared among processes, augmented all at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from graphprune.data import TensorImages
from graphprune.errors import DataError
from graphprune.training.batches import PADDING, Batches, crop_flip


def _colours(samples: int = 10) -> TensorImages:
    images = torch.randint(0, 256, (samples, 3, 8, 8), dtype=torch.uint8)
    statistics = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    return TensorImages(
        images, torch.arange(samples), white=255.0, statistics=statistics, size=None
    )


def _batches(dataset: Dataset[Any], size: int = 4, **options: Any) -> Batches:
    return Batches(dataset, size, **{"seed": 0, "collate": default_collate, **options})


def _all(batches: Batches, epoch: int, start: int = 0) -> list[Any]:
    return list(batches.epoch(epoch, start=start))


class Noisy(Dataset[tuple[Tensor, int]]):
    """Varies its samples by every generator there is."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        return torch.tensor([float(noise)]), index


def test_order_follows_from_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): torch.cat([y for _, y in _all(_batches(_colours(), seed=seed), epoch)])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    again = torch.cat([y for _, y in _all(_batches(_colours()), 1)])
    assert torch.equal(again, orders[0, 1])
    assert len(_batches(_colours())) == 2  # the last two samples make no batch
    assert len(_batches(_colours(), 64)) == 1


@pytest.mark.parametrize("dataset", [_colours(), Noisy()], ids=["images", "noisy"])
def test_an_epoch_can_start_in_the_middle_and_be_shared(dataset: Dataset[Any]) -> None:
    whole = _all(_batches(dataset, augment="auto"), 3)
    random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rest = _all(_batches(dataset, augment="auto"), 3, start=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(whole[1][0], rest[0][0])
    shares = [_all(_batches(dataset, augment="auto", rank=r, processes=2), 3) for r in (0, 1)]
    for step, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([share[step][0] for share in shares]))
        assert torch.equal(y, torch.cat([share[step][1] for share in shares]))


def test_workers_give_the_same_batches() -> None:
    alone, helped = _batches(Noisy()), _batches(Noisy(), workers=1)
    for (a, _), (b, _) in zip(_all(alone, 2), _all(helped, 2), strict=True):
        assert torch.equal(a, b)


def test_crop_flip_against_one_image_at_a_time() -> None:
    images = torch.randn(50, 2, 6, 5)
    fill = torch.tensor([3.0, -2.0]).view(2, 1, 1)
    out = crop_flip(images, torch.Generator().manual_seed(0), fill=fill)
    draws = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 2 * PADDING + 1, (2, 50), generator=draws)
    mirrored = torch.randint(0, 2, (50,), generator=draws)
    for i in range(50):
        canvas = fill.expand(2, 6 + 2 * PADDING, 5 + 2 * PADDING).clone()
        canvas[:, PADDING:-PADDING, PADDING:-PADDING] = images[i]
        y, x = corners[:, i].tolist()
        expected = canvas[:, y : y + 6, x : x + 5]
        expected = expected.flip(2) if mirrored[i] else expected
        torch.testing.assert_close(out[i], expected)
    assert 10 < int(mirrored.sum()) < 40


def test_auto_augments_small_colour_images_only() -> None:
    colours = _colours()
    plain = _batches(colours)
    assert not torch.equal(_all(plain, 0)[0][0], _all(_batches(colours, augment="auto"), 0)[0][0])
    grey = TensorImages(
        colours.images[:, :1],
        colours.labels,
        white=255.0,
        statistics=((0.0,), (1.0,)),
        size=None,
    )
    for dataset in (grey, TensorDataset(torch.randn(10, 3, 8, 8), torch.arange(10))):
        found, expected = _all(_batches(dataset, augment="auto"), 0), _all(_batches(dataset), 0)
        assert torch.equal(found[0][0], expected[0][0])
        varied = _all(_batches(dataset, augment="crop-flip"), 0)
        assert not torch.equal(varied[0][0], expected[0][0])


def test_refusals() -> None:
    flat = TensorDataset(torch.randn(10, 3), torch.arange(10))
    with pytest.raises(
        DataError, match=r"expected batches of images .*, found \[4, 3\]; use augment"
    ):
        _all(_batches(flat, augment="crop-flip"), 0)
    with pytest.raises(DataError, match="a batch size that 2 processes can share equally, found 3"):
        _batches(flat, 3, processes=2)
    with pytest.raises(DataError, match="expected at least 1 training samples"):
        _batches(TensorDataset(torch.randn(0, 3)), 3)
