from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune import onnx_export
from graphprune.errors import ExportError
from graphprune.onnx_export import export_onnx
from graphprune.program import Program
from graphprune.runtime import open_session, parity
from tests.models import tiny_residual

_ROOT = Path(__file__).resolve().parents[1]


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, out: Tensor, other: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        y = self.linear(out)
        return {"out": y, "pair": (y + other, y * other), "2nd": y - other}


def _program(module: nn.Module, *shapes: tuple[int, ...]) -> Program:
    return Program(
        module=fx.symbolic_trace(module.eval()),
        example_inputs=tuple(torch.randn(shape) for shape in shapes),
        dialect="fx",
        dynamic_batch=True,
        source="test",
    )


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return _program(tiny_residual(), (1, 3, 16, 16))


def test_the_file_is_right_and_says_what_it_is(
    program: Program, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = export_onnx(program, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert written.files == (tmp_path / "model.onnx",)
    assert written.num_bytes == written.path.stat().st_size
    assert written.outputs == ("output",)
    model = onnx.load(written.path)
    assert written.opset == model.opset_import[0].version >= 18
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert (
        batch.dim_param == model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    )
    assert parity(program, open_session(written.path, "cpu")).passed


def test_equal_programs_give_equal_bytes_without_paths(program: Program, tmp_path: Path) -> None:
    first = export_onnx(program, tmp_path / "a.onnx").path.read_bytes()
    assert export_onnx(program.clone(), tmp_path / "b.onnx").path.read_bytes() == first
    for path in (str(_ROOT), sys.prefix, "site-packages", ".py"):
        assert path.encode() not in first


_SCRIPT = """
import sys, torch
from torch import fx
from graphprune.onnx_export import export_onnx
from graphprune.program import Program
from tests.models import tiny_residual
torch.manual_seed(0)
program = Program(module=fx.symbolic_trace(tiny_residual()), example_inputs=(torch.randn(1, 3, 16, 16),),
                  dialect="fx", dynamic_batch=True, source="test")
export_onnx(program, sys.argv[1])
"""


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(tmp_path / f"{seed}.onnx")],
            check=True,
            cwd=_ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        )
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_outputs_take_the_names_of_their_places(tmp_path: Path) -> None:
    program = _program(_Named(), (2, 4), (2, 4))
    written = export_onnx(program, tmp_path / "named.onnx")
    assert written.inputs == ("out", "other")
    assert written.outputs == ("output_out", "pair_0", "pair_1", "output_2nd")
    assert parity(program, open_session(written.path, "cpu")).passed


def test_where_the_exporters_optimizer_breaks_the_graph_it_is_left_out(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.onnx.export
    asked = []

    def broken(*arguments: Any, optimize: bool, **options: Any) -> Any:
        asked.append(optimize)
        converted = export(*arguments, optimize=optimize, **options)
        assert converted is not None
        if optimize:  # a node that reads what no other gives
            node = next(n for n in converted.model.graph if n.op_type == "Relu")
            node.replace_input_with(0, ir.Value(name="nowhere"))
        return converted

    monkeypatch.setattr(torch.onnx, "export", broken)
    written = export_onnx(program, tmp_path / "model.onnx")
    assert asked == [True, False]
    assert parity(program, open_session(written.path, "cpu")).passed


def _assert_parity(program: Program, path: Path) -> None:
    export_onnx(program, path)
    check = parity(program, open_session(path, device="cpu"))
    assert check.passed, check.detail


class _Windows(nn.Module):
    """Attention in windows: five dimensions, with each kind of mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(6, 24)
        self.bias = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, 5, 4, 6).transpose(2, 3).split(2, -1)
        masks: dict[str, dict[str, Any]] = {
            "none": {},
            "causal": {"is_causal": True},
            "float": {"attn_mask": self.bias},
            "bool": {"attn_mask": self.bias.detach().abs().argsort(1) < 4},
            "grouped": {"enable_gqa": True},
        }
        if self.kind == "grouped":
            k, v = k[..., :2, :, :], v[..., :2, :, :]
        y: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, **masks[self.kind])
        return y.transpose(2, 3).flatten(3)


@pytest.mark.parametrize("kind", ["none", "causal", "float", "bool", "grouped"])
def test_attention_of_any_number_of_dimensions(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = gp.capture(_Windows(kind).eval(), torch.randn(2, 3, 5, 6))
    written = export_onnx(program, tmp_path / "model.onnx")
    assert parity(program, open_session(written.path, "cpu")).passed


class _Groups(nn.Module):
    """Rows that are sorted into groups; each group has a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(5, 8, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        group = x[:, 0].mul(2).round().clamp(0, 3)  # none is in the last
        order = group.argsort(stable=True)
        counts = torch.histc(group, 5, 0, 4)
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x[order], self.matrices, offs=ends), counts


def test_products_of_groups_and_counts(tmp_path: Path) -> None:
    program = gp.capture(_Groups().eval(), torch.randn(6, 8))
    session = open_session(export_onnx(program, tmp_path / "model.onnx").path)
    assert parity(program, session).passed


@pytest.mark.parametrize(("low", "high", "bins"), [(-1.0, 1.0, 4), (0.25, 0.5, 3), (0.0, 0.0, 5)])
def test_histograms(low: float, high: float, bins: int, tmp_path: Path) -> None:
    class Histogram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.histc(x, bins, low, high)

    program = gp.capture(Histogram(), torch.randn(64))
    session = open_session(export_onnx(program, tmp_path / "model.onnx").path)
    values = torch.cat([torch.randn(61), torch.tensor([low, high, (low + high) / 2])])
    torch.testing.assert_close(session.run(values)[0], program.module(values))


def test_another_opset(program: Program, tmp_path: Path) -> None:
    assert export_onnx(program, tmp_path / "model.onnx", opset=18).opset == 18


def test_a_large_model_gets_a_file_of_weights(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_SINGLE_FILE_BYTES", 100)
    written = export_onnx(program, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert written.weights == tmp_path / "model.onnx.data"
    assert written.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert parity(program, open_session(written.path, "cpu")).passed
    monkeypatch.undo()
    export_onnx(program, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_refusal_leaves_no_file(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("\nno such thing\nmore")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"onnx's checker refused model.onnx: no such thing$"):
        export_onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_refuses_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("cannot do that\nlong story")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    program = _program(nn.ReLU(), (2, 4))
    with pytest.raises(
        ExportError, match=r"ONNX exporter refused test \(opset default\): cannot do that$"
    ):
        export_onnx(program, tmp_path / "model.onnx")


class _Attention(nn.Module):
    """As BEiT's: with a bias that is looked up in a table."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(10, 36), nn.Linear(12, 10)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("index", torch.randint(9, (7, 7)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 7, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(7, 7, 4).permute(2, 0, 1).unsqueeze(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous())
        out: Tensor = self.out(y.transpose(1, 2).reshape(x.shape[0], 7, 12))
        return out


def test_attention_whose_kernel_and_decomposition_differ_in_strides(tmp_path: Path) -> None:
    program = _program(_Attention(), (2, 7, 10))
    _assert_parity(program, tmp_path / "model.onnx")


class _Rotary(nn.Module):
    """Positions as complex numbers, as in Llama 4 and DeepSeek; every movement of them that has a rewriting."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(10, 48), nn.Linear(16, 10)
        angles = torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("turns", torch.view_as_real(torch.polar(torch.ones(7, 2), angles)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 7, 3, 4, 4).unbind(2)
        turns = torch.view_as_complex(self.turns)
        q, k = (self.turned(t, turns).transpose(1, 2) for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        out: Tensor = self.out(y.transpose(1, 2).reshape(-1, 7, 16))
        return out

    def turned(self, t: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.reshape(-1, 7, 4, 2, 2))
        first = turns.unsqueeze(-2).expand(7, 4, 2) * turns.select(-2, 1)
        return torch.view_as_real(pairs * first.unsqueeze(0)).flatten(3)


def test_movements_of_complex_numbers_beside_attention(tmp_path: Path) -> None:
    program = _program(_Rotary(), (2, 7, 10))
    _assert_parity(program, tmp_path / "model.onnx")


class _Bordered(nn.Module):
    """As BiT's: a border of zeros, and a maximum over it."""

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(-x.abs(), (1, 1, 1, 1))
        return nn.functional.max_pool2d(padded, 3, 2)


def test_a_border_of_zeros_is_not_taken_for_one_of_a_maximum(tmp_path: Path) -> None:
    program = _program(_Bordered(), (2, 3, 8, 8))
    _assert_parity(program, tmp_path / "model.onnx")
