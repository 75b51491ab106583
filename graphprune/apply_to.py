"""Put a cut back into the user's own class: the same module, smaller, where its attributes can hold the cut.

Parameters and buffers take the cut program's values, and modules take the sizes that the cut wrote into their
counterparts. What the user's ``forward`` says in literal numbers (a ``view`` with sizes, split attention heads)
no attribute can change; so the result is run beside the cut program, and an error says which literals stood in
the way.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphprune.cut import Cut, cut_program
from graphprune.errors import ApplyError
from graphprune.groups import analyze
from graphprune.plan import Plan
from graphprune.program import Program

__all__ = ["apply_plan_to"]

TOLERANCE = 1e-4
"""Largest difference of float32 outputs, relative to the largest: the same operators in the same order."""


def apply_plan_to(model: nn.Module, program: Program, cut: Program, plan: Plan) -> nn.Module:
    """Return a copy of `model`, of the user's own class, that computes what `cut` does.

    Args:
        model: The module that was compiled; not changed.
        program: What it was captured as.
        cut: What the compiler made of it.
        plan: What was removed.

    Raises:
        ApplyError: The class cannot hold the cut; says what stands in the way.
    """
    groups = analyze(program)
    changes = cut_program(program, groups, plan.keep(program, groups))
    smaller = copy.deepcopy(model).eval()
    _take_tensors(smaller, cut)
    for path, attributes in changes.attributes.items():
        module = _submodule(smaller, path)
        for name, value in attributes.items():
            setattr(module, name, value)
    _assert_equal(smaller, cut, changes)
    return smaller


def _take_tensors(model: nn.Module, cut: Program) -> None:
    """Give `model` the tensors of the cut program, by name; tied parameters stay tied."""
    values = dict(cut.named_tensors())
    fresh: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                full = f"{path}.{name}" if path else name
                if old is None:
                    continue
                if id(old) not in fresh and full in values:
                    data = values[full].detach().clone()
                    is_parameter = isinstance(old, nn.Parameter)
                    fresh[id(old)] = nn.Parameter(data, old.requires_grad) if is_parameter else data
                    fresh[id(fresh[id(old)])] = fresh[id(old)]
    for module in model.modules():
        for parameters in (module._parameters, module._buffers):
            for name, old in parameters.items():
                if old is not None and id(old) in fresh:
                    parameters[name] = fresh[id(old)]  # type: ignore[assignment]


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ApplyError(
            f"{type(model).__name__} has no module {path}, whose sizes the cut changes: the compiler took it apart. "
            "Use result.program.module instead."
        ) from error


def _assert_equal(smaller: nn.Module, cut: Program, changes: Cut) -> None:
    literals = [f"{c.node}: {c.old} -> {c.new}" for c in changes.literals]
    reason = (
        f"the cut rewrote {len(literals)} sizes that its forward says in numbers ({'; '.join(literals[:3])})"
        if literals
        else "its forward depends on the sizes that were cut"
    )
    advice = "Use result.program.module, which runs without the class."
    inputs = cut.batch(2)
    run = smaller if cut.calling is None else cut.calling.bind(smaller)
    with torch.inference_mode():
        expected = [t for t in tree_leaves(cut.module(*inputs)) if isinstance(t, Tensor)]
        try:
            found = [t for t in tree_leaves(run(*inputs)) if isinstance(t, Tensor)]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ApplyError(
                f"{type(smaller).__name__} cannot hold the cut: {reason}; it fails with: "
                f"{str(error).splitlines()[0]}. {advice}"
            ) from error
    for old, new in zip(expected, found, strict=True):
        scale = float(old.abs().max()) or 1.0
        if old.shape != new.shape or not float((old - new).abs().max()) <= TOLERANCE * scale:
            raise ApplyError(
                f"{type(smaller).__name__} runs with the cut tensors but gives other outputs than the cut program: "
                f"{reason}. {advice}"
            )
