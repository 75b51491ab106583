"""The overhead of gates is measured on real steps, and leaves the program as it was."""

from __future__ import annotations

import pytest
import torch

from graphprune.bench.gates import Overhead, measure_overhead
from tests.training.networks import program


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_steps_of_both_sides_are_timed(precision: torch.dtype | None) -> None:
    before = program()
    values = {name: t.clone() for name, t in before.named_tensors()}
    found = measure_overhead(before, batch_size=4, steps=2, precision=precision)
    assert found.plain_ms > 0
    assert found.gated_ms > 0
    assert all(torch.equal(t, values[name]) for name, t in before.named_tensors())


def test_overhead_is_relative_to_the_plain_step() -> None:
    assert Overhead(plain_ms=100.0, gated_ms=104.0).fraction == pytest.approx(0.04)
