"""The error of outputs: relative to their variance, blind to what is infinite on both sides, and without traces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import DataError
from graphprune.output_change import OutputChange


class _Masked(nn.Module):
    """Writes into its input, and returns logits of which one is masked, a scalar, and a class."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu_(x) + self.shift
        logits = y.masked_fill(torch.tensor([False, False, True]), -torch.inf)
        return logits, y.mean(), logits.argmax(1)


def test_it_is_the_squared_error_over_the_variance() -> None:
    samples = [(torch.randn(8, 3),), (torch.randn(5, 3),)]
    before = [x.clone() for (x,) in samples]
    error = OutputChange(_Masked(), samples, "cpu")
    seen = torch.cat(before).relu()[:, :2]
    spread = (seen - seen.mean(0)).square().sum()
    assert error.of(_Masked()) == 0.0
    assert error.of(_Masked(0.5)) == pytest.approx(float(2 * 13 * 0.25 / spread), rel=1e-5)
    assert all(torch.equal(a, b) for (a,), b in zip(samples, before, strict=True))


def test_outputs_without_a_value_for_each_sample_are_refused() -> None:
    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(DataError, match=r"a floating-point value for each sample, found .*int64"):
        OutputChange(Classes(), [(torch.randn(4, 3),)], "cpu")


def test_samples_of_two_inputs_and_outputs_of_several_lengths() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    pairs = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(2)]
    assert OutputChange(Sum(), pairs, "cpu").of(Sum()) == 0.0
    other = (torch.randn(4, 5), torch.randn(4, 5))
    with pytest.raises(DataError, match="outputs of one shape for all samples, found 2 in 3 batch"):
        OutputChange(Sum(), [*pairs, other], "cpu")
