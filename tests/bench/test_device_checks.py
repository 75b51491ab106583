"""The checks of a device: every one is run and written, whatever becomes of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphprune.bench import device_checks
from graphprune.bench.device_checks import Machine, Workload, checks, run_checks
from graphprune.check import Check
from graphprune.errors import PassError, UsageError

VIT = "graphprune.bench.networks:vit"
CPU = Machine(device="cpu", networks={VIT: "1x1x28x28"}, steps=1)


def _silent(line: str) -> None:
    assert line


def _passes() -> dict[str, Any]:
    return {"passed": True, "figure": 3}


def _falls_short() -> dict[str, Any]:
    return {"passed": False, "why": "too slow"}


def _raises() -> dict[str, Any]:
    raise PassError("expected rain\nfound sun")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], dict[str, Any]]]:
    """Checks that take no time, in place of the real ones."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "first": _raises,
        "second": _passes,
        "third": _falls_short,
    }
    monkeypatch.setattr(device_checks, "checks", lambda machine: found)
    return found


def test_every_check_has_a_name_and_the_recipe_comes_last() -> None:
    recipe = Workload(model="a:b", weights=None, data="digits")
    machine = Machine(device="cpu", networks=CPU.networks, recipe=recipe)
    names = [f"compile {VIT}", "gates", "obs", "resume", f"steps {VIT} float32"]
    assert list(checks(machine)) == [*names, f"steps {VIT} bfloat16", "recipe a:b"]
    assert list(checks(CPU)) == [*names, f"steps {VIT} bfloat16"]


def test_a_network_is_cut_proved_exported_and_timed(tmp_path: Path) -> None:
    lines: list[str] = []
    assert run_checks(CPU, tmp_path / "cpu.json", only=["compile"], say=lines.append)
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["passed"]
    assert written["environment"]["device"] == "cpu"
    figures = written["checks"][f"compile {VIT}"]
    before, after = figures["macs"]
    assert 0 < after <= 0.5 * before
    assert all(ms > 0 for ms in figures["latency_ms"])
    assert figures["checks"]["surgery"]["passed"]
    assert figures["checks"]["onnx"]["provider"] == "CPUExecutionProvider"
    assert len(lines) == 1
    assert lines[0].startswith(f"compile {VIT}: passed (")


def test_steps_are_figures(tmp_path: Path) -> None:
    assert run_checks(CPU, tmp_path / "cpu.json", only=[f"steps {VIT} float32"], say=_silent)
    figures = json.loads((tmp_path / "cpu.json").read_text())["checks"][f"steps {VIT} float32"]
    assert {"dense", "dense, with gates", "cut", "teacher"} <= set(figures["milliseconds"])


@pytest.mark.slow
def test_training_and_resuming(tmp_path: Path) -> None:
    assert run_checks(CPU, tmp_path / "cpu.json", only=["gates", "obs", "resume"])
    found = json.loads((tmp_path / "cpu.json").read_text())["checks"]
    assert found["resume"]["resumed_max_abs_err"] == 0.0
    assert found["resume"]["resumed_at_step"] > 0
    for name in ("gates", "obs"):
        before, after = found[name]["macs"]
        assert 0.495 <= after / before <= 0.5
        assert found[name]["accuracy"][1] >= 0.9


@pytest.mark.slow
def test_a_checkpoint_that_is_not_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.checkpoint.Checkpoint.load", lambda *_, **__: None)
    figures = checks(CPU)["resume"]()
    assert figures["resumed_max_abs_err"] == 0.0
    assert not figures["passed"]
    assert "started over" in figures["why"]


def test_another_recipe_has_not_passed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_checks, "_recipe", lambda *_: _passes())
    lines = list[str]()
    for epochs in (1, 1, 2):
        recipe = Workload(model="a:b", weights=None, data="digits", epochs=epochs)
        machine = Machine(device="cpu", networks={}, recipe=recipe)
        path = tmp_path / "cpu.json"
        assert run_checks(machine, path, only=["recipe"], resume=True, say=lines.append)
    assert ["before" in line for line in lines] == [False, True, False]
    assert json.loads(path.read_text())["checks"]["recipe a:b"]["asked"]["epochs"] == "2"


@pytest.mark.usefixtures("chosen")
def test_what_fails_is_written_and_the_others_run(tmp_path: Path) -> None:
    lines: list[str] = []
    assert not run_checks(CPU, tmp_path / "cpu.json", say=lines.append)
    written = json.loads((tmp_path / "cpu.json").read_text())
    found = written["checks"]
    assert not written["passed"]
    assert found["first"]["why"] == "PassError: expected rain"
    assert any("_raises" in line for line in found["first"]["traceback"])
    assert found["second"]["passed"]
    assert found["second"]["figure"] == 3
    assert [line.partition(" (")[0] for line in lines] == [
        "first: FAILED: PassError: expected rain",
        "second: passed",
        "third: FAILED: too slow",
    ]
    assert not list(tmp_path.glob(".*"))


def test_resume_leaves_out_what_passed(
    tmp_path: Path, chosen: dict[str, Callable[[], dict[str, Any]]]
) -> None:
    path, lines = tmp_path / "cpu.json", list[str]()
    run_checks(CPU, path, say=lines.append)
    chosen |= {"first": _passes, "second": _raises}
    lines.clear()
    assert not run_checks(CPU, path, resume=True, say=lines.append)
    assert [line.partition(" (")[0] for line in lines] == [
        "first: passed",
        "second: passed before",
        "third: FAILED: too slow",
    ]
    found = json.loads(path.read_text())["checks"]
    assert [found[name]["passed"] for name in ("first", "second", "third")] == [True, True, False]
    assert run_checks(CPU, path, resume=True, only=["second"], say=lines.append)
    assert json.loads(path.read_text())["checks"].keys() == found.keys()


@pytest.mark.usefixtures("chosen")
def test_names_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    with pytest.raises(
        UsageError, match="expected the start of one of first, second, third; found 'fo'"
    ):
        run_checks(CPU, path, only=["fo"])
    path.write_text('{"environment": [1], "checks": {}}')
    with pytest.raises(UsageError, match="expected figures of an earlier run, found"):
        run_checks(CPU, path, resume=True)
    path.write_text("no JSON")
    with pytest.raises(UsageError, match="expected figures of an earlier run, found"):
        run_checks(CPU, path, resume=True)
    assert path.read_text() == "no JSON"
    run_checks(CPU, path, say=_silent)
    text = path.read_text().replace('"device": "cpu"', '"device": "cuda"')
    path.write_text(text)
    with pytest.raises(UsageError, match="was written with device=cuda, here it is cpu"):
        run_checks(CPU, path, resume=True)
    assert path.read_text() == text


def test_a_file_that_the_cpu_computed_fails_on_a_gpu() -> None:
    there = Check(max_abs_err=0.0, tolerance=1.0, passed=True, provider="CUDAExecutionProvider")
    here = Check(max_abs_err=0.0, tolerance=1.0, passed=True, provider="CPUExecutionProvider")
    found = {"surgery": Check(max_abs_err=0.0, tolerance=1.0, passed=True), "onnx": here}
    gpu = Machine(device="cuda", networks={})
    expected = ["check onnx ran on CPUExecutionProvider, expected CUDAExecutionProvider"]
    assert list(device_checks._not_on_the_gpu(gpu, found)) == expected
    assert not list(device_checks._not_on_the_gpu(gpu, {**found, "onnx": there}))
    assert not list(device_checks._not_on_the_gpu(CPU, found))
