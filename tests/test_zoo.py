"""The zoo: complete lists, one model from end to end, rows that survive whatever happens to a worker."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn

import graphprune
from graphprune.check import Check
from graphprune.cost import Cost
from graphprune.errors import OutputError, PassError, TargetError, UsageError
from graphprune.program import Program
from graphprune.zoo import (
    SUITES,
    Job,
    Row,
    ZooModel,
    load_rows,
    run_model,
    run_suite,
    select,
    timm_models,
    timm_table,
    to_markdown,
    torchvision_models,
)
from graphprune.zoo import models as zoo_models
from graphprune.zoo.peer import attempt
from graphprune.zoo.row import _require_costs
from graphprune.zoo.suite import _append, _Worker

TOOL = Path(__file__).parents[1] / "tools" / "zoo"
TINY = ZooModel(
    name="squeezenet1_1", kind="classification", shape=(3, 32, 32), options={"num_classes": 10}
)
EXPORTED = ("resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small")
ROW = Row(
    model="resnet18",
    kind="classification",
    input="3x64x64",
    job=Job(),
    tracer="fx",
    params=(11_689_512, 7_010_000),
    macs=(1000, 499),
    groups=14,
    seconds={"capture": 0.1, "analyse": 0.04, "choose": 0.45, "cut": 0.155, "all": 16.0},
    captured=Check(max_abs_err=1e-7, tolerance=1e-4, passed=True),
    surgery=Check(max_abs_err=2.2e-15, tolerance=1e-9, passed=True, detail="float64"),
    onnx=Check(max_abs_err=4.4e-7, tolerance=1e-4, passed=True, provider="CPUExecutionProvider"),
    memory_gib=1.1,
)
FAILED = Row(
    model="vit_x",
    kind="classification",
    input="3x32x32",
    job=Job(export=False),
    tracer="export, fixed batch",
    params=(10, 5),
    macs=(1000, 400),
    groups=1,
    seconds={"capture": 1.0, "all": 2.0},
    surgery=Check(max_abs_err=0.5, tolerance=1e-9, passed=False),
    failure="VerifyError: node a\nis the first that differs",
)


def test_the_suite_is_every_model_but_detectors_and_quantized_ones() -> None:
    elsewhere = {
        name for module in (tv.detection, tv.quantization) for name in tv.list_models(module)
    }
    names = [m.name for m in torchvision_models()]
    assert len(names) == len(set(names))
    assert set(names) == set(tv.list_models()) - elsewhere


def test_the_timm_suite_has_one_model_of_every_file() -> None:
    families = timm_table.families()
    models = timm_models()
    assert [m.family for m in models] == list(families)
    assert all(m.name in families[m.family] for m in models)
    assert all(m.options in ({}, {"img_size": m.shape[1]}) for m in models)


@pytest.mark.parametrize("family", ["starnet", "visformer"])
def test_the_timm_suite_is_what_the_rule_chooses(family: str) -> None:
    names = timm_table.families()[family]
    assert timm_table.choose(names) == timm_table.entries()[family]


def test_a_model_that_takes_no_other_input_keeps_its_own() -> None:
    side, options = timm_table._input("test_vit")
    assert (side, options) == (96, {"img_size": 96})
    assert timm_table._input("test_convnext") == (96, {})


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_model_of_timm_runs_from_end_to_end(name: str) -> None:
    model = ZooModel(name=name, kind="classification", shape=(3, 160, 160), library="timm")
    row = run_model(model, Job())
    assert row.failure is None
    assert row.onnx is not None
    assert row.onnx.passed


def test_every_special_prefix_is_one_of_a_model() -> None:
    names = [m.name for m in torchvision_models()]
    unused = [p for p in zoo_models._SPECIAL if not any(n.startswith(p) for n in names)]
    assert unused == []


def test_the_longest_prefix_decides() -> None:
    by_name = {m.name: m for m in torchvision_models()}
    assert by_name["vit_h_14"].shape == (3, 56, 56)
    assert by_name["vit_b_16"].shape == (3, 64, 64)
    assert by_name["swin3d_t"].input_text == "3x8x64x64"
    assert by_name["swin_t"].input_text == "3x128x128"


@pytest.mark.slow
def test_optical_flow_takes_two_images() -> None:
    (raft,) = select(torchvision_models(), ["raft_small"])
    first, second = raft.example(batch=2)
    assert first.shape == second.shape == (2, 3, 128, 128)
    row = run_model(raft, Job(export=False))
    assert row.failure is None
    assert row.tracer == "export"


def test_the_fast_suite_covers_the_families() -> None:
    fast = [m.name for m in SUITES["fast"]()]
    assert set(fast) == set(zoo_models.FAST)
    assert len(fast) >= 12


def test_a_model_is_the_same_every_time_and_nothing_in_it_is_constant() -> None:
    before = torch.get_rng_state()
    first, second = TINY.build(), TINY.build()
    assert torch.equal(before, torch.get_rng_state())
    tensors = {**dict(first.named_parameters()), **dict(first.named_buffers())}
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.numel() < 2 or tensor.min() != tensor.max()
    other = dataclasses.replace(TINY, options={}).build(seed=1)
    assert not torch.equal(other.features[0].weight, first.features[0].weight)  # type: ignore[union-attr, index]


def test_constants_vary_around_what_they_were() -> None:
    norm = nn.BatchNorm2d(1000)
    zoo_models.vary(norm)
    assert 0.5 <= norm.weight.detach().min() < 0.6
    assert 1.4 < norm.weight.detach().max() <= 1.5
    assert 0.01 < norm.bias.detach().std() < 0.03
    assert norm.running_var is not None
    assert norm.running_var.min() > 0
    assert norm.num_batches_tracked == 0


def test_batch_norms_get_the_statistics_of_what_they_see() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.Dropout())
    zoo_models.vary(model)
    x = torch.randn(4, 3, 9, 9)
    zoo_models._calibrate(model.eval(), x)
    assert not any(m.training for m in model.modules())
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.momentum == 0.3
    out = model(x).detach()
    torch.testing.assert_close(out.mean((0, 2, 3)), norm.bias.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), norm.weight.detach(), atol=0, rtol=1e-2)


def test_unknown_names_are_refused_with_close_ones() -> None:
    with pytest.raises(UsageError, match=r"found 'resnet81'; close: resnet18"):
        select(torchvision_models(), ["resnet50", "resnet81"])


def test_one_model_runs_from_end_to_end() -> None:
    row = run_model(TINY, Job())
    assert row.failure is None
    assert row.passed
    assert row.tracer == "fx"
    assert row.params is not None
    assert row.macs is not None
    assert row.params[1] < row.params[0]
    assert 0.495 <= row.macs[1] / row.macs[0] <= 0.5
    assert row.captured is not None
    assert row.captured.passed
    assert row.surgery is not None
    assert row.surgery.max_abs_err is not None
    assert row.surgery.max_abs_err <= 1e-9
    assert row.onnx is not None
    assert row.onnx.provider == "CPUExecutionProvider"
    assert "batches of 1, 2" in row.onnx.detail
    assert list(row.seconds) == ["capture", "analyse", "choose", "cut", "all"]
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


@pytest.mark.parametrize("model", SUITES["fast"](), ids=lambda m: m.name)
def test_the_fast_suite(model: ZooModel) -> None:
    """Every family, cut and proven; the whole suite, with export, is for tools/zoo."""
    row = run_model(model, Job(export=model.name in EXPORTED))
    assert row.failure is None
    assert (row.onnx is not None) == (model.name in EXPORTED)


def test_a_target_out_of_reach_is_a_row() -> None:
    row = run_model(TINY, Job(target="macs=0.0000001", export=False))
    assert not row.passed
    assert row.failure is not None
    assert row.failure.startswith("TargetError: target macs=1e-07 cannot be reached")
    assert list(row.seconds) == ["capture", "all"]


def test_a_program_that_computes_something_else_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(model: nn.Module, *arguments: Any, **options: Any) -> Program:
        other = dataclasses.replace(TINY).build(seed=1)
        return graphprune.capture(other, *arguments, **options)

    monkeypatch.setattr("graphprune.zoo.row.capture", capture)
    row = run_model(TINY, Job(export=False))
    assert row.failure is not None
    assert row.failure.startswith("PassError: the capture check fell short: model on 2")
    assert row.captured is not None
    assert not row.captured.passed
    assert row.surgery is None


def test_a_model_that_cannot_be_built_is_a_row() -> None:
    row = run_model(dataclasses.replace(TINY, options={"no_such_option": 1}), Job())
    assert row.failure is not None
    assert row.failure.startswith("TypeError: ")
    assert row.tracer is None


@pytest.mark.parametrize(("kept", "is_near"), [(495, True), (500, True), (494, False)])
def test_a_choice_must_come_near_the_target(kept: int, is_near: bool) -> None:
    def check() -> None:
        row = dataclasses.replace(ROW, params=(100, 50))
        _require_costs(row, Cost(params=50, macs=kept), Cost(params=100, macs=1000))

    if is_near:
        check()
        return
    with pytest.raises(TargetError, match=r"99% to 100% of the target macs=0\.5, found 98\.80%"):
        check()


def test_other_parameters_than_predicted_are_refused() -> None:
    row = dataclasses.replace(ROW, params=(100, 51))
    with pytest.raises(
        PassError, match=r"expected parameters \(100, 50\) from the cost model, found \(100, 51\)"
    ):
        _require_costs(row, Cost(params=50, macs=500), Cost(params=100, macs=1000))


@dataclass(frozen=True, kw_only=True)
class Dying(ZooModel):
    """Takes the whole process with it."""

    def build(self, *, seed: int = 0) -> nn.Module:
        os._exit(7)


@dataclass(frozen=True, kw_only=True)
class Sleeping(ZooModel):
    """Is never done."""

    def build(self, *, seed: int = 0) -> nn.Module:
        time.sleep(600)
        raise AssertionError


def test_a_worker_that_hangs_or_dies_is_a_row_and_the_next_one_takes_over() -> None:
    job = Job(export=False)
    sleeping = Sleeping(name="sleeping", kind="video", shape=(3, 8, 8))
    dying = Dying(name="dying", kind="video", shape=(3, 8, 8))
    with _Worker(threads=1, timeout_s=300.0) as worker:
        assert worker.run(TINY, job).failure is None
        worker.timeout_s = 1.0
        assert worker.run(sleeping, job).failure == "given up after 1 s"
        worker.timeout_s = 300.0
        row = worker.run(dying, job)
    assert row.failure == "the process died with exit code 7"
    assert (row.model, row.kind, row.input) == ("dying", "video", "3x8x8")


def test_rows_are_written_down_as_they_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(self: Any, model: ZooModel, job: Job) -> Row:
        return dataclasses.replace(ROW, model=model.name, input=model.input_text, job=job)

    monkeypatch.setattr("graphprune.zoo.suite._Worker.run", run)
    log, seen = tmp_path / "rows.jsonl", []
    rows = run_suite(
        [dataclasses.replace(TINY, name=n) for n in ("c", "a", "b")],
        Job(),
        done=[dataclasses.replace(ROW, model="a", input="3x32x32")],
        log=log,
        notify=lambda row, rows: seen.append((row.model, [r.model for r in rows])),
    )
    assert [r.model for r in rows] == ["c", "a", "b"]
    assert seen == [("c", ["c", "a"]), ("b", ["c", "a", "b"])]
    assert list(load_rows(log)) == ["c", "b"]


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write rows to"):
        _append(tmp_path / "missing" / "rows.jsonl", ROW)


def test_what_failed_or_was_done_otherwise_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(TINY, name="resnet18")
    started = []

    class _Stop(Exception):
        pass

    def run(self: Any, model: ZooModel, job: Job) -> Row:
        started.append(model.name)
        raise _Stop

    monkeypatch.setattr("graphprune.zoo.suite._Worker.run", run)
    done = dataclasses.replace(ROW, input=model.input_text)
    for old in (
        dataclasses.replace(done, failure="x"),
        dataclasses.replace(done, job=Job(target="macs=0.4")),
        dataclasses.replace(done, input="3x96x96"),
    ):
        with pytest.raises(_Stop):
            run_suite([model], Job(), done=[old])
    assert started == ["resnet18"] * 3
    assert run_suite([model], Job(), done=[done]) == [done]


def test_a_line_that_a_killed_run_left_unfinished_is_no_row(tmp_path: Path) -> None:
    log = tmp_path / "rows.jsonl"
    assert load_rows(log) == {}
    _append(log, ROW)
    whole = log.read_text()
    log.write_text(whole + whole[:50])
    assert load_rows(log) == {"resnet18": ROW}


def test_a_row_after_an_unfinished_line_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "rows.jsonl"
    log.write_text('{"model": "alex')
    _append(log, ROW)
    assert load_rows(log) == {"resnet18": ROW}


def test_the_table() -> None:
    text = to_markdown([ROW, FAILED], command="tools/zoo --out docs/zoo.md", machine="a machine")
    assert text == GOLDEN


def test_the_table_says_what_the_peer_did() -> None:
    job = Job(peer=True)
    rows = [
        dataclasses.replace(ROW, job=job, peer="runs: 0.71"),
        dataclasses.replace(FAILED, job=job, peer="fails: KeyError"),
    ]
    text = to_markdown(rows, command="tools/zoo --peer", machine="a machine")
    assert "makes something that runs of 1 of 2;\nthen what is left" in text
    assert "| result | Torch-Pruning |" in text
    assert "| passed | runs: 0.71 |" in text
    assert "| **failed** | fails: KeyError |" in text


def test_torch_pruning_runs_or_fails() -> None:
    pytest.importorskip("torch_pruning")
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        torch.rand(1, 3, 8, 8),
    )
    assert attempt(model, x, ratio=0.5, limit_s=60).startswith("fails: outputs")
    kept = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1000))
    assert attempt(kept, x, ratio=0.5, limit_s=60) == "runs: 0.50"
    assert attempt(nn.Sequential(nn.ReLU()), x, ratio=0.5, limit_s=60).startswith("fails")


GOLDEN = """\
# Model zoo

1 of 2 models passed. Made with `tools/zoo --out docs/zoo.md` on a machine.

Random weights. Capture error: largest difference between the outputs of the model and of the program.
Surgery error: the same between the masked and the cut program, node by node. Both are relative to the
largest value.
ONNX error: largest absolute difference between torch and ONNX Runtime over three batch sizes, held to a
tolerance that follows the size of the outputs.

| model | input | tracer | parameters (M) | MACs kept | groups | capture s | analyse s | choose s | cut s \
| capture error | surgery error | ONNX error | result |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
| resnet18 | 3x64x64 | fx | 11.69 -> 7.01 | 0.4990 | 14 | 0.10 | 0.04 | 0.45 | 0.15 \
| 1.0e-07 | 2.2e-15 | 4.4e-07 | passed |
| vit_x | 3x32x32 | export, fixed batch | 0.00 -> 0.00 | 0.4000 | 1 | 1.00 |  |  |  |  | **5.0e-01** | not exported \
| **failed** |

## vit_x

```text
VerifyError: node a
is the first that differs
```
"""


def _run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL), run_name="__main__")
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_the_tool_resumes_and_writes_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, out = tmp_path / "rows.jsonl", tmp_path / "zoo.md"
    log.write_text(json.dumps(ROW.to_json()) + "\n")
    code = _run_tool(
        monkeypatch, "--models", "resnet18", "--json", str(log), "--out", str(out), "--resume"
    )
    assert code == 0
    text = out.read_text()
    assert "1 of 1 models passed. Made with `tools/zoo --models resnet18 --json" in text
    assert "--resume" not in text
    assert log.read_text().count("\n") == 1


def test_the_tool_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run_tool(monkeypatch, "--models", "nothing") == 1
    assert capsys.readouterr().err.startswith("error: expected names of the suite's")
    assert _run_tool(monkeypatch, "--resume") == 2
    assert "--resume needs the --json FILE" in capsys.readouterr().err
