"""What modules remember of their sizes: one row per kind of module.

To teach graphprune a module, add a function under ``@attributes_of(Kind)`` that returns the attributes whose
values follow from the module's cut tensors and the shapes of its input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from graphprune.cut.shapes import Shapes
from graphprune.errors import AnalysisError
from graphprune.labels.trace import ModuleCall, TensorInfo
from graphprune.program import WholeModel

__all__ = ["attributes_of", "update_attributes"]

Attributes = Mapping[str, Any]
Rule = Callable[[Any, Shapes, TensorInfo, TensorInfo], Attributes]
_RULES: dict[type[nn.Module], Rule] = {}
_GATES = {"LSTM": 4, "GRU": 3}


def attributes_of(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule: (module with cut tensors, shapes, its input, its output) -> attribute values."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def update_attributes(
    graph: fx.Graph,
    modules: Mapping[str, Any],
    shapes: Shapes,
    calls: Sequence[ModuleCall] = (),
) -> dict[str, dict[str, Any]]:
    """Write the new sizes into the modules that `graph` calls, and return what changed.

    Args:
        graph: The graph.
        modules: What it calls, by name.
        shapes: What tensors become.
        calls: Where `graph` calls a model whole: the calls inside.

    Raises:
        AnalysisError: A module whose tensors were cut is of a kind that has no rule.
    """
    changes: dict[str, dict[str, Any]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not node.args:
            continue
        before, after = shapes.info(node.args[0]), shapes.first(node)
        if before is None or after is None or not shapes.touched(node):
            continue
        target = modules[str(node.target)]
        for name, value in _values(target, str(node.target), shapes, before, after).items():
            if getattr(target, name) != value:
                setattr(target, name, value)
                changes.setdefault(str(node.target), {})[name] = value
    for call in calls:
        after = call.after if isinstance(call.after, TensorInfo) else None
        target = modules[WholeModel.CHILD].get_submodule(call.path)
        if call.before is None or after is None or isinstance(target, nn.ModuleDict):
            continue
        has_rule = any(kind in _RULES for kind in type(target).__mro__)
        if not has_rule or not (shapes.changed(call.before) or shapes.changed(after)):
            continue
        for name, value in _values(target, call.path, shapes, call.before, after).items():
            if getattr(target, name) != value:
                setattr(target, name, value)
                changes.setdefault(call.path, {})[name] = value
    return changes


def _values(
    target: nn.Module, path: str, shapes: Shapes, before: TensorInfo, after: TensorInfo
) -> Attributes:
    for kind in type(target).__mro__:
        if kind in _RULES:
            return _RULES[kind](target, shapes, before, after)
    if any(True for _ in target.parameters(recurse=False)):
        raise AnalysisError(
            f"module {path} is a {type(target).__name__}, whose parameters were cut, but no rule says which of its "
            "attributes hold sizes. Register one with graphprune.cut.attributes.attributes_of."
        )
    return {}


@attributes_of(_ConvNd)
def _convolution(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    channel = len(before.shape) - len(module.kernel_size) - 1
    ins, outs = shapes.size(before, channel), shapes.size(after, channel)
    if module.transposed:
        groups = module.groups if module.groups == 1 else max(1, outs // module.weight.shape[1])
    else:
        groups = module.groups if module.groups == 1 else max(1, ins // module.weight.shape[1])
    return {"in_channels": ins, "out_channels": outs, "groups": groups}


@attributes_of(nn.Linear)
def _linear(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    outs, ins = module.weight.shape
    return {"in_features": ins, "out_features": outs}


@attributes_of(_NormBase)
def _batch_norm(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    return {"num_features": shapes.size(before, min(1, len(before.shape) - 1))}


@attributes_of(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    count = len(module.normalized_shape)
    return {"normalized_shape": shapes.shape(before)[len(before.shape) - count :]}


@attributes_of(nn.GroupNorm)
def _group_norm(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    channels = shapes.size(before, 1)
    groups = channels if module.num_groups == before.shape[1] else module.num_groups
    return {"num_channels": channels, "num_groups": groups}


@attributes_of(nn.PReLU)
def _prelu(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    return {"num_parameters": module.weight.shape[0]}


@attributes_of(nn.RNNBase)
def _recurrent(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    sizes = {"input_size": module.weight_ih_l0.shape[1]}
    sizes["hidden_size"] = len(module.weight_hh_l0) // _GATES.get(module.mode, 1)
    if module.proj_size:
        sizes["proj_size"] = len(module.weight_hr_l0)
    return sizes


@attributes_of(nn.RNNCellBase)
def _cell(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}


@attributes_of(nn.Bilinear)
def _bilinear(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    outs, first, second = module.weight.shape
    return {"out_features": outs, "in1_features": first, "in2_features": second}


@attributes_of(nn.Embedding, nn.EmbeddingBag)
def _embedding(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    return {"embedding_dim": module.weight.shape[1]}


@attributes_of(nn.Unflatten)
def _unflatten(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    dim = module.dim % len(before.shape)
    sizes = shapes.shape(after)[dim : dim + len(module.unflattened_size)]
    return {"unflattened_size": tuple(sizes)}


@attributes_of(nn.modules.padding._ConstantPadNd)
def _constant_pad(module: Any, shapes: Shapes, before: TensorInfo, after: TensorInfo) -> Attributes:
    from graphprune.cut.literals import pad_widths

    return {"padding": tuple(pad_widths(shapes, before, after, list(module.padding)))}
