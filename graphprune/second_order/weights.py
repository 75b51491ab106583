"""Optimal brain surgeon for one layer: which weights to zero, and what the others become.

A layer ``z = W y`` with second moments ``Psi = E[y y^T]`` of its inputs changes its output by

    E = (1/n) ||W' Y - W Y||_F^2 = tr(D Psi D^T),       D = W' - W

without any terms of other orders, row by row with the same Psi. To zero weight q of a row at the least error,

    row -= row_q / [Psi^-1]_qq  (Psi^-1)_q,             dE = row_q^2 / [Psi^-1]_qq = 2 L_q

``L_q`` is the paper's sensitivity, which takes Psi for the Hessian; the Hessian of E is 2 Psi, so the true error is
twice that. Rankings are the same.

Shapes, throughout: `weight` ``[rows, f]``, one row per output unit, with the bias as last column where the layer has
one; `gram` and `inverse` ``[f, f]``; masks are boolean and True where a weight stays.

Sources: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon",
equations 6 to 8, and its released code for the static form; Frantar, Singh and Alistarh 2022, "Optimal Brain
Compression", algorithm 1 (ExactOBS) for the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphprune.errors import PassError

__all__ = [
    "adapt",
    "chosen",
    "damped",
    "damped_inverse",
    "error_bound",
    "live_inputs",
    "obs_order_static",
    "obs_prune_exact",
    "obs_prune_static",
    "obs_trace",
    "output_error",
    "refit",
    "woodbury_inverse",
]

STEPS = 16
"""Weights of a wide row go several at a time, so that they are scored again about this often while half of them go."""

_CELLS = 1 << 22
"""Elements of inverses that are worked on at the same time: 32 MiB in float64."""


def live_inputs(gram: Tensor) -> Tensor:
    """Return which inputs were ever other than zero."""
    return gram.diagonal() > 0


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return the moments with `damping` times the mean square of the live inputs on the diagonal.

    Inputs that are always the same as others make the matrix singular; damping mends that. An input that is always zero
    gets the mean square itself instead, so that it meets no other.
    """
    diagonal = gram.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else torch.ones_like(diagonal[0])
    return gram + torch.diag(torch.where(live, damping * mean, mean))


def damped_inverse(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Return the inverse of `damped`, by Cholesky.

    Raises:
        PassError: The matrix is singular: more damping is needed.
    """
    return _inverse(damped(gram, damping))


def woodbury_inverse(samples: Tensor, alpha: float = 1e6) -> Tensor:
    """Return the inverse of the moments of `samples`, sample by sample from ``alpha I``.

    It equals ``inverse(gram + I / alpha)``: a damping of ``1 / (alpha mean(diag))``.

    Shapes:
        samples: ``[n, f]``; result: ``[f, f]``.
    Source: Dong, Chen and Pan 2017, section 3.4: P -= (P y)(P y)^T / (n + y^T P y).
    """
    n, f = samples.shape
    inverse = alpha * torch.eye(f, dtype=samples.dtype, device=samples.device)
    for y in samples:
        product = inverse @ y
        inverse -= torch.outer(product, product) / (n + y @ product)
    return inverse


# -- errors -----------------------------------------------------------------------------------------------------


def output_error(change: Tensor, gram: Tensor) -> float:
    """Return ``tr(D Psi D^T)``: the mean over samples of the squared change of the layer's output."""
    return float(((change @ gram) * change).sum().clamp_min(0))


def error_bound(errors: Sequence[float], gains: Sequence[float]) -> float:
    """Return the bound on the root mean square change of the output of a chain of layers.

        sum_k ( prod_{l > k} gain_l ) sqrt(E_k)

    Args:
        errors: Layer by layer, `output_error` for the inputs of the dense network.
        gains: Layer by layer, the Frobenius norm of the pruned weight, without the bias.

    Source: Dong, Chen and Pan 2017, theorem 3.2, equation 8; it holds where what stands between the layers does not
    stretch distances (ReLU).
    """
    bound = 0.0
    for error, gain in zip(errors, gains, strict=True):
        bound = bound * gain + error**0.5
    return bound


# -- the static form --------------------------------------------------------------------------------------------


def obs_order_static(weight: Tensor, inverse: Tensor, live: Tensor | None = None) -> Tensor:
    """Return the sensitivity ``L_q`` of every weight, all from one inverse, ``[rows, f]``.

    A weight whose input is always zero has none (`live`, `live_inputs`).
    Source: Dong, Chen and Pan 2017, equation 7.
    """
    sensitivity = weight.square() / (2 * inverse.diagonal())
    return sensitivity if live is None else sensitivity * live


def obs_prune_static(weight: Tensor, inverse: Tensor, mask: Tensor, sensitivity: Tensor) -> Tensor:
    """Zero the weights outside `mask` one by one, least sensitive first, with the inverse that there was at the start.

    An update may give a weight that is already out another value; it is zeroed at the end, as are its effects on the
    error forgotten. This is what the paper's released code does.
    """
    result = weight.clone()
    rows = torch.arange(len(weight), device=weight.device)
    # Rows do not meet: the first that goes of every row, then the second, ...
    order = torch.where(mask, torch.inf, sensitivity).argsort(dim=1, stable=True)
    counts = (~mask).sum(1)
    diagonal = inverse.diagonal()
    for step in range(int(counts.max()) if len(counts) else 0):
        column = order[:, step]
        amount = result[rows, column] / diagonal[column] * (step < counts)
        result -= amount[:, None] * inverse[column]
    return result * mask


# -- the exact form ---------------------------------------------------------------------------------------------


def obs_trace(weight: Tensor, gram: Tensor, *, fixed: int = 0) -> tuple[Tensor, Tensor]:
    """Zero the weights of every row one by one at the least error, and return when and at what error each one goes.

    After each removal the inverse is brought down to the weights that are left, so each error is the true one. A row
    with more than 2 `STEPS` weights left loses several at once, the least of the moment; what stays is still updated
    exactly. Weights that are zero already are out from the start, at no error.

    Args:
        weight: The layer.
        gram: Moments; damped if they are singular.
        fixed: How many columns at the end may not go: 1 for the bias.

    Returns:
        The error ``dE`` of every weight's removal, where less than that of an earlier one of the row raised to it
        (a weight goes after those before it have gone), and its turn in the row, both ``[rows, f]``; fixed columns:
        inf.
    """
    rows, f = weight.shape
    errors = torch.zeros_like(weight)
    turns = torch.zeros(rows, f, dtype=torch.int64, device=weight.device)
    errors[:, f - fixed :] = torch.inf
    alive = weight != 0
    alive[:, f - fixed :] = True
    counts = alive.sum(1)
    position = 0
    whole = None if not bool(alive.all()) else _inverse(gram)
    by_count = counts.argsort(descending=True)
    while position < rows:
        width = max(1, int(counts[by_count[position]]))
        chunk = by_count[position : position + max(1, _CELLS // width**2)]
        position += len(chunk)
        columns, present = _columns(alive[chunk], width)
        if whole is None:
            inverse = _inverse(_restricted(gram, columns, present))
        else:
            inverse = whole.expand(len(chunk), f, f).clone()
        may_go = present & (columns < f - fixed)
        _trace(weight, chunk, columns, may_go, inverse, errors, turns)
    return errors, turns


def obs_prune_exact(
    weight: Tensor,
    gram: Tensor,
    *,
    keep: int | None = None,
    tolerance: float | None = None,
    fixed: int = 0,
) -> Tensor:
    """Zero weights by exact traces of all rows, rank what goes over the whole layer, and refit what stays.

    Args:
        weight: The layer.
        gram: Moments; damped if they are singular.
        keep: How many weights stay, fixed columns not counted.
        tolerance: Or the largest error sqrt(L) of a weight that goes.
        fixed: How many columns at the end stay: 1 for the bias.
    """
    errors, turns = obs_trace(weight, gram, fixed=fixed)
    mask = chosen(errors / 2, turns, keep=keep, tolerance=tolerance, fixed=fixed)
    return refit(weight, gram, mask)


def chosen(
    sensitivity: Tensor,
    turns: Tensor | None = None,
    *,
    keep: int | None = None,
    tolerance: float | None = None,
    fixed: int = 0,
) -> Tensor:
    """Return the mask that keeps the most sensitive weights of the layer, and the fixed columns.

    Args:
        sensitivity: ``L_q`` of every weight.
        turns: Which of two equally sensitive weights goes first.
        keep: How many stay, fixed columns not counted.
        tolerance: Or the largest sqrt(L) of a weight that goes.
        fixed: How many columns at the end stay.
    """
    if (keep is None) == (tolerance is None):
        raise PassError(
            f"expected either keep or tolerance, found keep={keep} tolerance={tolerance}"
        )
    free = sensitivity[:, : sensitivity.shape[1] - fixed]
    mask = torch.ones_like(sensitivity, dtype=torch.bool)
    if tolerance is not None:
        mask[:, : free.shape[1]] = free.sqrt() > tolerance
        return mask
    assert keep is not None
    if not 0 <= keep <= free.numel():
        raise PassError(f"expected to keep 0 to {free.numel()} weights of a layer, found {keep}")
    flat = free.flatten()
    if turns is None:
        order = flat.argsort(stable=True)
    else:
        order = turns[:, : free.shape[1]].flatten().argsort(stable=True)
        order = order[flat[order].argsort(stable=True)]
    stays = torch.ones_like(flat, dtype=torch.bool)
    stays[order[: flat.numel() - keep]] = False
    mask[:, : free.shape[1]] = stays.view_as(free)
    return mask


# -- least squares ----------------------------------------------------------------------------------------------


def refit(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Return the weights inside `mask` whose output is closest to that of `weight`: least squares, row by row.

    Shapes and meaning: S the columns that a row keeps, ``row_S = (W gram)_S (gram_SS)^-1``.
    """
    target = weight @ gram
    result = torch.zeros_like(weight)
    counts = mask.sum(1)
    by_count = counts.argsort(descending=True)
    position = 0
    while position < len(weight):
        width = int(counts[by_count[position]])
        if not width:
            break
        chunk = by_count[position : position + max(1, _CELLS // width**2)]
        position += len(chunk)
        columns, present = _columns(mask[chunk], width)
        wanted = target[chunk].gather(1, columns) * present
        factor = _cholesky(_restricted(gram, columns, present))
        solved = torch.cholesky_solve(wanted[..., None], factor)[..., 0] * present
        part = torch.zeros_like(target[chunk]).scatter_add_(1, columns, solved)
        result[chunk] = part
    return result


def adapt(weight: Tensor, gram: Tensor, cross: Tensor, damping: float = 0.01) -> Tensor:
    """Return the weights that, on the inputs of a pruned network, come closest to the layer's dense output.

    They minimise ``E|W ydense - W' y|^2``, with a pull to the old weights of `damping` times the mean square of the
    inputs.

    Shapes:
        gram: Moments of the pruned network's inputs y; cross: ``E[ydense y^T]``.
    """
    moments = damped(gram, damping)
    target = weight @ (cross + moments - gram)
    return torch.cholesky_solve(target.mT, _cholesky(moments)).mT


# -- helpers ----------------------------------------------------------------------------------------------------


def _trace(
    weight: Tensor,
    chunk: Tensor,
    columns: Tensor,
    may_go: Tensor,
    inverse: Tensor,
    errors: Tensor,
    turns: Tensor,
) -> None:
    """Run the traces of some rows; `inverse` is used up."""
    values = weight[chunk].gather(1, columns)
    worst = torch.zeros(len(chunk), 1, dtype=weight.dtype, device=weight.device)
    left = may_go.clone()
    turn = gone = 0
    while bool(left.any()):
        size = max(1, int(left.sum(1).max()) // STEPS)
        scores = values.square() / inverse.diagonal(dim1=1, dim2=2)
        lowest, at = torch.where(left, scores, torch.inf).topk(size, dim=1, largest=False)
        active = lowest.isfinite()
        pivots = inverse.gather(1, at[:, :, None].expand(-1, -1, inverse.shape[2]))
        pivots = pivots * active[:, :, None]
        inner = pivots.gather(2, at[:, None, :].expand(-1, size, -1)) * active[:, None, :]
        factor = _cholesky(inner + torch.diag_embed((~active).to(inner.dtype)))
        solved = torch.cholesky_solve(pivots, factor)
        values = values - ((values.gather(1, at) * active)[:, None, :] @ solved)[:, 0]
        inverse.baddbmm_(pivots.mT, solved, alpha=-1)
        ranked = torch.maximum(torch.where(active, lowest, 0).cummax(1).values, worst)
        worst = ranked[:, -1:]
        row, number = active.nonzero(as_tuple=True)
        place = at[row, number]
        column = columns[row, place]
        errors[chunk[row], column] = ranked[row, number]
        turns[chunk[row], column] = turn + number
        left[row, place] = False
        values[row, place] = 0
        # What has gone leaves rows and columns of rounding errors: keep them from ever being divided by.
        inverse[row, place, place] = 1
        turn, gone = turn + size, gone + size
        if gone > 16 and gone * 8 > columns.shape[1]:
            columns, values, inverse, left = _compacted(columns, values, inverse, left, may_go)
            may_go, gone = left.clone(), 0


def _compacted(
    columns: Tensor, values: Tensor, inverse: Tensor, left: Tensor, may_go: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drop columns that have gone from the working set; rows that have lost fewer carry some along."""
    stays = left | ~may_go
    width = int(stays.sum(1).max())
    at, present = _columns(stays, width)
    smaller = inverse.gather(1, at[:, :, None].expand(-1, -1, inverse.shape[2]))
    smaller = smaller.gather(2, at[:, None, :].expand(-1, width, -1))
    return (
        columns.gather(1, at),
        values.gather(1, at) * present,
        smaller,
        left.gather(1, at) & present,
    )


def _columns(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the columns inside a mask, ``[rows, width]``, and which are there, where a row has fewer than `width`."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return order, mask.gather(1, order)


def _restricted(gram: Tensor, columns: Tensor, present: Tensor) -> Tensor:
    """Return the moments of some columns per row, ``[rows, width, width]``; of those that are absent, the identity."""
    part = gram[columns[:, :, None], columns[:, None, :]]
    part = part * (present[:, :, None] & present[:, None, :])
    return part + torch.diag_embed((~present).to(gram.dtype))


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(_cholesky(matrix))


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    # A singular matrix may pass by rounding; then a pivot is no larger than that.
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    scale = matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    if bool((info > 0).any()) or bool((pivots <= rounding * scale).any()):
        raise PassError(
            f"the second moments of a layer's {matrix.shape[-1]} inputs are singular (some inputs always agree, or "
            "there are fewer samples than inputs); give more samples or a larger damping, such as 0.01"
        )
    return factor
