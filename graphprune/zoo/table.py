"""The rows of a zoo run as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.check import Check
from graphprune.zoo.row import Row

__all__ = ["to_markdown"]

_HEADER = (
    "model",
    "input",
    "tracer",
    "parameters (M)",
    "MACs kept",
    "groups",
    "capture s",
    "analyse s",
    "choose s",
    "cut s",
    "capture error",
    "surgery error",
    "ONNX error",
    "result",
)


def to_markdown(rows: Sequence[Row], *, command: str, machine: str) -> str:
    """Return the document: what ran where, one line per model, and the full text of every failure.

    Args:
        rows: What to show, in this order.
        command: What makes the document again.
        machine: What the seconds were measured on.
    """
    failed = [row for row in rows if not row.passed]
    parts = tuple(dict.fromkeys(part for row in rows for part in row.parts))
    lines = [
        "# Model zoo",
        "",
        f"{len(rows) - len(failed)} of {len(rows)} models passed. Made with `{command}` on {machine}.",
        "",
        "Random weights. Capture error: largest difference between the outputs of the model and of the program.",
        "Surgery error: the same between the masked and the cut program, node by node. Both are relative to the",
        "largest value.",
        "ONNX error: largest absolute difference between torch and ONNX Runtime over three batch sizes, held to a",
        "tolerance that follows the size of the outputs.",
        "",
        "| " + " | ".join((*_HEADER, *parts)) + " |",
        "|---" * 3 + "|--:" * 10 + "|---|" + "---|" * len(parts),
    ]
    for row in rows:
        cells = (*_cells(row), *(row.parts.get(part, "") for part in parts))
        lines.append("| " + " | ".join(cells) + " |")
    for row in failed:
        lines += [
            "",
            f"## {row.model}",
            "",
            "```text",
            (row.failure or "").replace("```", "'''"),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    seconds = [
        f"{row.seconds[k]:.2f}" if k in row.seconds else ""
        for k in ("capture", "analyse", "choose", "cut")
    ]
    return [
        row.model,
        row.input,
        row.tracer or "",
        "" if row.params is None else f"{row.params[0] / 1e6:.2f} -> {row.params[1] / 1e6:.2f}",
        "" if row.macs is None else f"{row.macs[1] / max(1, row.macs[0]):.4f}",
        "" if row.groups is None else str(row.groups),
        *seconds,
        _error(row.captured),
        _error(row.surgery),
        _error(row.onnx) if row.job.export else "not exported",
        "passed" if row.passed else "**failed**",
    ]


def _error(check: Check | None) -> str:
    if check is None:
        return ""
    error = "not measured" if check.max_abs_err is None else f"{check.max_abs_err:.1e}"
    return error if check.passed else f"**{error}**"
