"""The command line: exit status, one-line errors, JSON on stdout, nothing else there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.check import Check
from graphprune.cli import COMMANDS, main
from tests.third_party.install import install, install_count_nodes

Capture = pytest.CaptureFixture[str]

NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def odd():
    return nn.Linear(3, 10)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that holds a module with two factories."""
    (tmp_path / "cli_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys: Capture, *arguments: str) -> Any:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_every_option_described(capsys: Capture, command: str) -> None:
    status, out, err = run(capsys, command, "--help")
    assert status == 0
    assert err == ""
    assert out.startswith(f"Usage: graphprune {command}")
    assert "--json" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["compile"], "Missing argument 'MODEL'"),
        (["compile", "cli_net:net", "--epoch", "3"], "No such option"),
        (["compile", "cli_net:net", "--epochs", "3"], "epochs=3 needs data to train on"),
        (["compile", "cli_net:net", "--epochs", "-1"], "expected epochs from 0 on, found -1"),
        (["compile", "cli_net:net", "--fine-tune", "lr=1"], "nothing is fine-tuned"),
        (["compile", "cli_net:net", "--round-to", "0"], "expected auto, or a number"),
        (["compile", "cli_net:net", "--method", "magnitud"], "did you mean magnitude?"),
        (["compile", "cli_net:net", "--passes", "clean-up{"], "found the end at position 9"),
        (["compile", "cli_net:net", "--passes", "nope"], "no pass is called 'nope'"),
        (
            ["compile", "cli_net:net", "--passes", "clean-up", "--target", "macs=0.4"],
            "passes= stands in place of target=",
        ),
        (["compile", "cli_net:net", "--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
        (["evaluate", "cli_net:net"], "Missing option '--data'"),
        (["bench"], "Missing argument"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_usage_mistake_is_status_2_and_leaves_nothing(
    here: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "missing.pt"], "missing.pt"),
        (["compile", "empty.pt"], "empty.pt"),
        (["compile", "cli_net:net", "--input", "1x3x8x8"], "1x3x8x8"),
        (["compile", "cli_net:net", "--input", "1x1x8x8", "--weights", "other.pt"], "other.pt"),
        (["compile", "cli_net:net", "--input", "1x1x8x8", "--target", "macs=2"], "macs=2"),
        (["compile", "cli_net:net", "--input", "1x1x8x8", "--target", "macs=0.0001"], "reach"),
        (["compile", "cli_net:net", "--data", "cifar10:nowhere"], "nowhere"),
        (["compile", "cli_net:odd", "--data", "digits"], "cli_net:odd"),
        (["apply", "missing.json", "cli_net:net", "--input", "1x1x8x8"], "missing.json"),
        (["inspect", "missing.pt"], "missing.pt"),
        (["bench", "missing.onnx"], "missing.onnx"),
        (["evaluate", "missing.onnx", "--data", "digits"], "missing.onnx"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_with_status_1_and_leaves_nothing(
    here: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    (here / "empty.pt").write_bytes(b"")
    torch.save(nn.Linear(2, 2).state_dict(), here / "other.pt")
    before = sorted(here.iterdir())
    status, out, err = run(capsys, *arguments)
    assert status == 1, err
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert sorted(p for p in here.iterdir() if p.name != "__pycache__") == before


def test_an_output_folder_that_is_a_file_is_refused_before_the_work(
    here: Path, capsys: Capture
) -> None:
    (here / "out").write_text("mine")
    status, _, err = run(capsys, "compile", "cli_net:net", "--input", "1x1x8x8")
    assert status == 1
    assert err.startswith("error: expected an output folder that can be written")
    assert (here / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "trains"),
    [
        ((), False),
        (("--method", "taylor"), False),
        (("--method", "no-method"), False),
        (("--passes", "dependency-groups,magnitude"), False),
        (("--epochs=1", "--data", "digits"), True),
        (("--method=trainable-gates", "--data", "digits"), True),
        (("--passes", "dependency-groups,fine-tune{epochs=2}"), True),
    ],
)
def test_an_interrupt_is_said(
    here: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    trains: bool,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphprune.compiler.compile", interrupted)
    status, _, err = run(capsys, "compile", "cli_net:net", "--input", "1x1x8x8", *options)
    assert status == 130
    hint = "; the same command with --resume goes on with a training" if trains else ""
    assert err == f"error: interrupted{hint}\n"


def test_a_traceback_is_shown_with_debug_only(here: Path, capsys: Capture) -> None:
    status, _, err = run(capsys, "inspect", "missing.pt", "--debug")
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_an_unexpected_error_is_one_line_too(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("graphprune.doctor.diagnose", fail)
    status, out, err = run(capsys, "doctor")
    assert status == 1
    assert out == ""
    assert err == (
        "error: unexpected ZeroDivisionError: by zero (--debug shows where; please report it)\n"
    )


def test_compile_writes_reports_and_repeats(here: Path, capsys: Capture) -> None:
    arguments = ["cli_net:net", "--input", "1x1x8x8", "--data", "digits"]
    report = run_json(capsys, "compile", *arguments)
    files = ["model.onnx", "model.pt2", "plan.json", "report.html", "report.json"]
    assert sorted(p.name for p in (here / "out").iterdir()) == files
    assert json.loads((here / "out" / "report.json").read_text()) == report
    assert report["method"] == "magnitude"
    assert report["target"] == "macs=0.5"
    assert 0.45 < report["after"]["macs"] / report["before"]["macs"] <= 0.5
    assert report["checks"]["surgery"]["passed"]
    assert report["checks"]["onnx"]["passed"]
    assert all(value is not None for value in report["before"].values())
    assert all(value is not None for value in report["after"].values())
    assert report["removed"]["channels"] > 0

    again = run_json(capsys, "compile", *arguments, "--out", "again")
    assert again["removed"] == report["removed"]
    plan = (here / "out" / "plan.json").read_bytes()
    assert (here / "again" / "plan.json").read_bytes() == plan

    replayed = run_json(capsys, "apply", "out/plan.json", *arguments, "--out", "replayed")
    assert replayed["after"]["macs"] == report["after"]["macs"]
    model = (here / "out" / "model.onnx").read_bytes()
    assert (here / "again" / "model.onnx").read_bytes() == model
    assert (here / "replayed" / "model.onnx").read_bytes() == model

    evaluated = run_json(capsys, "evaluate", "out/model.onnx", "--data", "digits")
    assert evaluated["accuracy"] == pytest.approx(report["after"]["accuracy"], abs=0.005)
    assert evaluated["samples"] == 360

    (timing,) = run_json(capsys, "bench", "out/model.onnx", "--runs", "3")
    assert timing["runs"] == 3
    assert timing["median_ms"] > 0


def test_compile_for_people(here: Path, capsys: Capture) -> None:
    status, out, err = run(
        capsys,
        *("compile", "cli_net:net", "--input", "1x1x8x8", "--no-export"),
        *("--print-between-passes", "--time-passes"),
    )
    assert status == 0
    assert "check surgery: passed" in out
    assert "check onnx: not made" in out
    assert "wrote out/plan.json" in out
    assert "// before dependency-groups" in err
    assert "// after the last pass" in err
    assert " s  remove-channels" in err
    names = sorted(p.name for p in (here / "out").iterdir())
    assert names == ["plan.json", "report.html", "report.json"]


def test_a_check_that_falls_short_is_status_3_and_named(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: Any, **__: Any) -> Check:
        return Check(max_abs_err=9.0, tolerance=1.0, passed=False, detail="conv1 differs")

    monkeypatch.setattr("graphprune.pipeline.verify_surgery", compare)
    status, out, err = run(
        capsys, "compile", "cli_net:net", "--input", "1x1x8x8", "--no-export", "--json"
    )
    assert status == 3
    assert not json.loads(out)["checks"]["surgery"]["passed"]
    assert err == ("check surgery fell short: conv1 differs (largest error 9, tolerance 1)\n")


def test_passes_of_ones_own_are_run(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_count_nodes(here, monkeypatch)
    report = run_json(
        capsys, "compile", "cli_net:net", "--input", "1x1x8x8", "--passes", "count-nodes"
    )
    assert [p["name"] for p in report["passes"]] == ["count-nodes"]
    assert report["method"] is None
    capture = report["checks"].pop("capture")
    assert capture["passed"]
    assert report["checks"] == {"surgery": None, "onnx": None}
    assert sorted(p.name for p in (here / "out").iterdir()) == ["report.html", "report.json"]


def test_inspect_shows_groups_costs_and_reasons(here: Path, capsys: Capture) -> None:
    data = run_json(capsys, "inspect", "cli_net:net", "--input", "1x1x8x8", "--program")
    assert data["params"] == 12_762
    assert sum(node["macs"] for node in data["nodes"]) == data["macs"]
    assert {group["channels"] for group in data["groups"] if not group["pinned"]} == {16}
    assert data["kept"]
    assert data["program"].startswith("program cli_net:net (fx, dynamic batch)")
    status, out, _ = run(capsys, "inspect", "cli_net:net", "--input", "1x1x8x8")
    assert status == 0
    assert "12,762 parameters" in out
    assert "pinned: " in out


def test_inspect_shows_residual_blocks(capsys: Capture) -> None:
    command = ["inspect", "tests.models:resnet20", "--input", "1x3x32x32"]
    data = run_json(capsys, *command)
    assert len(data["blocks"]) == 7
    assert data["blocks"][0]["name"] == "layer1.0"
    assert data["blocks"][0]["macs"] == 2 * 9 * 16 * 16 * 32 * 32
    status, out, _ = run(capsys, *command)
    assert status == 0
    assert "7 residual blocks with 81 % of the MACs can be removed whole" in out


def test_bench_shows_a_table(here: Path, capsys: Capture) -> None:
    run_json(capsys, "compile", "cli_net:net", "--input", "1x1x8x8")
    status, out, _ = run(capsys, "bench", "out/model.onnx", "out/model.onnx", "--runs", "2")
    assert status == 0
    assert "1.00x" in out
    assert "CPU" in out or "CUDA" in out


def test_evaluate_takes_models_as_well(here: Path, capsys: Capture) -> None:
    status, out, _ = run(capsys, "evaluate", "cli_net:net", "--data", "digits")
    assert status == 0
    assert "on 360 test samples of digits" in out


def test_lists_show_ours_and_third_parties(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_count_nodes(here, monkeypatch)
    data = run_json(capsys, "passes")
    assert "count-nodes" in {item["name"] for item in data}
    assert "magnitude" in {item["name"] for item in run_json(capsys, "methods")}
    status, out, _ = run(capsys, "passes")
    assert status == 0
    assert "count-nodes" in out
    assert "inputs_too: bool = true" in out


def test_a_duplicate_name_is_a_usage_error(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(here, monkeypatch, package="rival", passes={"magnitude": "rival:Magnitude"})
    status, _, err = run(capsys, "methods")
    assert status == 2
    assert "two passes are called 'magnitude'" in err


def test_doctor_names_versions_devices_and_providers(capsys: Capture) -> None:
    data = run_json(capsys, "doctor")
    assert data["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "CPUExecutionProvider" in data["ONNX Runtime"]["built with"]
    assert data["extras"]["test"] == "installed"
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "ONNX Runtime" in out


@pytest.mark.slow
def test_demo_trains_saves_and_compiles(here: Path, capsys: Capture) -> None:
    report = run_json(capsys, "demo")
    assert report["before"]["accuracy"] > 0.97
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    assert (here / "demo" / "model.pt").exists()
    assert (here / "demo" / "model.onnx").exists()
