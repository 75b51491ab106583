"""Versions and devices: what the numbers of a report were taken with."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

__all__ = ["VERSIONED", "device_name", "environment", "version"]

VERSIONED = ("graphprune", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
"""Packages whose version decides what comes out."""


def environment(device: str) -> dict[str, str | None]:
    """Return the versions, the platform and the device as plain data."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONED},
        "platform": platform.platform(),
        "device": device,
        "device_name": device_name(device),
    }


def version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not there."""
    names = ("onnxruntime-gpu", "onnxruntime") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def device_name(device: str) -> str:
    """Return what the device calls itself."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
