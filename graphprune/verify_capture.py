"""The first proof: a captured program computes what the user's own model computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphprune.check import Check
from graphprune.program import Program

__all__ = ["TOLERANCE", "verify_capture"]

TOLERANCE = 1e-4
"""Capture may put operators into another order (attention does), which float32 shows as rounding."""
_ROUNDINGS = 20
"""How many roundings of a coarser type may add up."""
_SAMPLES = 2


def verify_capture(model: nn.Module, program: Program, *, seed: int = 0) -> Check:
    """Run both on the same random samples, and compare their outputs.

    Args:
        model: The model that `program` was captured from, in evaluation mode.
        program: The program.
        seed: Seed of the samples.
    """
    inputs = program.batch(_SAMPLES, seed=seed)
    bound = model if program.calling is None else program.calling.bind(model)
    expected = _outputs(bound, inputs)
    worst, tolerance = _distance(expected, _outputs(program.module, inputs)), _tolerance(program)
    detail = f"model on {_SAMPLES} random samples, relative to the largest value"
    is_random = worst > tolerance and _distance(expected, _outputs(bound, inputs)) > tolerance
    if is_random:
        detail += "; the model itself gives something else at every call"
    return Check(
        max_abs_err=worst,
        tolerance=tolerance,
        passed=worst <= tolerance or is_random,
        detail=detail,
    )


def _tolerance(program: Program) -> float:
    """Return what rounding explains: more where tensors are of half precision."""
    coarsest = max(
        (torch.finfo(t.dtype).eps for _, t in program.named_tensors() if t.is_floating_point()),
        default=0.0,
    )
    return max(TOLERANCE, _ROUNDINGS * coarsest)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(*(t.clone() for t in inputs))
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _distance(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of its tensor; infinite between other shapes."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    return max((_relative(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    if a.dtype == torch.bool or not (a.is_floating_point() or a.is_complex()):
        return math.inf
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return math.inf
    scale = max(float(a[both].abs().max()) if both.any() else 0.0, 1e-30)
    return float((a[both] - b[both]).abs().max()) / scale if both.any() else 0.0
