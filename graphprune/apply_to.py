"""Put a cut back into the user's own class: the same module, smaller, where its attributes can hold the cut.

Parameters and buffers take the cut program's values, and modules take the sizes that the cut wrote into their
counterparts. A size that the graph holds as a number often comes from an attribute of the module that the node belongs
to (``head_dim``, ``num_heads``): an attribute of the old value takes the new one, where all nodes of the module agree
on it. The module of a residual block that is gone becomes the identity. What the user's ``forward`` says in literal
numbers no attribute can change. So the result is run beside the cut program, and an error says what stood in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from graphprune.cut import Cut, cut_program
from graphprune.errors import ApplyError
from graphprune.groups import analyze
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.residual import ResidualBlock, named_blocks, without_blocks

__all__ = ["apply_plan_to"]

TOLERANCE = 1e-4
"""Largest difference of float32 outputs, relative to the largest: the same operators in the same order."""
TOLERANCE_WITHOUT_BLOCKS = 1e-9
"""The same where residual blocks have gone, in float64."""


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
    smaller = copy.deepcopy(model).eval()
    groups = analyze(program)
    if plan.blocks:
        blocks = named_blocks(program, groups, plan.blocks)
        _take_out(smaller, program, blocks)
        program = without_blocks(program, groups, blocks)
        groups = analyze(program)
    changes = cut_program(program, groups, plan.keep(program, groups))
    _take_tensors(smaller, cut)
    for path, attributes in changes.attributes.items():
        module = _submodule(smaller, path)
        for name, value in attributes.items():
            setattr(module, name, value)
    _take_sizes(smaller, program, changes)
    _take_shapes(smaller)
    known = {name for name, _ in program.named_tensors()}
    added = [name for name, _ in cut.named_tensors() if name not in known]
    _assert_equal(smaller, cut, changes, added)
    return smaller


def _take_out(model: nn.Module, program: Program, blocks: Sequence[ResidualBlock]) -> None:
    """Let the modules of residual blocks return what they are given."""
    owners = {node.name: _owner(node) for node in program.module.graph.nodes}
    for block in blocks:
        # The module must hold the sum, and no other block: else something is left of it.
        if not block.name or not block.name == block.module == owners[block.sum]:
            raise ApplyError(
                f"{type(model).__name__} has no module that is the residual block {block.name}, shortcut and sum "
                "included, and nothing else, so none can be taken out of it. Use result.program.module, which runs "
                "without the class."
            )
        _submodule(model, block.name)
        model.set_submodule(block.name, nn.Identity())


def _take_sizes(model: nn.Module, program: Program, changes: Cut) -> None:
    """Change the attributes that hold sizes which the cut rewrote in the nodes of the same module."""
    owners = {n.name: _owner(n) for n in program.module.graph.nodes}
    known: dict[str, dict[int, set[int]]] = {}
    for change in changes.literals:
        for old, new in change.sizes:
            known.setdefault(owners[change.node], {}).setdefault(old, set()).add(new)
    modules = dict(model.named_modules())
    for path, sizes in known.items():
        agreed = {old: new.pop() for old, new in sizes.items() if len(new) == 1}
        module = modules.get(path)
        if module is None:
            continue
        for name, value in vars(module).items():
            if type(value) is int and value in agreed:
                setattr(module, name, agreed[value])
            elif type(value) is tuple and value and all(type(v) is int for v in value):
                setattr(module, name, tuple(agreed.get(v, v) for v in value))


def _owner(node: fx.Node) -> str:
    """Return the path of the module whose ``forward`` made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    return str(path).removeprefix("L['self'].").removeprefix("L__self__.")


def _take_shapes(model: nn.Module) -> None:
    """Let plain layers say the sizes of their weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]


def _take_tensors(model: nn.Module, cut: Program) -> None:
    """Give `model` the tensors of the cut program, by name; tied parameters stay tied."""
    values = dict(cut.named_tensors())
    fresh: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                full = f"{path}.{name}" if path else name
                if old is None:  # a layer without a bias, which may have been given one
                    if store is module._parameters and full in values:
                        store[name] = nn.Parameter(values[full].detach().clone())
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


def _assert_equal(smaller: nn.Module, cut: Program, changes: Cut, added: Sequence[str]) -> None:
    advice = "Use result.program.module, which runs without the class"
    tolerance = TOLERANCE
    if blocks := cut.lost_blocks:
        # What a module does besides may change next to nothing on these inputs: a norm of a norm.
        smaller, cut = copy.deepcopy(smaller).double(), cut.map_floating(torch.Tensor.double)
        tolerance = TOLERANCE_WITHOUT_BLOCKS
        reason = f"it does more with {', '.join(blocks[:3])} than to hand a tensor through, or depends on sizes"
    elif literals := [f"{c.node}: {c.old} -> {c.new}" for c in changes.literals]:
        reason = f"the cut rewrote {len(literals)} sizes that its forward says in numbers ({'; '.join(literals[:3])})"
    else:
        reason = "its forward depends on the sizes that were cut"
    if not blocks:
        advice += (
            "; or leave the dimensions of attention heads alone, with granularity='widths,heads'"
        )
    inputs = cut.example_inputs if cut.dialect == "module" else cut.batch(2)
    run = smaller if cut.calling is None else cut.calling.bind(smaller)
    with torch.inference_mode():
        expected = [t for t in tree_leaves(cut.module(*inputs)) if isinstance(t, Tensor)]
        try:
            found = [t for t in tree_leaves(run(*inputs)) if isinstance(t, Tensor)]
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise ApplyError(
                f"{type(smaller).__name__} cannot hold the cut: {reason}; it fails with: "
                f"{str(error).splitlines()[0]}. {advice}."
            ) from error
    for old, new in zip(expected, found, strict=True):
        if old.shape == new.shape and torch.equal(old, new):
            continue
        scale = (float(old.double().abs().max()) if old.numel() else 0.0) or 1.0
        if old.shape != new.shape or not float((old - new).abs().max()) <= tolerance * scale:
            if added and not blocks and not changes.literals:
                reason = (
                    f"its forward has no use for what the passes added ({', '.join(added[:3])})"
                )
                advice = "Use result.program.module, which runs without the class"
            raise ApplyError(
                f"{type(smaller).__name__} runs with the cut tensors but gives other outputs than the cut program: "
                f"{reason}. {advice}."
            )
