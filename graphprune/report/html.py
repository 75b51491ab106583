"""The report as one HTML page: no script, and nothing loaded from anywhere."""

from __future__ import annotations

from typing import Any

import jinja2

from graphprune.report.data import Report
from graphprune.report.text import change_text, figure_rows, figure_text, removed_text

__all__ = ["render_html"]

BAR_HEIGHT = 18
"""Pixels per row of the chart."""

LABEL_WIDTH = 300
BAR_WIDTH = 420
NUMBER_WIDTH = 120


def render_html(report: Report) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphprune.report", package_path="."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    rows = [
        {
            "label": label,
            "before": figure_text(name, getattr(report.before, name)),
            "after": figure_text(name, getattr(report.after, name)),
            "change": change_text(name, getattr(report.before, name), getattr(report.after, name)),
        }
        for label, name in figure_rows(report)
    ]
    return environment.get_template("page.html.jinja").render(
        report=report,
        figures=rows,
        removed=removed_text(report.removed),
        chart=_chart(report),
    )


def _chart(report: Report) -> dict[str, Any]:
    """Return the geometry of the bar chart: output channels of every weight that changed."""
    weights = [change for change in report.parameters if len(change.before) >= 2]
    widest = max((change.before[0] for change in weights), default=1)
    bars = []
    for i, change in enumerate(weights):
        after = change.after[0] if change.after else 0
        bars.append(
            {
                "name": change.name,
                "y": i * BAR_HEIGHT,
                "before": change.before[0],
                "after": after,
                "before_px": round(BAR_WIDTH * change.before[0] / widest, 1),
                "after_px": round(BAR_WIDTH * after / widest, 1),
            }
        )
    return {
        "bars": bars,
        "row": BAR_HEIGHT,
        "left": LABEL_WIDTH,
        "width": LABEL_WIDTH + BAR_WIDTH + NUMBER_WIDTH,
        "height": max(1, len(bars)) * BAR_HEIGHT,
    }
