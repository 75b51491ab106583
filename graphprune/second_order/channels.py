"""Optimal brain surgery on whole units: which goes next, and what the weights that stay become.

A layer ``z = W y`` with second moments ``H = E[y y^T]`` loses the columns S of a unit. The update of the other columns
that keeps its output closest, and the error that remains, are

    error_S = tr( W_S ((H^-1)_SS)^-1 W_S^T )         E|z - z'|^2, summed over outputs
    W      -= W_S ((H^-1)_SS)^-1 (H^-1)_S
    H^-1   -= (H^-1)_:S ((H^-1)_SS)^-1 (H^-1)_S:

Source: Frantar, Singh and Alistarh 2022, "Optimal Brain Compression", equation 5, for a set of columns, as in ZipLM
(Kurtic, Frantar and Alistarh 2023); our reconstruction where several layers read the same unit: each error is taken
relative to the energy of the layer's output, and they add up. The groups of a convolution are layers of their own, each
with its own H, that lose the same columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.second_order.calibration import Moments
from graphprune.second_order.readers import Reader, UnitGroup, columns_of

__all__ = ["Removal", "refit", "removal_order"]

STEPS = 64
"""Units of a wide group go several at a time, so that they are scored again about this often."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The order in which the units of a group go."""

    order: tuple[int, ...]
    """Positions in `UnitGroup.units`; the last unit is not among them."""
    errors: Tensor
    """Shape [len(order) + 1]: the sum of relative output errors after so many have gone; 0 first."""
    weights: Mapping[int, Mapping[str, Tensor]]
    """Number removed -> node -> weight matrix, for the numbers that were asked for."""


def _damped(gram: Tensor, damping: float) -> Tensor:
    """Return each `gram` with `damping` times its mean diagonal added, so that dead and duplicate inputs do no harm."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    amount = torch.maximum(damping * diagonal.mean(1), 1e-12 * diagonal.amax(1)).clamp(min=1e-30)
    return gram + amount[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)


def _by_group(weight: Tensor, groups: int, *, constant: Tensor | None) -> Tensor:
    """Return ``[groups, outputs, columns]`` in doubles, with what stands before the constant as last column."""
    if constant is not None:
        weight = torch.cat([weight.double(), constant.double()[:, None]], 1)
    return weight.double().reshape(groups, -1, weight.shape[1])


class _State:
    """A layer while units of a group go."""

    def __init__(self, reader: Reader, weight: Tensor, moments: Moments, damping: float) -> None:
        self.reader = reader
        gram = moments.gram.double()
        self.constant = moments.has_constant
        # The bias may move, too; what it was does not matter.
        zeros = weight.new_zeros(len(weight)) if self.constant else None
        self.weight = _by_group(weight, len(gram), constant=zeros).clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram, damping)))
        self.energy = max(float(((self.weight @ gram) * self.weight).sum()), 1e-30)

    def scores(self, alive: Tensor) -> Tensor:
        """Return the relative error of removing each unit, shape [units]; 0 where the layer does not read it."""
        result = torch.zeros(len(alive), dtype=torch.float64)
        for members, owned in self.reader.columns:
            here = alive[members]
            if not here.any():
                continue
            columns = owned[here]
            blocks = self.inverse[:, columns[:, :, None], columns[:, None, :]]  # [groups, n, m, m]
            rows = self.weight[:, :, columns].permute(0, 2, 3, 1)  # [groups, n, m, outputs]
            solved = torch.linalg.solve(blocks, rows)
            result[members[here]] = (rows * solved).sum((0, 2, 3))
        return result / self.energy

    def remove(self, columns: Tensor) -> float:
        """Remove columns and return the relative error."""
        if not len(columns):
            return 0.0
        block = self.inverse[:, columns][:, :, columns]
        cross = torch.linalg.solve(block, self.inverse[:, columns])  # [groups, k, f]
        part = self.weight[:, :, columns]
        error = float((torch.linalg.solve(block, part.mT) * part.mT).sum())
        self.weight -= part @ cross
        self.weight[:, :, columns] = 0.0
        self.inverse -= self.inverse[:, :, columns] @ cross
        self.inverse[:, columns] = 0.0
        self.inverse[:, :, columns] = 0.0
        return error / self.energy

    def matrix(self) -> Tensor:
        """Return the weight matrix of all groups without the constant's column."""
        weight = self.weight.flatten(0, 1)
        return (weight[:, :-1] if self.constant else weight).clone()


def removal_order(
    group: UnitGroup,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    *,
    damping: float = 1e-4,
    keep_weights: Sequence[int] = (),
) -> Removal:
    """Remove one unit after the other, always the one that costs its readers least.

    Args:
        group: The units and their readers.
        weights: Node -> weight matrix, shape [outputs, columns]; the groups of a convolution one below the other.
        moments: Node -> second moments of the layer's input.
        damping: Added to the diagonal of each Gram matrix, as a fraction of its mean.
        keep_weights: After how many removals to keep the updated weights.
    """
    states = [
        _State(r, weights[r.layer.node], moments[r.layer.node], damping) for r in group.readers
    ]
    alive = torch.ones(len(group), dtype=torch.bool)
    chunk = max(1, len(group) // STEPS)
    order: list[int] = []
    errors = [0.0]
    kept: dict[int, Mapping[str, Tensor]] = {}
    wanted = sorted(set(keep_weights))
    while len(order) < len(group) - 1:
        scores = torch.stack([s.scores(alive) for s in states]).sum(0)
        scores[~alive] = torch.inf
        room = len(group) - 1 - len(order)
        stop = next((w - len(order) for w in wanted if w > len(order)), room)
        chosen = torch.argsort(scores, stable=True)[: min(chunk, room, stop)].tolist()
        error = sum(s.remove(columns_of(s.reader, chosen)) for s in states)
        alive[chosen] = False
        # Units that go together share the error of their step.
        errors += [errors[-1] + error * (i + 1) / len(chosen) for i in range(len(chosen))]
        order += chosen
        if len(order) in wanted:
            kept[len(order)] = {s.reader.layer.node: s.matrix() for s in states}
    return Removal(
        order=tuple(order), errors=torch.tensor(errors, dtype=torch.float64), weights=kept
    )


def refit(
    dense: Tensor, bias: Tensor | None, moments: Moments, alive: Tensor, *, damping: float = 1e-4
) -> tuple[Tensor, Tensor | None]:
    """Return the weights that bring a layer closest to its dense output, from the inputs that it gets now.

        W' = argmin over columns that are alive of  E|W' y - W ydense|^2 + damping |W' - W|^2

    Args:
        dense: The dense weight matrix W, shape [outputs, columns].
        bias: The dense bias, shape [outputs].
        moments: With `cross`, the dense inputs against those of now.
        alive: Which columns are left, shape [columns]; in every group of a convolution the same.
        damping: Pull towards the dense weights, as a fraction of the mean of the Gram matrix's diagonal.

    Returns:
        Weight matrix, zero in the columns that are gone, and bias.
    """
    assert moments.cross is not None
    gram, cross = moments.gram.double(), moments.cross.double()
    constant, live = None, alive
    if moments.has_constant:
        constant = torch.zeros_like(dense[:, 0]) if bias is None else bias
        live = torch.cat([alive, torch.ones(1, dtype=torch.bool)])
    weight = _by_group(dense, len(gram), constant=constant)
    amount = damping * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    left = gram[:, live][:, :, live] + amount * torch.eye(int(live.sum()), dtype=gram.dtype)
    right = (weight @ cross)[:, :, live] + amount * weight[:, :, live]
    fitted = torch.zeros_like(weight)
    fitted[:, :, live] = torch.linalg.solve(left, right.mT).mT
    result = fitted.flatten(0, 1)
    if moments.has_constant:
        return result[:, :-1].to(dense.dtype), None if bias is None else result[:, -1].to(
            bias.dtype
        )
    return result.to(dense.dtype), bias
