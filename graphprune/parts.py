"""The parts of a whole-running model that a graph can hold: what is exported where the whole cannot be.

The module tree is walked from the top: a module that is called with tensors alone and that a tracer captures is a
part, and its children are not looked at; any other is looked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import GraphpruneError
from graphprune.program import Program, WholeModel

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A submodule as a program of its own."""

    path: str
    """Where it stands in the model."""
    program: Program


def parts_of(program: Program) -> tuple[Part, ...]:
    """Return the largest submodules with parameters that can be captured as graphs.

    Args:
        program: Of the dialect ``module``; runs once on its example inputs.
    """
    model = program.module.get_submodule(WholeModel.CHILD)
    return tuple(_walk(model, "", _inputs_of(model, program.example_inputs), program.source))


def _inputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, list[Tensor] | None]:
    """Return meta tensors like the inputs of each module's first call; None where it takes anything but tensors."""
    found: dict[str, list[Tensor] | None] = {}
    handles = []
    for path, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            plain = not kwargs and all(isinstance(a, Tensor) and a.dim() for a in args)
            metas = [torch.empty_like(a, device="meta") for a in args] if plain else None
            found.setdefault(path, metas)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _walk(
    module: nn.Module, path: str, inputs: dict[str, list[Tensor] | None], source: str
) -> Iterator[Part]:
    if not any(True for _ in module.parameters()):
        return
    metas = inputs.get(path)
    if path and metas and all(m.is_floating_point() for m in metas):
        found = _captured(module, [_random(m) for m in metas], f"{source}:{path}")
        if found is not None:
            yield Part(path=path, program=found)
            return
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, inputs, source)


def _random(meta: Tensor) -> Tensor:
    shape = [max(1, n) for n in meta.shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(meta.dtype)


def _captured(module: nn.Module, inputs: list[Tensor], source: str) -> Program | None:
    from graphprune.capture import capture_graph

    try:
        return capture_graph(module, tuple(inputs), source=source)
    except GraphpruneError:
        return None
