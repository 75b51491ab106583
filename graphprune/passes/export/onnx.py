"""Writes the program as an ONNX file, checks it against torch in ONNX Runtime, and measures it beside the dense one."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from graphprune.check import Check
from graphprune.contract import Artifacts, Context, Pass
from graphprune.errors import OutputError
from graphprune.files import prepare_out
from graphprune.onnx_export import export_onnx, zipped_bytes
from graphprune.parts import parts_of
from graphprune.program import Program
from graphprune.runtime import bench, open_session, parity

__all__ = ["ExportOnnx"]

_FILE = "model.onnx"

SPARSE = 0.1
"""Share of zeros from which on they are counted, and the file is zipped to see what they save."""


@dataclass(frozen=True, kw_only=True)
class ExportOnnx(Pass):
    """Export to ONNX, with parity and latency measured in ONNX Runtime.

    Writes ``model.onnx`` into the output folder, whole or not at all. The check ``onnx`` compares it with the torch
    program on three batches. Latency is that of one sample; the dense program is exported to a temporary folder and
    timed in turns with the cut one.

    Of a model that no tracer captured whole, each part that can be captured gets a file, ``model.PATH.onnx``.
    """

    name: ClassVar[str] = "export-onnx"

    opset: int | None = None
    """Version of the default operator set; None takes the exporter's own default."""
    measure: bool = True
    """Whether to export the dense program too and time both."""

    def run(self, program: Program, context: Context) -> Artifacts:
        """Write, check and measure."""
        if context.out is None:
            raise OutputError(
                f"{self.name} expected an output folder to write {_FILE} into, found none; give out="
            )
        if program.dialect == "module":
            return self._parts(program, context, context.out)
        with context.progress.task("export to ONNX", 3 if self.measure else 2) as task:
            written = export_onnx(program, prepare_out(context.out) / _FILE, opset=self.opset)
            task.advance()
            session = open_session(written.path, context.runtime_device)
            check = parity(program, session, seed=context.seed)
            task.advance()
            measurements: dict[str, Any] = {
                "onnx_bytes": written.num_bytes,
                "latency_ms": None,
                "opset": written.opset,
                "provider": session.provider,
                "provider_note": session.provider_note,
            }
            if self.measure:
                measurements |= self._side_by_side(
                    program, context, written.files, written.num_bytes
                )
                task.advance()
        return Artifacts(files=written.files, checks={"onnx": check}, measurements=measurements)

    def _parts(self, program: Program, context: Context, out: Path) -> Artifacts:
        """Write every part of a model that cannot be written whole, ``model.PATH.onnx``, and check each."""
        parts = parts_of(program)
        files: list[Path] = []
        checks: list[Check] = []
        names: dict[str, str] = {}
        with context.progress.task("export of parts to ONNX", len(parts)) as task:
            for part in parts:
                path = prepare_out(out) / f"model.{part.path}.onnx"
                written = export_onnx(part.program, path, opset=self.opset)
                files += written.files
                names[part.path] = path.name
                session = open_session(path, context.runtime_device)
                checks.append(parity(part.program, session, seed=context.seed))
                task.advance()
        size = sum(file.stat().st_size for file in files)
        measurements = {"exported_parts": names, "onnx_bytes": size, "after": {"onnx_bytes": size}}
        if not checks:
            return Artifacts(measurements=measurements)
        worst = max(checks, key=lambda c: (not c.passed, _error(c)))
        noun = "part" if len(checks) == 1 else "parts"
        detail = f"{len(checks)} {noun}; worst: {worst.detail}"
        check = dataclasses.replace(worst, detail=detail)
        return Artifacts(files=tuple(files), checks={"onnx": check}, measurements=measurements)

    def _side_by_side(
        self, program: Program, context: Context, files: tuple[Path, ...], num_bytes: int
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            dense = export_onnx(context.dense, Path(folder) / "dense.onnx", opset=self.opset)
            sparse_after = _sparsity(program, files)
            sparse_before = _sparsity(context.dense, dense.files, always=bool(sparse_after))
            inputs = program.batch(1, seed=context.seed)
            before, after = bench([dense.path, files[0]], inputs, device=context.runtime_device)
        return {
            "latency_ms": after.median_ms,
            "before": {
                "onnx_bytes": dense.num_bytes,
                "latency_ms": before.median_ms,
                **sparse_before,
            },
            "after": {
                "onnx_bytes": num_bytes,
                "latency_ms": after.median_ms,
                **sparse_after,
            },
            "latency_runs": after.runs,
        }


def _sparsity(program: Program, files: tuple[Path, ...], *, always: bool = False) -> dict[str, int]:
    """Return the parameters other than zero and the size of the zipped files, where enough are zero to matter."""
    parameters = list(program.module.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in parameters)
    if not always and nonzero > (1 - SPARSE) * sum(p.numel() for p in parameters):
        return {}
    return {"nonzero": nonzero, "onnx_zipped_bytes": zipped_bytes(files)}


def _error(check: Check) -> float:
    error = check.max_abs_err
    return math.inf if error is None else error / check.tolerance if check.tolerance else error
