"""An optimizer's state through surgery, so that training goes on where it was.

Momentum, first and second moments have an entry for every entry of their parameter. A cut keeps some indices along
some dimensions of a parameter; the same indices of its state are the state of the smaller parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.errors import PlanError, TrainingError
from graphprune.program import Slices

__all__ = ["all_tensors", "carry_optimizer", "slice_tensor", "slice_tensors", "write_slices"]


def slice_tensor(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Return the entries of `tensor` that stay: along each dimension in `kept`, the indices that it names."""
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, torch.as_tensor(indices, device=tensor.device))
    return tensor


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names: surgery may put another name of a tied one first."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def slice_tensors(tensors: Mapping[str, Tensor], slices: Slices) -> dict[str, Tensor]:
    """Return tensors by parameter name, such as averages or masks, cut as the parameters are."""
    return {name: slice_tensor(tensor, slices.get(name, {})) for name, tensor in tensors.items()}


@torch.no_grad()
def write_slices(whole: nn.Module, part: nn.Module, slices: Slices) -> None:
    """Write the values of what surgery has left into what it was cut from; what was cut off stays as it is.

    Args:
        whole: The module before the cut; its floating tensors are written into, and its counters.
        part: The module after the cut; names are those of `whole`.
        slices: Parameter or buffer -> dimension -> kept indices, as in `graphprune.Plan.slices`.
    """
    values = all_tensors(part)
    tensors = (*whole.named_parameters(), *whole.named_buffers())
    for name, tensor in tensors:
        # Tensors of whole numbers are indices, which surgery may number anew.
        if name not in values or not (tensor.is_floating_point() or tensor.dim() == 0):
            continue
        kept = slices.get(name, {})
        value = values[name].to(tensor.device)
        if not kept:
            tensor.copy_(value)
            continue
        indices = [kept.get(dim, range(size)) for dim, size in enumerate(tensor.shape)]
        tensor[np.ix_(*indices)] = value


def carry_optimizer(
    optimizer: Optimizer, before: nn.Module, after: nn.Module, slices: Slices
) -> None:
    """Make `optimizer` go on with the parameters of `after`, and with their part of the state that it has.

    Groups, their options and the order of parameters stay. A parameter that `after` does not have any more leaves its
    group; one that only `after` has, such as a bias of fold-constants, joins the group of its layer, without state. A
    schedule that drives the optimizer notices nothing.

    Args:
        optimizer: What has trained parameters of `before`; it is changed in place.
        before: The module that was trained.
        after: The module that surgery made of it; names are those of `before`.
        slices: Parameter -> dimension -> kept indices, as in `graphprune.Plan.slices`.

    Raises:
        PlanError: The slices do not lead from the shapes of `before` to those of `after`.
        TrainingError: The optimizer holds state that is not laid out like its parameter.
    """
    # accelerate wraps an optimizer without handing on the state that is assigned to it
    optimizer = getattr(optimizer, "optimizer", optimizer)
    name_of = {parameter: name for name, parameter in before.named_parameters()}
    new = dict(after.named_parameters(remove_duplicate=False))
    state: dict[Tensor, Any] = {}
    groups: list[list[nn.Parameter]] = []
    for group in optimizer.param_groups:
        groups.append([])
        for parameter in group["params"]:
            name = name_of.get(parameter)
            if name is None:
                groups[-1].append(parameter)  # not part of the program, so surgery did not touch it
                if parameter in optimizer.state:
                    state[parameter] = optimizer.state[parameter]
            elif name in new:
                kept = slices.get(name, {})
                _must_fit(name, parameter, new[name], kept)
                groups[-1].append(new[name])
                if parameter in optimizer.state:
                    state[new[name]] = {
                        key: _slice_state(optimizer, f"{name}, {key}", parameter, value, kept)
                        for key, value in optimizer.state[parameter].items()
                    }
    _join(new, before, groups)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state.clear()
    optimizer.state.update(state)


def _join(
    after: Mapping[str, nn.Parameter], before: nn.Module, groups: list[list[nn.Parameter]]
) -> None:
    """Add what surgery has made to the groups of its neighbours in a layer; to the first where it has none."""
    known = dict(before.named_parameters(remove_duplicate=False))
    owners = {id(parameter): name.rpartition(".")[0] for name, parameter in after.items()}
    for name, parameter in after.items():
        if name in known or any(parameter is p for group in groups for p in group):
            continue
        owner = name.rpartition(".")[0]
        home = (g for g in groups if any(owners.get(id(p)) == owner for p in g))
        next(home, groups[0]).append(parameter)


def _must_fit(
    name: str, before: Tensor, after: Tensor, kept: Mapping[int, tuple[int, ...]]
) -> None:
    expected = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(before.shape)]
    if expected != list(after.shape):
        raise PlanError(
            f"{name} has shape {list(before.shape)}, of which the slices keep {expected}, but surgery made "
            f"{list(after.shape)}; give the slices of the plan that was applied"
        )


def _slice_state(
    optimizer: Optimizer,
    what: str,
    parameter: Tensor,
    value: Any,
    kept: Mapping[int, tuple[int, ...]],
) -> Any:
    """Cut one entry of the state; a dimension of size one stands for all indices (factored second moments)."""
    if not isinstance(value, Tensor) or not kept or value.numel() == 1:
        return value
    sizes = zip(value.shape, parameter.shape, strict=False)
    if value.dim() == parameter.dim() and all(size in (1, full) for size, full in sizes):
        present = {
            dim: indices
            for dim, indices in kept.items()
            if value.shape[dim] == parameter.shape[dim]
        }
        return slice_tensor(value, present)
    raise TrainingError(
        f"the state of {type(optimizer).__name__} for {what} has shape {list(value.shape)}, its parameter "
        f"{list(parameter.shape)}; expected one entry per entry of the parameter. Train with sgd or adamw, or start "
        "a new optimizer after the cut"
    )
