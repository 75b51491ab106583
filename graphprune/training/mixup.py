"""Mixup: neighbours in a batch are blended, images and losses in the same proportion.

    x' = m x_i + (1 - m) x_j,    loss' = m loss(y', t_i) + (1 - m) loss(y', t_j),    m ~ Beta(a, a)

Once a network is right on nearly every training image, the images teach it little; the dense program's answers to
blends of them still do (Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent", section
3.1).

Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.errors import DataError, UsageError

__all__ = ["Blend", "must_keep_neighbours"]


@dataclass(frozen=True)
class Blend:
    """How one batch is blended: samples 0 and 1 with each other, 2 and 3, and so on."""

    share: float
    """What of a sample is its own, from a half to 1."""

    @classmethod
    def draw(cls, alpha: float, *key: int) -> Blend:
        """Draw a share from Beta(alpha, alpha); the same `key` (seed, epoch, step) gives the same one."""
        share = float(np.random.default_rng([n & 0xFFFFFFFF for n in key]).beta(alpha, alpha))
        return cls(max(share, 1.0 - share))

    def inputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs with each sample's neighbour blended in.

        Raises:
            DataError: An input is no image and no other field of real numbers.
        """
        for index, tensor in enumerate(inputs):
            if not tensor.is_floating_point():
                raise DataError(
                    f"mixup blends inputs of floating-point numbers, found {tensor.dtype} in input {index}; "
                    "use mixup=0"
                )
        return tuple(torch.lerp(t, _neighbours(t), 1.0 - self.share) for t in inputs)

    def neighbours(self, target: Any) -> Any:
        """Return the targets of the neighbours."""
        return pytree.tree_map_only(Tensor, _neighbours, target)


def must_keep_neighbours(batch_size: int, processes: int) -> None:
    """Check that every process gets whole pairs of neighbours, so that several blend what one would.

    Raises:
        UsageError: The batch parts neighbours.
    """
    if processes > 1 and batch_size // processes % 2:
        raise UsageError(
            f"mixup= expected an even number of samples in each of {processes} processes, found batches of "
            f"{batch_size} ({batch_size // processes} each), which part neighbours; use a batch_size that is a "
            f"multiple of {2 * processes}, or mixup=0"
        )


def _neighbours(samples: Tensor) -> Tensor:
    """Swap samples 0 and 1, 2 and 3, and so on; an odd one at the end stays."""
    order = torch.arange(len(samples), device=samples.device)
    swapped = (order ^ 1).clamp_(max=len(samples) - 1)
    return samples.index_select(0, swapped)
