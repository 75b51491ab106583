"""What this machine has: versions, devices, ONNX Runtime providers, extras."""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from pathlib import Path

import onnxruntime
import torch

from graphprune.environment import VERSIONED, device_name, version

__all__ = ["EXTRAS", "diagnose"]

EXTRAS = {
    "demo": ("sklearn",),
    "tensorboard": ("tensorboard",),
    "timm": ("timm",),
    "transformers": ("transformers",),
    "bench": ("torch_pruning", "timm"),
    "test": ("pytest", "hypothesis", "expecttest", "xdist"),
}
"""Modules that show whether an extra is installed."""


def diagnose() -> dict[str, dict[str, str | None]]:
    """Return section -> name -> finding; None: not installed."""
    return {
        "versions": {"python": platform.python_version(), **{n: version(n) for n in VERSIONED}},
        "devices": _devices(),
        "ONNX Runtime": _onnxruntime(),
        "extras": {extra: _extra(modules) for extra, modules in EXTRAS.items()},
    }


def _devices() -> dict[str, str | None]:
    devices: dict[str, str | None] = {
        "platform": platform.platform(),
        "cpu": f"{device_name('cpu')}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.cuda.device_count() == 0:
        devices["cuda"] = "torch sees no CUDA device"
    return devices


def _onnxruntime() -> dict[str, str | None]:
    """Open a session on a model of one node: a provider that is built in may still fail to load."""
    from graphprune.runtime import open_session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "identity.onnx"
        _write_identity(path)
        session = open_session(path, device="auto")
        return {
            "built with": ", ".join(onnxruntime.get_available_providers()),
            "used": session.provider,
            "note": session.provider_note or "none",
        }


def _write_identity(path: Path) -> None:
    from onnx import TensorProto, helper, save

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    save(model, path)


def _extra(modules: tuple[str, ...]) -> str | None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return "installed"
    return None if len(missing) == len(modules) else f"incomplete: {', '.join(missing)} missing"
