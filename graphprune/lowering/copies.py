"""Copies of a module tree that cost no memory: the same tensors, or meta tensors, under new module objects."""

from __future__ import annotations

import collections
import types
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_structure", "meta_copy", "meta_tensor"]

_CONTAINERS = frozenset((dict, set, list, collections.OrderedDict))
_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device))
"""Kinds of value that lead to no module; most of what a module holds is of these."""


def copy_structure(module: nn.Module) -> nn.Module:
    """Return a copy of the module tree with the same tensors.

    Modules that stand in several places of the tree do so in the copy. Plain containers on a module (caches, lists) are
    copied one level deep; references from them, and bound methods, lead into the copy. TorchScript modules are kept.
    """
    copies: dict[int, nn.Module] = {}
    result = _copy(module, copies)
    for clone in copies.values():
        for name, value in clone.__dict__.items():
            if type(value) in _PLAIN or name in ("_modules", "_parameters", "_buffers"):
                continue
            if (redirected := _redirect(value, copies)) is not value:
                clone.__dict__[name] = redirected
    return result


def meta_copy(module: nn.Module, metas: dict[int, Tensor]) -> nn.Module:
    """Return a copy of the module tree with meta tensors; `metas` maps the id of a tensor to its stand-in.

    Raises:
        TypeError: The tree holds a TorchScript module, whose tensors cannot be replaced.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise TypeError("a TorchScript module cannot be copied onto the meta device")
    result = copy_structure(module)
    for clone in result.modules():
        registries: tuple[dict[str, Any], ...] = (clone._parameters, clone._buffers)
        for registry in registries:
            for name, tensor in registry.items():
                if tensor is not None:
                    registry[name] = meta_tensor(tensor, metas)
    return result


def meta_tensor(tensor: Tensor, metas: dict[int, Tensor]) -> Tensor:
    """Return the stand-in of `tensor` on the meta device, the same one each time."""
    if id(tensor) not in metas:
        metas[id(tensor)] = torch.empty_like(tensor, device="meta")
    return metas[id(tensor)]


def _copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    # Not the class's own __new__: that of GraphModule makes another class.
    clone: nn.Module = object.__new__(type(module))
    copies[id(module)] = clone
    for name, value in module.__dict__.items():
        is_container = type(value) in _CONTAINERS
        # A new empty container is much cheaper than a copy of one, and most registries of hooks are empty.
        clone.__dict__[name] = (value.copy() if value else type(value)()) if is_container else value
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = _copy(child, copies)
    return clone


def _redirect(value: Any, copies: dict[int, nn.Module]) -> Any:
    """Return `value` with the modules that it leads to replaced by their copies."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if not (type(value) in _CONTAINERS or type(value) is tuple) or not value:
        return value
    if type(value) is tuple and all(type(item) in _PLAIN for item in value):
        return value
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _redirect(item, copies)
        return value
    return type(value)(_redirect(item, copies) for item in value)
