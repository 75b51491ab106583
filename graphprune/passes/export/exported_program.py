"""Writes the program as a torch ExportedProgram, which loads with torch alone, and checks what it reads back."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.check import Check
from graphprune.contract import Artifacts, Context, Pass
from graphprune.errors import ExportError, OutputError
from graphprune.exported import (
    export_program,
    exporter_quiet,
    first_line,
    flat_outputs,
    without_fast_path,
)
from graphprune.files import prepare_out, write_atomic
from graphprune.program import Program, WholeModel

__all__ = ["ExportProgram"]

_FILE = "model.pt2"
_WHOLE_FILE = "model.pt"
_BATCHES = (1, 3)
# The file holds the very operators that the program runs, so every bit must come back.
_TOLERANCE = 0.0


@dataclass(frozen=True, kw_only=True)
class ExportProgram(Pass):
    """Export with torch.export, save, reload, and compare bit for bit.

    Writes ``model.pt2`` into the output folder, whole or not at all; equal programs give equal bytes. The check
    ``exported_program`` runs the reloaded file and the program on the same inputs.

    A model that no tracer captured whole is pickled as it is, into ``model.pt``: to load that takes its class.
    """

    name: ClassVar[str] = "export-program"

    def run(self, program: Program, context: Context) -> Artifacts:
        """Write, reload and compare."""
        if context.out is None:
            raise OutputError(
                f"{self.name} expected an output folder to write {_FILE} into, found none; give out="
            )
        if program.dialect == "module":
            return _whole(program, prepare_out(context.out) / _WHOLE_FILE)
        path = prepare_out(context.out) / _FILE
        with context.progress.task("export with torch.export", 2) as task:
            content = _saved(program)
            with write_atomic(path) as temporary:
                temporary.write_bytes(content)
            task.advance()
            with exporter_quiet():
                reloaded = torch.export.load(path)
            check = _compare(program, reloaded.module(), seed=context.seed)
            task.advance()
        return Artifacts(
            files=(path,),
            checks={"exported_program": check},
            measurements={"exported_bytes": len(content)},
        )


def _whole(program: Program, path: Path) -> Artifacts:
    """Pickle a model that runs whole, of its own class, read it back and compare."""
    bound = program.module.get_submodule(WholeModel.CHILD)
    model = bound if program.calling is None else program.calling.release(bound)
    buffer = io.BytesIO()
    try:
        torch.save(model, buffer)
    # A class that is made inside a function has no name to be found under; pickle has many words for it.
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = f"the model's class cannot be pickled: {first_line(error)}"
        return Artifacts(measurements={"not_written": {_WHOLE_FILE: reason}})
    with write_atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    reloaded: torch.nn.Module = torch.load(path, weights_only=False)
    run = reloaded if program.calling is None else program.calling.bind(reloaded)
    with torch.no_grad():
        expected, found = (
            flat_outputs(m(*(t.clone() for t in program.example_inputs))) for m in (bound, run)
        )
    same = len(expected) == len(found) and all(map(torch.equal, expected, found))
    detail = "the example inputs, bit for bit" if same else "the reloaded model's outputs differ"
    check = Check(
        max_abs_err=0.0 if same else None, tolerance=_TOLERANCE, passed=same, detail=detail
    )
    size = len(buffer.getvalue())
    return Artifacts(
        files=(path,), checks={"exported_program": check}, measurements={"exported_bytes": size}
    )


def _saved(program: Program) -> bytes:
    exported = export_program(program)
    # Saved into memory: the archive takes its inner name from the file's, and a temporary file's name is random.
    buffer = io.BytesIO()
    try:
        with exporter_quiet():
            torch.export.save(exported, buffer)
    except Exception as error:
        raise ExportError(
            f"torch.export.save refused {program.source}: {first_line(error)}"
        ) from error
    return buffer.getvalue()


def _compare(program: Program, reloaded: torch.nn.Module, *, seed: int) -> Check:
    worst = 0.0
    problem = ""
    for index, size in enumerate(_BATCHES):
        inputs = program.batch(size, seed=seed + index)
        with torch.no_grad(), without_fast_path():
            expected, found = flat_outputs(program.module(*inputs)), flat_outputs(reloaded(*inputs))
        if [t.shape for t in expected] != [t.shape for t in found]:
            problem = f"batch {size}: the outputs' shapes differ"
            return Check(max_abs_err=None, tolerance=_TOLERANCE, passed=False, detail=problem)
        for want, got in zip(expected, found, strict=True):
            if not torch.equal(want, got):
                problem = problem or f"batch {size}: the reloaded file's outputs differ"
                worst = max(worst, _difference(want, got))
    compared = (
        "batches of " + " and ".join(map(str, _BATCHES)) if program.dynamic_batch else "two inputs"
    )
    return Check(
        max_abs_err=worst,
        tolerance=_TOLERANCE,
        passed=not problem,
        detail=problem or f"{compared}, bit for bit",
    )


def _difference(want: Tensor, got: Tensor) -> float:
    difference = (want.double() - got.double()).abs().max().item()
    return difference if difference == difference else float("inf")
