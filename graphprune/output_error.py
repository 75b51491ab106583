"""How far a program's outputs are from what they were, on samples without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphprune.exported import flat_outputs

__all__ = ["OutputError"]


class OutputError:
    """Outputs of a module on some samples, to compare others with."""

    def __init__(self, module: nn.Module, samples: Sequence[Tensor], device: str) -> None:
        """Run `module` on batches of its one input, on `device`."""
        self.device = device
        self.before = [(x, self._outputs(module, x)) for x in samples]
        dense = torch.cat([y for _, y in self.before])
        self.variance = max(float((dense - dense.mean(0)).square().sum()), 1e-30)

    def of(self, module: nn.Module) -> float:
        """Return the squared error of a module's outputs, relative to the variance over samples of what they were."""
        errors = (self._outputs(module, x) - y for x, y in self.before)
        return sum(float(error.square().sum()) for error in errors) / self.variance

    def _outputs(self, module: nn.Module, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            leaves = flat_outputs(module.to(self.device)(inputs.to(self.device)))
        parts = [t.flatten(1) for t in leaves if t.is_floating_point()]
        return torch.cat(parts, 1).cpu().double()
