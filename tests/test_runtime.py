from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from graphprune import runtime
from graphprune.check import Check
from graphprune.errors import ExportError, InputError, UsageError
from graphprune.onnx_export import export_onnx
from graphprune.program import Program
from graphprune.runtime import Session, bench, open_session, parity, random_inputs


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"logits": y, "gate": torch.sigmoid(y) * 3}


def _program(module: nn.Module, *, dynamic_batch: bool = True) -> Program:
    return Program(
        module=fx.symbolic_trace(module.eval()),
        example_inputs=(torch.randn(3, 6),),
        dialect="fx",
        dynamic_batch=dynamic_batch,
        source="test",
    )


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return _program(_Net())


@pytest.fixture(scope="module")
def session(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Session:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(program, path)
    return open_session(path, "cpu")


def _changed(program: Program, change: float) -> Program:
    clone = program.clone()
    with torch.no_grad():
        clone.module.get_parameter("linear.bias")[0] += change
    return clone


def test_a_session_says_what_it_takes_and_who_computes(session: Session) -> None:
    assert session.provider == "CPUExecutionProvider"
    assert session.provider_note.startswith("CPU provider in use: ")
    assert "\n" not in session.provider_note
    assert session.input_shapes == ((None, 6),)
    assert session.input_dtypes == (torch.float32,)
    assert session.output_names == ("logits", "gate")


def test_why_cuda_is_not_used_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_why_no_cuda", lambda: "torch finds no CUDA device")
    assert (
        open_session(session.path).provider_note
        == "CPU provider in use: torch finds no CUDA device"
    )
    with pytest.raises(
        ExportError, match="device 'cuda' was asked for, but torch finds no CUDA device"
    ):
        open_session(session.path, "cuda")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine where the CUDA provider cannot load"
)
def test_a_cuda_provider_that_fails_to_load_leaves_the_cpu(
    session: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "_why_no_cuda", lambda: "")
    opened = open_session(session.path)
    assert opened.provider == "CPUExecutionProvider"
    assert "failed to load" in opened.provider_note
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda_is_used_where_it_loads(program: Program, session: Session) -> None:
    opened = open_session(session.path)
    assert opened.provider == "CUDAExecutionProvider"
    assert parity(program, opened).passed


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected an ONNX file, found nothing at"):
        open_session(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="ONNX Runtime cannot load .*broken.onnx"):
        open_session(tmp_path / "broken.onnx")
    with pytest.raises(UsageError, match="expected device auto, cpu, cuda or cuda:N, found 'tpu'"):
        open_session(tmp_path / "absent.onnx", "tpu")


def test_inputs_that_do_not_fit(session: Session) -> None:
    with pytest.raises(InputError, match="takes 1 inputs, found 2"):
        session.run(torch.zeros(1, 6), torch.zeros(1, 6))
    with pytest.raises(InputError, match=r"net.onnx takes .*found \{'x': \[1, 5\]\}"):
        session.run(torch.zeros(1, 5))


def test_random_inputs_fill_free_sizes(session: Session) -> None:
    (made,) = random_inputs(session, batch=5)
    assert made.shape == (5, 6)
    assert len(session.run(made)) == 2


def test_parity_holds_on_three_batches(program: Program, session: Session) -> None:
    check = parity(program, session)
    assert check.passed
    assert check.max_abs_err is not None
    assert 0 <= check.max_abs_err < check.tolerance
    assert (check.detail, check.provider) == ("batches of 1, 2, 5", "CPUExecutionProvider")


def test_parity_fails_on_a_wrong_value(program: Program, session: Session) -> None:
    check = parity(_changed(program, 1e-2), session)
    assert not check.passed
    assert check.max_abs_err == pytest.approx(1e-2, rel=1e-2)
    assert "exceeds" in check.detail


def test_parity_of_faint_outputs_is_relative(tmp_path: Path) -> None:
    module = _Net()
    with torch.no_grad():
        module.linear.weight.mul_(1e-9)
        module.linear.bias.mul_(1e-9)
    module_only_logits = nn.Sequential(module.linear)
    faint = _program(module_only_logits)
    export_onnx(faint, tmp_path / "faint.onnx")
    session = open_session(tmp_path / "faint.onnx", "cpu")
    assert parity(faint, session).passed
    twice = faint.map_floating(lambda t: t * 2)
    assert not parity(twice, session).passed


def test_parity_fails_on_what_is_not_finite(program: Program, session: Session) -> None:
    check = parity(_changed(program, float("nan")), session)
    assert not check.passed
    assert "output logits of torch is not finite" in check.detail


def test_parity_fails_on_dead_outputs(tmp_path: Path) -> None:
    linear = nn.Linear(6, 4)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    dead = _program(nn.Sequential(linear))
    export_onnx(dead, tmp_path / "dead.onnx")
    check = parity(dead, open_session(tmp_path / "dead.onnx", "cpu"))
    assert not check.passed
    assert check.detail == "every output of torch is 0: nothing was compared"


def test_parity_fails_on_other_shapes(session: Session) -> None:
    class Narrow(_Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {key: value[:, :3] for key, value in super().forward(x).items()}

    check = parity(_program(Narrow()), session)
    assert not check.passed
    assert check.max_abs_err is None
    assert "ONNX Runtime [(1, 4), (1, 4)]" in check.detail


def test_parity_of_a_fixed_batch_takes_several_inputs(program: Program, tmp_path: Path) -> None:
    fixed = dataclasses.replace(program, dynamic_batch=False)
    export_onnx(fixed, tmp_path / "fixed.onnx")
    session = open_session(tmp_path / "fixed.onnx", "cpu")
    assert session.input_shapes == ((3, 6),)
    check = parity(fixed, session)
    assert check == Check(
        max_abs_err=check.max_abs_err,
        tolerance=check.tolerance,
        passed=True,
        detail="3 inputs of the fixed batch",
        provider="CPUExecutionProvider",
    )


def test_bench_times_files_in_turns(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench([session.path, session.path], [torch.zeros(2, 6)], runs=7, device="cpu")
    assert [row.runs for row in rows] == [7, 7]
    assert all(0 < row.p10_ms <= row.median_ms <= row.p90_ms for row in rows)
    assert rows[0].to_json()["provider"] == "CPUExecutionProvider"
    with pytest.raises(UsageError, match="expected at least 1 run, found runs=0"):
        bench([session.path], [torch.zeros(2, 6)], runs=0)


def test_an_unsupported_input_type_is_named(tmp_path: Path) -> None:
    text = onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, [1])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.STRING, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["text"], ["out"])], "g", [text], [out]
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "text.onnx")
    with pytest.raises(ExportError, match=r"inputs of type tensor\(string\) are not supported"):
        open_session(tmp_path / "text.onnx", "cpu")
