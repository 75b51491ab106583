"""graphprune: a compiler that cuts trained PyTorch models smaller and proves every cut exact.

    import graphprune as gp

    result = gp.compile(model, example_inputs, target="macs=0.5", out="out/")

Names are imported when they are first used; `capture` at once, for it shares its name with its module,
which would otherwise stand in its place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphprune.capture import capture

if TYPE_CHECKING:
    from graphprune import errors, passes
    from graphprune.check import Check
    from graphprune.compiler import CompileResult, apply, compile
    from graphprune.contract import Artifacts, Context, Facts, Pass, SurgeryResult, TrainingResult
    from graphprune.data import DataSource, evaluate, load_data
    from graphprune.groups import DependencyGroups, analyze
    from graphprune.outcome import Kept, Removed
    from graphprune.pipeline import Pipeline, PipelineResult
    from graphprune.plan import Plan
    from graphprune.program import Program
    from graphprune.report.data import Report

__all__ = [
    "Artifacts",
    "Check",
    "CompileResult",
    "Context",
    "DataSource",
    "DependencyGroups",
    "Facts",
    "Kept",
    "Pass",
    "Pipeline",
    "PipelineResult",
    "Plan",
    "Program",
    "Removed",
    "Report",
    "SurgeryResult",
    "TrainingResult",
    "analyze",
    "apply",
    "capture",
    "compile",
    "errors",
    "evaluate",
    "load_data",
    "passes",
]

_HOMES = {
    "graphprune.check": ("Check",),
    "graphprune.compiler": ("CompileResult", "apply", "compile"),
    "graphprune.contract": (
        "Artifacts",
        "Context",
        "Facts",
        "Pass",
        "SurgeryResult",
        "TrainingResult",
    ),
    "graphprune.data": ("DataSource", "evaluate", "load_data"),
    "graphprune.groups": ("DependencyGroups", "analyze"),
    "graphprune.outcome": ("Kept", "Removed"),
    "graphprune.pipeline": ("Pipeline", "PipelineResult"),
    "graphprune.plan": ("Plan",),
    "graphprune.program": ("Program",),
    "graphprune.report.data": ("Report",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("errors", "passes"):
        return importlib.import_module(f"graphprune.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
