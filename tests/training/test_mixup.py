"""Neighbours in a batch are blended, and so are their losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import DataError, UsageError
from graphprune.training import Recipe, Task, Trainer
from graphprune.training.mixup import Blend, must_keep_neighbours
from tests.training.networks import data, program


def test_neighbours_are_blended() -> None:
    x = torch.tensor([[0.0], [4.0], [10.0], [20.0], [7.0]])
    (mixed,) = Blend(0.75).inputs((x,))
    assert mixed.flatten().tolist() == [1.0, 3.0, 12.5, 17.5, 7.0]
    assert Blend(0.75).neighbours(torch.arange(5)).tolist() == [1, 0, 3, 2, 4]


def test_targets_may_be_structures() -> None:
    target = {"box": torch.arange(4.0).view(2, 2), "label": torch.tensor([3, 5]), "names": "ab"}
    found = Blend(0.5).neighbours(target)
    assert found["box"].tolist() == [[2.0, 3.0], [0.0, 1.0]]
    assert found["label"].tolist() == [5, 3]
    assert found["names"] == "ab"


@pytest.mark.parametrize(("batch_size", "processes"), [(12, 2), (8, 4), (7, 1)])
def test_processes_blend_what_one_would(batch_size: int, processes: int) -> None:
    must_keep_neighbours(batch_size, processes)
    x = torch.randn(batch_size, 3)
    (whole,) = Blend(0.6).inputs((x,))
    parts = [Blend(0.6).inputs((part,))[0] for part in x.chunk(processes)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("batch_size", "processes", "multiple"), [(6, 2, 4), (12, 4, 8)])
def test_neighbours_are_not_parted(batch_size: int, processes: int, multiple: int) -> None:
    with pytest.raises(
        UsageError, match=rf"found batches of {batch_size} .* multiple of {multiple}, or"
    ):
        must_keep_neighbours(batch_size, processes)


def test_the_layout_stays() -> None:
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    (mixed,) = Blend(0.6).inputs((x,))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_shares_follow_from_the_key() -> None:
    shares = [Blend.draw(1.0, 0, 0, step).share for step in range(2000)]
    assert shares == [Blend.draw(1.0, 0, 0, step).share for step in range(2000)]
    assert shares[0] != Blend.draw(1.0, 1, 0, 0).share
    assert min(shares) >= 0.5
    assert sum(shares) / len(shares) == pytest.approx(0.75, abs=0.01)  # Beta(1, 1) is uniform
    assert Blend.draw(0.01, 3, 4).share == pytest.approx(1.0, abs=0.01)


def test_the_loss_is_blended_alike() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(outputs: Any, target: Tensor) -> Tensor:
        seen.append((outputs.detach().clone(), target))
        return F.cross_entropy(outputs, target)

    def metric(outputs: Any, target: Tensor) -> Tensor:
        hits: Tensor = outputs.argmax(1) == target
        return hits.double().mean()

    task = Task(loss=loss, metric=metric)
    recipe = Recipe(epochs=1, batch_size=32, lr=1e-9, mixup=1.0, precision="float32")
    trained = program(dropout=0.0)
    outcome = Trainer(program=trained, recipe=recipe, data=data(), task=task, seed=5).fit()
    steps = 0
    total = 0.0
    for (out, own), (again, other) in zip(seen[0::2], seen[1::2], strict=False):
        if not torch.equal(out, again):
            break  # the evaluation has begun
        share = Blend.draw(1.0, 5, 0, steps).share
        assert torch.equal(Blend(share).neighbours(own), other)
        total += float(
            share * F.cross_entropy(out, own) + (1 - share) * F.cross_entropy(out, other)
        )
        steps += 1
    assert steps
    assert outcome.last["loss"] == pytest.approx(total / steps, rel=1e-4)


def test_a_blend_of_integers_is_refused() -> None:
    with pytest.raises(DataError, match=r"floating-point numbers, found torch.int64 in input 1"):
        Blend(0.5).inputs((torch.zeros(2), torch.arange(2)))


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(UsageError, match="expected mixup from 0 on, found -1"):
        Recipe(epochs=1, mixup=-1.0).check()
