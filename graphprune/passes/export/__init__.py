"""Passes that write a program for deployment and check what they wrote."""

from __future__ import annotations

from graphprune.passes.export.exported_program import ExportProgram
from graphprune.passes.export.onnx import ExportOnnx

__all__ = ["ExportOnnx", "ExportProgram"]
