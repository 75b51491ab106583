"""The report as text for people."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphprune.outcome import Kept, Removed
from graphprune.report.data import Figures, Report

__all__ = [
    "FIGURE_ROWS",
    "TABLE_BOX",
    "change_text",
    "figure_rows",
    "figure_text",
    "print_report",
    "removed_text",
    "render_text",
]

TABLE_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""A line under the headings, and nothing else."""

MOST_KEPT = 8
"""Reasons shown in full; report.json and report.html have them all."""

MOST_PARAMETERS = 12
"""Parameters shown; report.html has them all."""

FIGURE_ROWS = (
    ("parameters", "params"),
    ("parameters other than zero", "nonzero"),
    ("MACs for one sample", "macs"),
    ("ONNX file (bytes)", "onnx_bytes"),
    ("ONNX file, zipped (bytes)", "onnx_zipped_bytes"),
    ("latency (ms, median)", "latency_ms"),
    ("accuracy (%)", "accuracy"),
)
"""Label and attribute of every figure."""

_SPARSE_ROWS = ("nonzero", "onnx_zipped_bytes")
"""Left out where few weights are zero."""


def figure_rows(report: Report) -> list[tuple[str, str]]:
    """Return label and attribute of the figures that this report shows."""
    return [
        (label, name)
        for label, name in FIGURE_ROWS
        if name not in _SPARSE_ROWS or getattr(report.after, name) is not None
    ]


def render_text(report: Report, *, width: int = 100) -> str:
    """Return the report as text without colours."""
    buffer = io.StringIO()
    print_report(report, Console(file=buffer, width=width, color_system=None, highlight=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Print the report on a console."""
    title = f"{report.model}: {report.method or 'no method'}, {report.target or 'no target'}"
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    console.print(_figures_table(report))
    console.print(f"removed: {escape(removed_text(report.removed))}", highlight=False)
    if report.whole is not None:
        console.print(escape(_about_whole(report.whole)), highlight=False)
    for name, check in report.checks.items():
        console.print(_check_line(report, name), highlight=False)
        if check is not None and check.detail:
            console.print(f"  {escape(check.detail)}", highlight=False)
    if report.parameters:
        console.print(_parameters_table(report))
    for kept in _grouped(report.kept)[:MOST_KEPT]:
        console.print(f"kept {escape(kept.what)}: {escape(kept.why)}", highlight=False)
    hidden = len(_grouped(report.kept)) - MOST_KEPT
    if hidden > 0:
        console.print(f"kept for other reasons: {hidden}, all of them in report.json")


def _about_whole(whole: Mapping[str, Any]) -> str:
    """Say that the model runs whole, and what of it was exported."""
    reason = next(iter(whole.get("untraced", ())), "no tracer follows it")
    parts = ", ".join(f"{name} -> {file}" for name, file in whole.get("exported", {}).items())
    return (
        f"not captured as a graph, so cut in place and written to model.pt ({reason}); "
        f"parts exported: {parts or 'none'}"
    )


def figure_text(name: str, value: float | None) -> str:
    """Return one figure in the unit of its row."""
    if value is None:
        return "not measured"
    if name == "accuracy":
        return f"{100 * value:.2f}"
    return f"{value:.3f}" if name == "latency_ms" else f"{value:,}"


def change_text(name: str, before: float | None, after: float | None) -> str:
    """Return the change from `before` to `after`: points of accuracy, else signed percent."""
    if before is None or after is None:
        return ""
    if name == "accuracy":
        return f"{100 * (after - before):+.2f} points"
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def removed_text(removed: Removed) -> str:
    """Return what was removed as one line."""
    parts = []
    for noun, count in (
        ("channel", removed.channels),
        ("head", removed.heads),
        ("layer", len(removed.layers)),
        ("block", len(removed.blocks)),
        ("branch", len(removed.branches)),
    ):
        if count:
            plural = noun if count == 1 else "branches" if noun == "branch" else f"{noun}s"
            parts.append(f"{count:,} {plural}")
    return ", ".join(parts) or "nothing"


def _figures_table(report: Report) -> Table:
    table = Table(box=TABLE_BOX, pad_edge=False)
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for label, name in figure_rows(report):
        before, after = _figure(report.before, name), _figure(report.after, name)
        table.add_row(
            label,
            figure_text(name, before),
            figure_text(name, after),
            change_text(name, before, after),
        )
    return table


def _figure(figures: Figures, name: str) -> float | None:
    value: float | None = getattr(figures, name)
    return value


def _check_line(report: Report, name: str) -> str:
    check = report.checks[name]
    if check is None:
        return f"check {name}: not made"
    verdict = "[green]passed[/green]" if check.passed else "[red]FELL SHORT[/red]"
    error = "not measured" if check.max_abs_err is None else f"{check.max_abs_err:.3g}"
    provider = f", {check.provider}" if check.provider else ""
    return (
        f"check {escape(name)}: {verdict} "
        f"(largest error {error}, tolerance {check.tolerance:.3g}{escape(provider)})"
    )


def _parameters_table(report: Report) -> Table:
    """Return the parameters that shrank most."""

    def lost(before: tuple[int, ...], after: tuple[int, ...]) -> int:
        return _elements(before) - _elements(after)

    changes = sorted(report.parameters, key=lambda c: -lost(c.before, c.after))
    table = Table(box=TABLE_BOX, pad_edge=False)
    table.add_column(f"parameters that shrank most (of {len(changes)})")
    for heading in ("shape before", "shape after", "elements"):
        table.add_column(heading, justify="right")
    for change in changes[:MOST_PARAMETERS]:
        table.add_row(
            escape(change.name),
            "x".join(map(str, change.before)),
            "x".join(map(str, change.after)) or "gone",
            f"{-lost(change.before, change.after):+,}",
        )
    return table


def _elements(shape: tuple[int, ...]) -> int:
    count = 1 if shape else 0
    for size in shape:
        count *= size
    return count


def _grouped(kept: tuple[Kept, ...]) -> list[Kept]:
    """Join what was kept for the same reason, the most frequent reason first."""
    counts = Counter(k.why for k in kept)
    first = {k.why: k.what for k in reversed(kept)}
    return [
        Kept(first[why] if n == 1 else f"{first[why]} and {n - 1} more", why)
        for why, n in counts.most_common()
    ]
