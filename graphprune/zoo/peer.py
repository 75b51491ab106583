"""What Torch-Pruning makes of the same models, set up as its own examples set it up."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import VisionTransformer

from graphprune.errors import UsageError

__all__ = [
    "attempt",
    "count_parameters",
    "is_fused_attention",
    "output_shapes",
    "processor_time",
    "torch_pruning",
]


def torch_pruning(ratio: float) -> Callable[[nn.Module, Any], nn.Module]:
    """Return a function that cuts a model in place to fewer of every group's channels, by L2 magnitude.

    As in Torch-Pruning's examples for torchvision and timm: the classifier's output stays, the heads of fused queries,
    keys and values are declared, and what modules remember of widths is mended after the cut.

    Args:
        ratio: What goes of every group.

    Raises:
        UsageError: Torch-Pruning is not installed.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise UsageError("the comparison needs Torch-Pruning: pip install -e '.[bench]'") from error

    def run(model: nn.Module, example: Any) -> nn.Module:
        fused = [m for m in model.modules() if is_fused_attention(m)]
        pruner = tp.pruner.MagnitudePruner(
            model,
            example_inputs=example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=_classifiers(model),
            round_to=_multiple(model),
            num_heads={m.qkv: m.num_heads for m in fused},
            # Its defaults are dicts that every pruner of the process shares.
            in_channel_groups={},
            out_channel_groups={},
        )
        pruner.step()
        if isinstance(model, VisionTransformer):
            model.hidden_dim = model.conv_proj.out_channels
        attention: Any
        for attention in fused:
            attention.num_heads = pruner.num_heads[attention.qkv]
            attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        return model

    return run


def attempt(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], *, ratio: float, limit_s: float
) -> str:
    """Return ``runs``, and what is left of the parameters, or how Torch-Pruning fails.

    Args:
        model: Is cut in place.
        example: One batch, or the tensors of one.
        ratio: What is to go of every group.
        limit_s: Seconds of processor time after which it is given up.

    Raises:
        UsageError: Torch-Pruning is not installed.
    """
    run = torch_pruning(ratio)
    before = count_parameters(model)
    inputs = example if isinstance(example, tuple) else (example,)
    try:
        with processor_time(limit_s):
            with torch.no_grad():
                expected = output_shapes(model(*inputs))
            cut = run(model, inputs)
            with torch.no_grad():
                found = output_shapes(cut(*inputs))
    # Whatever it raises is its result on this model.
    except Exception as error:
        return f"fails: {type(error).__name__}"
    if found != expected:
        return f"fails: outputs {found} in place of {expected}"
    if count_parameters(cut) >= before:
        return "fails: nothing was cut"
    return f"runs: {count_parameters(cut) / before:.2f}"


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds` of processor time, which a busy machine does not use up."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def is_fused_attention(module: nn.Module) -> bool:
    """Return whether one layer gives queries, keys and values of several heads, as in timm."""
    is_linear = isinstance(getattr(module, "qkv", None), nn.Linear)
    return is_linear and isinstance(getattr(module, "num_heads", None), int)


def _multiple(model: nn.Module) -> int | None:
    """Return of what widths must be a multiple: its users say so for torchvision's vision transformer."""
    if not isinstance(model, VisionTransformer):
        return None
    heads: int = model.encoder.layers[0].num_heads
    return heads


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs are the model's: as many channels as there are classes."""
    classes = {1000, 400, 21}  # ImageNet, Kinetics, PASCAL VOC
    return [
        m
        for m in model.modules()
        if (isinstance(m, nn.Linear) and m.out_features in classes)
        or (isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.out_channels in classes)
    ]


def output_shapes(outputs: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a model gives, in whatever structure."""
    return [tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters())
