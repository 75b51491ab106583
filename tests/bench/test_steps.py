"""Steps of every kind are really taken, and the program stays as it was."""

from __future__ import annotations

import pytest
import torch

from graphprune.bench.steps import Setting, Steps, measure_steps
from tests.training.networks import program


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_steps_of_every_kind_are_timed(precision: torch.dtype | None) -> None:
    before = program()
    values = {name: t.clone() for name, t in before.named_tensors()}
    setting = Setting(batch_size=4, steps=2, precision=precision, is_compiled=False)
    found = measure_steps(before, setting).milliseconds
    assert list(found) == [
        *("dense", "dense, with gates", "cut", "cut, torch's batch norms", "teacher")
    ]
    assert min(found.values()) > 0
    assert all(torch.equal(t, values[name]) for name, t in before.named_tensors())


def test_ratios_are_to_the_dense_step() -> None:
    steps = Steps(milliseconds={"dense": 100.0, "dense, with gates": 104.0})
    assert steps.ratio("dense, with gates") == pytest.approx(1.04)
    assert "1.04 x dense" in str(steps).splitlines()[1]
