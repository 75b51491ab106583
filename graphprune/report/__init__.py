"""The report: a frozen data object first, its text and its page after."""

from __future__ import annotations

from graphprune.report.data import Figures, ParameterChange, Report, parameter_changes
from graphprune.report.html import render_html
from graphprune.report.text import render_text

__all__ = [
    "Figures",
    "ParameterChange",
    "Report",
    "parameter_changes",
    "render_html",
    "render_text",
]
