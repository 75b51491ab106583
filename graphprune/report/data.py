"""Report: what a compilation found, did, proved and measured, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphprune.check import Check
from graphprune.files import write_atomic
from graphprune.outcome import Kept, Removed
from graphprune.pipeline import PassRecord
from graphprune.program import Program

__all__ = ["Figures", "ParameterChange", "Report", "parameter_changes"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Size, speed and quality of one program; None: not measured."""

    params: int | None = None
    """Elements of all parameters, tied ones once."""
    macs: int | None = None
    """Multiply-accumulates for one sample (FLOPs are twice as many)."""
    onnx_bytes: int | None = None
    """Size of the ONNX file."""
    onnx_zipped_bytes: int | None = None
    """Size of the ONNX file, zipped; measured where many weights are zero."""
    nonzero: int | None = None
    """Parameters other than zero; counted where many are."""
    latency_ms: float | None = None
    """Median latency in ONNX Runtime."""
    accuracy: float | None = None
    """Top-1 accuracy on the test split, a fraction."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        sparse = {"nonzero": self.nonzero, "onnx_zipped_bytes": self.onnx_zipped_bytes}
        return {
            "params": self.params,
            "macs": self.macs,
            "onnx_bytes": self.onnx_bytes,
            "latency_ms": self.latency_ms,
            "accuracy": self.accuracy,
            **{name: value for name, value in sparse.items() if value is not None},
        }


@dataclass(frozen=True)
class ParameterChange:
    """Shape of one parameter before and after."""

    name: str
    """Name in the model that went in."""
    before: tuple[int, ...]
    """Shape in the dense program."""
    after: tuple[int, ...]
    """Shape in the program that came out; empty where the parameter is gone."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a reader wants to know about one compilation."""

    model: str
    """What the user called the model."""
    method: str | None
    """How the channels were scored; None: the pipeline made no choice."""
    target: str | None
    """What was asked for."""
    seed: int
    """Seed of everything random."""
    environment: Mapping[str, str | None]
    """Versions and devices that the numbers were taken with."""
    before: Figures
    """The dense program."""
    after: Figures
    """The program that came out."""
    checks: Mapping[str, Check | None]
    """Comparisons by name; None: not made."""
    removed: Removed
    """What was cut."""
    kept: tuple[Kept, ...]
    """What could have been cut and was not."""
    passes: tuple[PassRecord, ...]
    """The passes that ran, in order."""
    whole: Mapping[str, Any] | None = None
    """Of a model that no tracer captured: ``untraced`` (the reasons) and ``exported`` (module -> file of each part) and
    ``not_written`` (file -> reason)."""
    parameters: tuple[ParameterChange, ...] = field(default=())
    """Every parameter whose shape changed; shown to people, not part of report.json."""

    @property
    def passed(self) -> bool:
        """Whether no check fell short."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """One line for each check that fell short."""
        lines = []
        for name, check in self.checks.items():
            if check is not None and not check.passed:
                error = "not measured" if check.max_abs_err is None else f"{check.max_abs_err:.3g}"
                detail = f": {check.detail}" if check.detail else ""
                lines.append(
                    f"check {name} fell short{detail} "
                    f"(largest error {error}, tolerance {check.tolerance:.3g})"
                )
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, in the form of report.json."""
        data: dict[str, Any] = {
            "model": self.model,
            "method": self.method,
            "target": self.target,
            "seed": self.seed,
            "environment": dict(self.environment),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "checks": {name: _check_json(check) for name, check in self.checks.items()},
            "removed": {
                "channels": self.removed.channels,
                "heads": self.removed.heads,
                "layers": list(self.removed.layers),
                "blocks": list(self.removed.blocks),
                "branches": list(self.removed.branches),
            },
            "kept": [{"what": kept.what, "why": kept.why} for kept in self.kept],
            "passes": [
                {"name": record.name, "seconds": record.seconds, "modified": record.modified}
                for record in self.passes
            ],
        }
        if self.whole is not None:
            data["whole"] = dict(self.whole)
        return data

    def save(self, path: str | Path) -> None:
        """Write report.json, whole or not at all."""
        with write_atomic(path) as temporary:
            text = json.dumps(self.to_json(), indent=2, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Write the report as one page that loads nothing else, whole or not at all."""
        from graphprune.report.html import render_html

        with write_atomic(path) as temporary:
            temporary.write_text(render_html(self), encoding="utf-8")

    def __str__(self) -> str:
        """Return the report as text, 100 columns wide."""
        from graphprune.report.text import render_text

        return render_text(self)


def _check_json(check: Check | None) -> dict[str, Any] | None:
    """Return a check in the form of report.json: what was compared is told where it fell short."""
    if check is None:
        return None
    data = check.to_json()
    if check.passed:
        data.pop("detail", None)
    return data


def parameter_changes(dense: Program, cut: Program) -> tuple[ParameterChange, ...]:
    """Return every parameter whose shape differs between two programs, in the dense one's order."""
    after = {name: tuple(p.shape) for name, p in cut.module.named_parameters()}
    return tuple(
        ParameterChange(name, tuple(p.shape), after.get(name, ()))
        for name, p in dense.module.named_parameters()
        if after.get(name) != tuple(p.shape)
    )
