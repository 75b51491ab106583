"""How a model is called: inputs by name, outputs by name, and what a graph cannot hand out left away.

A program takes tensors by position and returns tensors in plain containers. Language models take keyword arguments and
return dataclasses, caches among them. `Calling` stands between: it makes a copy of the model, with the same tensors and
of a class of the same name, whose ``forward`` takes and returns what a program does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.errors import InputError
from graphprune.lowering.copies import copy_structure

__all__ = ["Calling", "calling_of", "is_transformers_model", "uses_transformers"]

_LIBRARY = "transformers."
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, kw_only=True)
class Calling:
    """What a model's ``forward`` is given, and what of its result counts."""

    names: tuple[str, ...] = ()
    """The parameter that each input is given as; empty: inputs are given by position."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Parameter -> a value that is no tensor and always the same."""
    as_list: bool = False
    """Whether all inputs are given as one list, as detectors take their images."""
    outputs: tuple[str, ...] = ()
    """Keys (or positions) of the result that count; empty: all that are tensors."""

    def bind(self, model: nn.Module) -> nn.Module:
        """Return a copy of `model` that takes tensors by position and returns plain containers of tensors.

        The copy has the same tensors. A model of transformers keeps no cache in it: keys and values of past positions
        would be outputs, whose channels must stay.
        """
        bound = copy_structure(model)
        _without_cache(bound)
        bound.__class__ = self._class(type(model))
        return bound

    def release(self, bound: nn.Module) -> nn.Module:
        """Return a copy of what `bind` made, with the same tensors, of the model's own class again."""
        released = copy_structure(bound)
        released.__class__ = type(bound).__mro__[1]
        return released

    def _class(self, kind: type[nn.Module]) -> type[nn.Module]:
        calling, forward = self, kind.forward

        def call(self: nn.Module, *inputs: Any, **named: Any) -> Any:
            if calling.names:
                named = dict(zip(calling.names, inputs, strict=False)) | named
                inputs = ()
            if calling.as_list:
                inputs = (list(inputs),)
            return calling.select(forward(self, *inputs, **calling.constants, **named))

        # Tracers read from the signature how many inputs there are and what they are called.
        if self.names:
            kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters = [inspect.Parameter(name, kinds) for name in ("self", *self.names)]
            signature = inspect.Signature(parameters)
        elif self.as_list:
            signature = inspect.Signature(
                [
                    inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                    inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL),
                ]
            )
        else:
            signature = inspect.signature(forward)
        call.__signature__ = signature  # type: ignore[attr-defined]
        members = {"forward": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
        return type(kind.__name__, (kind,), members)

    def select(self, result: Any) -> Any:
        """Return what counts of a result, in plain containers.

        Raises:
            InputError: The result has no output of a name.
        """
        if not self.outputs:
            return _plain(result)
        by_key = isinstance(result, Mapping)
        entries = list(result) if isinstance(result, (Mapping, tuple, list)) else []
        known = [str(key) for key in entries] if by_key else [str(i) for i in range(len(entries))]
        for name in self.outputs:
            if name not in known:
                raise InputError(
                    f"the model has no output {name!r}: it has {', '.join(known) or 'one tensor'}"
                )
        picked = {name: _plain(result[name if by_key else int(name)]) for name in self.outputs}
        return picked if by_key else tuple(picked.values())


def calling_of(
    model: nn.Module, example_inputs: Any, outputs: Sequence[str] = ()
) -> tuple[Calling | None, Any]:
    """Return how `model` must be called, None where as it is, and its tensors by position.

    Args:
        model: What will be captured.
        example_inputs: A tensor, a sequence of tensors, or a mapping from parameter names to tensors and constants.
        outputs: The outputs that count; empty for all.

    Raises:
        InputError: The model has no parameter of a name.
    """
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example_inputs, Mapping):
        given = {name: value for name, value in example_inputs.items() if value is not None}
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in given:
            if name not in parameters and not is_open:
                raise InputError(
                    f"{type(model).__name__} takes no input {name!r}: it takes {', '.join(parameters)}"
                )
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in given.items() if name not in tensors}
        calling = Calling(names=tuple(tensors), constants=constants, outputs=tuple(outputs))
        return calling, tuple(tensors.values())
    if not outputs and not uses_transformers(model):
        return None, example_inputs
    names = [name for name, p in parameters.items() if p.kind in _POSITIONAL]
    count = 1 if isinstance(example_inputs, Tensor) else len(example_inputs)
    is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    by_name = () if is_open or count > len(names) else tuple(names[:count])
    return Calling(names=by_name, outputs=tuple(outputs)), example_inputs


def uses_transformers(model: nn.Module) -> bool:
    """Say whether `model` is one of transformers, or holds one."""
    kinds = {type(module) for module in model.modules()}
    return any(_is_of_transformers(kind) for kind in kinds)


def is_transformers_model(model: nn.Module) -> bool:
    """Say whether `model` itself is one of transformers."""
    return _is_of_transformers(type(model))


def _is_of_transformers(kind: type) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith(_LIBRARY)
        for base in kind.__mro__
    )


def _without_cache(model: nn.Module) -> None:
    """Tell models of transformers in `model`, which is a copy, to keep no cache; their configurations are copied."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "use_cache", False) and type(config).__module__.startswith(_LIBRARY):
            if id(config) not in configs:
                configs[id(config)] = copy.copy(config)
                configs[id(config)].use_cache = False
            module.__dict__["config"] = configs[id(config)]


def _plain(value: Any) -> Any:
    """Return nested tensors in dicts, tuples and lists, without anything else; None for what holds no tensor."""
    if isinstance(value, (Tensor, fx.Proxy)):
        return value
    if isinstance(value, Mapping):
        return {str(k): p for k, v in value.items() if (p := _plain(v)) is not None} or None
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = [p for v in value if (p := _plain(v)) is not None]
        return (items if isinstance(value, list) else tuple(items)) or None
    return None
