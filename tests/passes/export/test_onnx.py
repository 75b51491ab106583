from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import fx

from graphprune.contract import Context
from graphprune.errors import OutputError
from graphprune.passes.export.onnx import ExportOnnx
from graphprune.program import Program
from graphprune.runtime import Session, open_session
from tests.models import tiny_residual


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return Program(
        module=fx.symbolic_trace(tiny_residual()),
        example_inputs=(torch.randn(1, 3, 16, 16),),
        dialect="fx",
        dynamic_batch=True,
        source="test",
    )


def test_it_writes_checks_and_measures(program: Program, tmp_path: Path) -> None:
    before = str(program)
    made = ExportOnnx().run(program, Context(facts={}, dense=program.clone(), out=tmp_path))
    assert made.files == (tmp_path / "model.onnx",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert made.checks["onnx"].passed
    assert made.checks["onnx"].provider == made.measurements["provider"] == "CPUExecutionProvider"
    size = (tmp_path / "model.onnx").stat().st_size
    assert made.measurements["onnx_bytes"] == made.measurements["after"]["onnx_bytes"] == size
    assert made.measurements["before"]["onnx_bytes"] == size
    assert made.measurements["before"]["latency_ms"] > 0
    assert made.measurements["after"]["latency_ms"] == made.measurements["latency_ms"] > 0
    assert made.measurements["opset"] >= 18
    assert str(program) == before


def test_without_measuring_no_figure_is_invented(program: Program, tmp_path: Path) -> None:
    made = ExportOnnx(measure=False, opset=18).run(
        program, Context(facts={}, dense=program, out=tmp_path)
    )
    assert made.measurements["latency_ms"] is None
    assert "before" not in made.measurements
    assert made.measurements["opset"] == 18


def test_a_wrong_file_falls_short(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = program.clone()
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(1.01)
    ExportOnnx(measure=False).run(other, Context(facts={}, dense=program, out=tmp_path))
    wrong = open_session(tmp_path / "model.onnx", "cpu")

    def open_wrong(path: Path, device: str) -> Session:
        return dataclasses.replace(wrong, path=path)

    monkeypatch.setattr("graphprune.passes.export.onnx.open_session", open_wrong)
    made = ExportOnnx(measure=False).run(program, Context(facts={}, dense=program, out=tmp_path))
    assert not made.checks["onnx"].passed


def test_a_cuda_context_falls_back_where_the_provider_does_not_load(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.runtime._why_no_cuda", lambda: "the driver is too old")
    context = Context(facts={}, dense=program, out=tmp_path, device="cuda:0")
    made = ExportOnnx(measure=False).run(program, context)
    assert made.measurements["provider_note"] == "CPU provider in use: the driver is too old"


def test_it_needs_a_folder(program: Program) -> None:
    with pytest.raises(OutputError, match="export-onnx expected an output folder"):
        ExportOnnx().run(program, Context(facts={}, dense=program))
