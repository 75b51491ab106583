"""The models of the zoo: torchvision's lists and timm's families, each with a small input that shows it all.

Small inputs save hours and change nothing that matters here: which channels are coupled does not depend on them.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import UsageError
from graphprune.zoo import timm_table

__all__ = ["FAST", "SUITES", "ZooModel", "select", "timm_models", "torchvision_models", "vary"]

Kind = Literal["classification", "segmentation", "video", "optical-flow", "transformers"]
Library = Literal["torchvision", "timm", "transformers"]

FAST = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "lraspp_mobilenet_v3_large",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "r3d_18",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
)
"""One model, the smallest, of every family that differs in how its channels are coupled."""


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A public model, and how to build it with random weights."""

    name: str
    """Its name in its library."""
    kind: Kind
    shape: tuple[int, ...]
    """One sample: channels, (frames,) height, width."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What its constructor gets besides the wish for random weights."""
    library: Library = "torchvision"
    family: str = ""
    """The file of ``timm.models`` that defines it."""
    outputs: tuple[str, ...] = ()
    """The outputs that count; empty: all."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """What a table asks about -> the parameter dimension, ``name[dim]``, that shows whether it can go."""

    @property
    def input_text(self) -> str:
        """The shape of one sample as text, ``3x64x64``."""
        return "x".join(map(str, self.shape))

    def build(self, *, seed: int = 0) -> nn.Module:
        """Return the model with random weights, in evaluation mode; no tensor is constant."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = _BUILDERS[self.library](self.name, **self.options)
            vary(model)
            _calibrate(model.eval(), self.example(batch=_CALIBRATION_BATCH, seed=seed))
        return model

    def example(self, *, batch: int = 1, seed: int = 0) -> Any:
        """Return standard normal inputs; for optical flow the two images, between which things move."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "optical-flow":
            return tuple(torch.randn(batch, *self.shape, generator=generator) for _ in range(2))
        return torch.randn(batch, *self.shape, generator=generator)


def vary(model: nn.Module) -> None:
    """Make constant parameters and buffers vary: a slice of the wrong channels would not show in them.

    Fresh models hold many: batch norms at 0 and 1, biases at 0, whole classifiers at 0.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            low, high = tensor.aminmax()
            if low != high:
                continue
            if low == 0:
                tensor.normal_(std=0.02)
            else:
                tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5))


def _calibrate(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> None:
    """Give batch norms the statistics of `example`.

    With any others, half the channels of a deep fresh model are zero wherever one looks: a wrong cut of them would not
    show.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(*example) if isinstance(example, tuple) else model(example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


_CALIBRATION_BATCH = 4

_BUILDERS: Mapping[Library, Callable[..., nn.Module]] = {
    "torchvision": functools.partial(tv.get_model, weights=None),
    "timm": timm_table.build,
}

_LISTS: Mapping[Kind, ModuleType] = {
    "classification": tv,
    "segmentation": tv.segmentation,
    "video": tv.video,
    "optical-flow": tv.optical_flow,
}

_DEFAULTS: Mapping[Kind, tuple[tuple[int, ...], Mapping[str, Any]]] = {
    "classification": ((3, 64, 64), {}),
    "segmentation": ((3, 64, 64), {"weights_backbone": None}),
    "video": ((3, 8, 56, 56), {}),
    "optical-flow": ((3, 128, 128), {}),  # an eighth of it is pooled four times
}

# The longest prefix of a name decides. Windows of 7 want sides that they do not divide, of more than one window.
_SPECIAL: Mapping[str, tuple[tuple[int, ...], Mapping[str, Any]]] = {
    "googlenet": ((3, 64, 64), {"aux_logits": False, "init_weights": True}),
    "inception": ((3, 128, 128), {"aux_logits": False, "init_weights": True}),
    "maxvit": ((3, 224, 224), {}),  # its grids must divide by 7 in every stage
    "mvit": ((3, 16, 224, 224), {}),  # its constructors take no other size
    "s3d": ((3, 14, 224, 224), {}),  # ends in a pooling window of 2x7x7
    "swin": ((3, 128, 128), {}),
    "swin3d": ((3, 8, 64, 64), {}),
    "vit": ((3, 64, 64), {"image_size": 64}),
    "vit_h_14": ((3, 56, 56), {"image_size": 56}),
}


def torchvision_models() -> tuple[ZooModel, ...]:
    """Return every model of torchvision but for detectors, in the order of its own lists."""
    return tuple(
        _model(name, kind) for kind, module in _LISTS.items() for name in tv.list_models(module)
    )


def _model(name: str, kind: Kind) -> ZooModel:
    prefix = max((p for p in _SPECIAL if name.startswith(p)), key=len, default="")
    shape, options = _SPECIAL.get(prefix, _DEFAULTS[kind])
    return ZooModel(name=name, kind=kind, shape=shape, options=options)


def timm_models() -> tuple[ZooModel, ...]:
    """Return one model of every file of ``timm.models``, in the order of the files."""
    return tuple(
        ZooModel(
            name=entry["model"],
            kind="classification",
            shape=(3, entry["side"], entry["side"]),
            options=entry["options"],
            library="timm",
            family=family,
        )
        for family, entry in timm_table.entries().items()
    )


def _transformers_models() -> tuple[ZooModel, ...]:
    from graphprune.zoo.transformers import transformers_models

    return transformers_models()


def _more_transformers_models() -> tuple[ZooModel, ...]:
    from graphprune.zoo.more_transformers import more_transformers_models

    return more_transformers_models()


SUITES: Mapping[str, Callable[[], tuple[ZooModel, ...]]] = {
    "torchvision": torchvision_models,
    "fast": lambda: select(torchvision_models(), FAST),
    "timm": timm_models,
    "transformers": _transformers_models,
    "more-transformers": _more_transformers_models,
}
"""Name of a suite -> its models."""


def select(models: Sequence[ZooModel], names: Sequence[str]) -> tuple[ZooModel, ...]:
    """Return the models of these names, in the order of `models`.

    Raises:
        UsageError: A name is not among them; the message offers close ones.
    """
    known = [m.name for m in models]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise UsageError(
                f"expected names of the suite's {len(known)} models, found {name!r}{hint}"
            )
    return tuple(m for m in models if m.name in names)
