from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from graphprune.contract import Context
from graphprune.errors import ExportError, OutputError
from graphprune.passes.export.exported_program import ExportProgram
from graphprune.program import Program
from tests.models import tiny_residual, tiny_transformer

_LOAD_WITH_TORCH_ALONE = """
import sys
for name in ("torchvision", "graphprune", "tests", "timm"):
    sys.modules[name] = None
import torch
module = torch.export.load(sys.argv[1]).module()
print(tuple(module(torch.zeros(3, 3, 16, 16)).shape))
"""


def _program(dialect: str = "fx") -> Program:
    torch.manual_seed(0)
    module = tiny_residual()
    inputs = (torch.randn(2, 3, 16, 16),)
    if dialect == "fx":
        graph = fx.symbolic_trace(module)
        return Program(
            module=graph, example_inputs=inputs, dialect="fx", dynamic_batch=True, source="test"
        )
    shapes = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(module, inputs, dynamic_shapes=shapes).module(check_guards=False)
    return Program(
        module=graph, example_inputs=inputs, dialect="export", dynamic_batch=True, source="test"
    )


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_every_bit_comes_back(dialect: str, tmp_path: Path) -> None:
    program = _program(dialect)
    made = ExportProgram().run(program, Context(facts={}, dense=program, out=tmp_path))
    check = made.checks["exported_program"]
    assert (check.passed, check.max_abs_err, check.tolerance) == (True, 0.0, 0.0)
    assert check.detail == "batches of 1 and 3, bit for bit"
    assert made.files == (tmp_path / "model.pt2",)
    assert made.measurements["exported_bytes"] == (tmp_path / "model.pt2").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_attention_comes_back_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tiny_transformer()
    inputs = (torch.randn(2, 3, 16, 16),)
    graph = torch.export.export(module, inputs, dynamic_shapes=({0: torch.export.Dim("batch")},))
    program = Program(
        module=graph.module(check_guards=False),
        example_inputs=inputs,
        dialect="export",
        dynamic_batch=True,
        source="test",
    )
    made = ExportProgram().run(program, Context(facts={}, dense=program, out=tmp_path))
    assert made.checks["exported_program"].passed


def test_equal_programs_give_equal_bytes_without_paths(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        program = _program()
        ExportProgram().run(program, Context(facts={}, dense=program, out=tmp_path / name))
        contents.append((tmp_path / name / "model.pt2").read_bytes())
    assert contents[0] == contents[1]
    for path in (str(Path(__file__).parents[3]), sys.prefix, "site-packages"):
        assert path.encode() not in contents[0]


def test_torch_alone_loads_and_runs_it(tmp_path: Path) -> None:
    program = _program()
    ExportProgram().run(program, Context(facts={}, dense=program, out=tmp_path))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        _LOAD_WITH_TORCH_ALONE,
        str(tmp_path / "model.pt2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    classes = program.module(torch.zeros(3, 3, 16, 16)).shape[1]
    assert done.stdout.strip() == f"(3, {classes})"


def test_a_wrong_bit_falls_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program()
    other = program.clone()
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.001)
    ExportProgram().run(other, Context(facts={}, dense=other, out=tmp_path))
    wrong = torch.export.load(tmp_path / "model.pt2")
    monkeypatch.setattr(torch.export, "load", lambda _: wrong)
    check = (
        ExportProgram()
        .run(program, Context(facts={}, dense=program, out=tmp_path))
        .checks["exported_program"]
    )
    assert not check.passed
    assert check.max_abs_err is not None
    assert check.max_abs_err > 0
    assert check.detail == "batch 1: the reloaded file's outputs differ"


def test_a_refusal_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(exported: object, buffer: io.BytesIO) -> None:
        buffer.write(b"half")
        raise RuntimeError("cannot write that")

    monkeypatch.setattr(torch.export, "save", refuse)
    program = _program()
    with pytest.raises(ExportError, match="torch.export.save refused test: cannot write that"):
        ExportProgram().run(program, Context(facts={}, dense=program, out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_it_needs_a_folder() -> None:
    program = _program()
    with pytest.raises(OutputError, match="export-program expected an output folder"):
        ExportProgram().run(program, Context(facts={}, dense=program))
