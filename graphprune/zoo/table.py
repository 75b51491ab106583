"""The rows of a zoo run as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.check import Check
from graphprune.zoo.row import PEER_RATIO, Row

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
    peers = [row.peer for row in rows if row.job.peer]
    peer = ("Torch-Pruning",) if peers else ()
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
        *_about_peers(peers),
        "| " + " | ".join((*_HEADER, *parts, *peer)) + " |",
        "|---" * 3 + "|--:" * 10 + "|---|" + "---|" * len((*parts, *peer)),
    ]
    for row in rows:
        others = [row.parts.get(part, "") for part in parts] + [row.peer] * len(peer)
        cells = (*_cells(row), *others)
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


def _about_peers(peers: Sequence[str]) -> list[str]:
    if not peers:
        return []
    runs = sum(text.startswith("runs") for text in peers)
    return [
        f"Torch-Pruning, told to remove {PEER_RATIO:g} of every group, makes something that runs of {runs} of "
        f"{len(peers)};",
        "then what is left of the parameters is given. Whether that is exact is not checked.",
        "",
    ]


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
