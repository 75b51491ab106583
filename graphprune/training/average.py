"""A moving average of weights, which often generalises better than the last weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphprune.program import Slices
from graphprune.training.state_surgery import slice_tensors

__all__ = ["WeightAverage"]

WARM_UP = 10
"""Step t averages with min(decay, (1 + t) / (WARM_UP + t)), so that the first weights are soon forgotten."""


class WeightAverage:
    """average <- decay * average + (1 - decay) * value, for floating tensors; others are copied.

    Source: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; the warm-up of the
    decay is that of tf.train.ExponentialMovingAverage.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        """Start from the values that `tensors` have now."""
        self.tensors = dict(tensors)
        self.decay = decay
        self.steps = 0
        self.values = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.floating = [n for n, t in self.tensors.items() if t.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present values."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (WARM_UP + self.steps))
        averages = [self.values[n] for n in self.floating]
        torch._foreach_lerp_(
            averages, [self.tensors[n].detach() for n in self.floating], 1.0 - decay
        )
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                self.values[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the tensors; the present values come back when the context ends."""
        present = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.write()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    tensor.copy_(present[name])

    @torch.no_grad()
    def write(self) -> None:
        """Write the averages into the tensors for good."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self.values[name])

    def carried(self, tensors: Mapping[str, Tensor], slices: Slices) -> WeightAverage:
        """Return the average to go on with after a surgery that kept `slices`, and left `tensors`."""
        average = WeightAverage({n: tensors[n] for n in self.tensors if n in tensors}, self.decay)
        average.load_state({"values": slice_tensors(self.values, slices), "steps": self.steps})
        return average

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"values": self.values, "steps": self.steps}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        for name, value in self.values.items():
            value.copy_(state["values"][name])
        self.steps = state["steps"]
