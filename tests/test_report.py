"""The report: its JSON is the documented one, its text is golden, its page loads nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from graphprune.check import Check
from graphprune.errors import OutputError
from graphprune.outcome import Kept, Removed
from graphprune.pipeline import PassRecord
from graphprune.program import Program
from graphprune.report import Figures, ParameterChange, Report, parameter_changes, render_text

REPORT = Report(
    model="tests.models:small",
    method="magnitude",
    target="macs=0.5",
    seed=3,
    environment={"torch": "2.9", "onnxruntime": None},
    before=Figures(params=1000, macs=200_000, onnx_bytes=4400, latency_ms=2.0, accuracy=0.9339),
    after=Figures(params=600, macs=99_000, onnx_bytes=2600, latency_ms=1.25, accuracy=None),
    checks={
        "surgery": Check(max_abs_err=1e-12, tolerance=1e-9, passed=True, detail="3 inputs"),
        "onnx": Check(
            max_abs_err=0.5,
            tolerance=1e-4,
            passed=False,
            detail="batch 2 differs",
            provider="CPUExecutionProvider",
        ),
    },
    removed=Removed(channels=12, blocks=("layer1.0",)),
    kept=(
        Kept("fc.weight[0] (10 channels)", "output of the graph"),
        Kept("odd", "a <strange> operator"),
        Kept("other", "output of the graph"),
    ),
    passes=(PassRecord(name="remove-channels", seconds=0.25, modified=True),),
    parameters=(
        ParameterChange("conv.weight", (16, 3, 3, 3), (10, 3, 3, 3)),
        ParameterChange("conv.bias", (16,), ()),
    ),
)


def test_json_has_exactly_the_documented_keys() -> None:
    data = REPORT.to_json()
    figures = {"params", "macs", "onnx_bytes", "latency_ms", "accuracy"}
    assert list(data) == [
        "model",
        "method",
        "target",
        "seed",
        "environment",
        "before",
        "after",
        "checks",
        "removed",
        "kept",
        "passes",
    ]
    assert set(data["before"]) == set(data["after"]) == figures
    assert data["after"]["accuracy"] is None
    assert data["checks"] == {
        "surgery": {"max_abs_err": 1e-12, "tolerance": 1e-9, "passed": True},
        "onnx": {
            "max_abs_err": 0.5,
            "tolerance": 1e-4,
            "passed": False,
            "detail": "batch 2 differs",
            "provider": "CPUExecutionProvider",
        },
    }
    assert data["removed"] == {
        "channels": 12,
        "heads": 0,
        "layers": [],
        "blocks": ["layer1.0"],
        "branches": [],
    }
    assert data["kept"][1] == {"what": "odd", "why": "a <strange> operator"}
    assert data["passes"] == [{"name": "remove-channels", "seconds": 0.25, "modified": True}]


def test_the_file_is_json_even_where_an_error_is_infinite(tmp_path: Path) -> None:
    check = Check(max_abs_err=math.inf, tolerance=1e-9, passed=False, detail="conv1 differs")
    report = dataclasses.replace(REPORT, checks={"surgery": check, "onnx": None})
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["checks"]["surgery"]["max_abs_err"] is None
    assert data["checks"]["onnx"] is None


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"):
        REPORT.save(tmp_path / "missing" / "report.json")


def test_text_of_a_report() -> None:
    assert_expected_inline(
        render_text(REPORT),
        """\
tests.models:small: magnitude, macs=0.5

                         before          after    change
 -------------------------------------------------------
 parameters               1,000            600   -40.0 %
 MACs for one sample    200,000         99,000   -50.5 %
 ONNX file (bytes)        4,400          2,600   -40.9 %
 latency (ms, median)     2.000          1.250   -37.5 %
 accuracy (%)             93.39   not measured

removed: 12 channels, 1 block
check surgery: passed (largest error 1e-12, tolerance 1e-09)
  3 inputs
check onnx: FELL SHORT (largest error 0.5, tolerance 0.0001, CPUExecutionProvider)
  batch 2 differs

 parameters that shrank most (of 2)   shape before   shape after   elements
 --------------------------------------------------------------------------
 conv.weight                              16x3x3x3      10x3x3x3       -162
 conv.bias                                      16          gone        -16

kept fc.weight[0] (10 channels) and 1 more: output of the graph
kept odd: a <strange> operator
""",
    )


def test_failed_checks_are_told_in_one_line_each() -> None:
    assert REPORT.failed == (
        "check onnx fell short: batch 2 differs (largest error 0.5, tolerance 0.0001)",
    )
    assert not REPORT.passed


def test_the_page_shows_everything_and_loads_nothing(tmp_path: Path) -> None:
    REPORT.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;strange&gt; operator" in page
    assert "fell short" in page
    assert "93.39" in page
    assert "conv.weight" in page
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?://", page)


def test_the_page_draws_bars_to_scale() -> None:
    from graphprune.report import render_html

    page = render_html(REPORT)
    assert re.findall(r'class="(dense|cut)" .* width="([\d.]+)"', page) == [
        ("dense", "420.0"),
        ("cut", "262.5"),
    ]


def test_parameter_changes_compare_by_name() -> None:
    def program(*widths: int) -> Program:
        layers = [nn.Linear(a, b) for a, b in zip((2, *widths), widths, strict=False)]
        module = fx.symbolic_trace(nn.Sequential(*layers))
        return Program(
            module=module,
            example_inputs=(torch.randn(1, 2),),
            dialect="fx",
            dynamic_batch=True,
            source="",
        )

    assert parameter_changes(program(4, 3), program(2, 3)) == (
        ParameterChange("0.weight", (4, 2), (2, 2)),
        ParameterChange("0.bias", (4,), (2,)),
        ParameterChange("1.weight", (3, 4), (3, 2)),
    )
    assert parameter_changes(program(4, 3), program(4)) == (
        ParameterChange("1.weight", (3, 4), ()),
        ParameterChange("1.bias", (3,), ()),
    )
