"""The timm suite: one model of every file of ``timm.models`` that registers any, fixed in ``timm_table.json``.

`choose` says which: the model with the fewest parameters (by name where several have as few; timm's own ``test_``
models are left out), at the smallest square input that it takes. ``tools/choose_timm_models`` writes the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import UsageError

__all__ = ["TABLE", "build", "choose", "entries", "families"]

TABLE = Path(__file__).with_name("timm_table.json")
"""Family -> model, parameters, input side, options; and the version of timm that was asked."""
SIDES = (96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 768, 896, 1024)
"""Sides of the input that are tried, in this order."""


def entries() -> Mapping[str, Mapping[str, Any]]:
    """Return the table: family -> ``model``, ``parameters``, ``side``, ``options``."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    families_: dict[str, Mapping[str, Any]] = table["families"]
    return families_


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            "the suite timm needs the package timm, which is not installed: pip install 'graphprune[timm]'"
        ) from error
    return timm


def build(name: str, **options: Any) -> nn.Module:
    """Return a model of timm with fresh weights."""
    model: nn.Module = _timm().create_model(name, pretrained=False, **options)
    return model


def families() -> dict[str, list[str]]:
    """Return the files of ``timm.models`` that register models, and the names in each, without test models."""
    timm = _timm()
    found = {
        module: sorted(n for n in timm.list_models(module=module) if not n.startswith("test_"))
        for module in sorted({_module_of(name) for name in timm.list_models()})
    }
    return {module: names for module, names in found.items() if names}


def _module_of(name: str) -> str:
    module: str = _timm().model_entrypoint(name).__module__
    return module.rpartition(".")[2]


def choose(names: Iterable[str]) -> dict[str, Any]:
    """Return the entry of a family: its smallest model, and the smallest input that this model takes."""
    sizes = {name: _parameters(name) for name in names}
    name = min(sizes, key=lambda n: (sizes[n], n))
    side, options = _input(name)
    return {"model": name, "parameters": sizes[name], "side": side, "options": options}


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(name).parameters())


def _input(name: str) -> tuple[int, dict[str, Any]]:
    """Return the smallest side at which a model runs on two samples, and what its constructor is told of it.

    Shapes say enough, without values or time; a few models compute with values, and run on zeros.
    """
    with torch.device("meta"):
        config: Any = build(name).pretrained_cfg
    natural = config["input_size"][-1]
    for device in ("meta", "cpu"):
        for side in sorted({*(s for s in SIDES if s < natural), natural}):
            for options in ({"img_size": side}, {}):
                try:
                    with torch.device(device), torch.no_grad():
                        build(name, **options).eval()(torch.zeros(2, 3, side, side))
                # Whatever a model raises says that it does not take this size, or no such option.
                except Exception:
                    continue
                return side, options
    raise UsageError(f"timm's {name} takes no square input of up to {natural} pixels")
