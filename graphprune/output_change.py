"""How far a program's outputs are from what they were, on samples without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphprune.errors import DataError
from graphprune.exported import flat_outputs

__all__ = ["OutputChange"]


class OutputChange:
    """Outputs of a module on some samples, to compare others with."""

    def __init__(
        self, module: nn.Module, samples: Sequence[tuple[Tensor, ...]], device: str
    ) -> None:
        """Run `module` on batches, one tensor per input, on `device`.

        Raises:
            DataError: It returns no floating-point tensor, or of samples in one batch other shapes than in another.
        """
        self.device = device
        self.before = [(x, self._outputs(module, x)) for x in samples]
        if len(shapes := {y.shape[1:] for _, y in self.before}) > 1:
            raise DataError(
                f"expected outputs of one shape for all samples, found {len(shapes)} in {len(self.before)} batches; "
                "let the task's collate bring all samples to one length"
            )
        count = sum(len(y) for _, y in self.before)
        mean = sum(_finite(y).sum(0) for _, y in self.before) / count
        spread = sum(float((_finite(y) - mean).square().sum()) for _, y in self.before)
        self.variance = max(spread, 1e-30)

    def of(self, module: nn.Module) -> float:
        """Return the squared error of a module's outputs, relative to the variance over samples of what they were.

        What is infinite or no number on both sides is no error.
        """
        error = 0.0
        for x, before in self.before:
            after = self._outputs(module, x)
            is_same = (after == before) | (after.isnan() & before.isnan())
            error += float(torch.where(is_same, 0.0, after - before).square().sum())
        return error / self.variance

    def _outputs(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.inference_mode():
            # A copy: some models write into what they are given.
            copies = (x.to(self.device, copy=True) for x in inputs)
            leaves = flat_outputs(module.to(self.device)(*copies))
        count = len(inputs[0])
        floating = [t for t in leaves if t.is_floating_point() and t.shape[:1] == (count,)]
        parts = [t.flatten(1) if t.dim() > 1 else t[:, None] for t in floating]
        if not parts:
            raise DataError(
                "expected outputs with a floating-point value for each sample, found "
                f"{[(str(t.dtype), tuple(t.shape)) for t in leaves]}"
            )
        return torch.cat(parts, 1).cpu().double()


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)
