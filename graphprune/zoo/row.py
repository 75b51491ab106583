"""One model of the zoo: capture, analyse, choose, cut, prove, export, compare; what came of it is a row."""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphprune.capture import capture
from graphprune.check import Check
from graphprune.cost import Cost
from graphprune.errors import PassError, TargetError
from graphprune.groups import DependencyGroups
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.target import parse_target
from graphprune.textform import format_pass
from graphprune.verify_capture import verify_capture
from graphprune.zoo.models import ZooModel
from graphprune.zoo.peer import attempt

__all__ = ["Job", "Row", "run_model"]

_CHECKS = ("captured", "surgery", "onnx")

NEAREST = 0.99
"""A choice must come at least this near to the target from below."""
PEER_RATIO = 0.3
"""What Torch-Pruning removes of every group: about half the MACs."""
PEER_S = 300.0
"""Seconds of processor time that it gets."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do with every model."""

    target: str = "macs=0.5"
    """What the cut must reach."""
    method: str = "magnitude"
    """How channels are scored."""
    export: bool = True
    """Whether to export to ONNX and compare in ONNX Runtime."""
    peer: bool = False
    """Whether to let Torch-Pruning try the model, too."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one model; what was not reached is None."""

    model: str
    kind: str
    input: str
    """One sample, ``3x64x64``."""
    job: Job
    tracer: str | None = None
    """``fx`` or ``export``, and ``fixed batch`` where the batch may not vary."""
    params: tuple[int, int] | None = None
    """Before and after, counted in the tensors."""
    macs: tuple[int, int] | None = None
    """Before and after, for one sample, from the cost model."""
    groups: int | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    """What the model's table asks about -> ``yes`` where it can go, else why not."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """capture, analyse, choose, cut, and ``all``: the whole row, proof and export included."""
    captured: Check | None = None
    """The program against the model that it was captured from."""
    surgery: Check | None = None
    """The cut program against the masked one."""
    onnx: Check | None = None
    """ONNX Runtime against torch."""
    peer: str = ""
    """What Torch-Pruning makes of the model, where the job asks for it."""
    memory_gib: float | None = None
    """Peak memory of the process by the end of the row."""
    failure: str | None = None
    """Full text of the first failure."""

    @property
    def passed(self) -> bool:
        """Whether everything that was asked for was done and every check holds."""
        return self.failure is None

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        data = dataclasses.asdict(self)
        for name in _CHECKS:
            check: Check | None = getattr(self, name)
            data[name] = None if check is None else check.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Return the row that `to_json` wrote; an earlier version may have left out what it did not know."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        fields["job"] = Job(**data["job"])
        for name in ("params", "macs"):
            fields[name] = None if data[name] is None else tuple(data[name])
        for name in _CHECKS:
            fields[name] = None if data.get(name) is None else Check(**data[name])
        return cls(**fields)


def run_model(model: ZooModel, job: Job) -> Row:
    """Take one model through everything; a failure ends the row, not the run."""
    row = Row(model=model.name, kind=model.kind, input=model.input_text, job=job)
    started = time.perf_counter()
    state = _State(row)
    try:
        _fill(state, model, job)
    # A row says what went wrong, whatever it was: the next model is not to blame for it.
    except Exception as error:
        state.set(failure=_text(error))
    if job.peer:
        state.set(peer=attempt(model.build(), model.example(), ratio=PEER_RATIO, limit_s=PEER_S))
    scale = 2**30 if sys.platform == "darwin" else 2**20
    state.set(
        seconds={**state.row.seconds, "all": time.perf_counter() - started},
        memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale,
    )
    return state.row


class _State:
    """The row so far, so that a failure keeps what was found before it."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def set(self, **changes: Any) -> None:
        self.row = dataclasses.replace(self.row, **changes)


def _fill(state: _State, model: ZooModel, job: Job) -> None:
    module, example = model.build(), model.example()
    started = time.perf_counter()
    program = capture(
        module, example, outputs=model.outputs, source=f"{model.library}:{model.name}"
    )
    seconds = {"capture": time.perf_counter() - started}
    batch = "" if program.dynamic_batch else ", fixed batch"
    captured = verify_capture(module, program, seed=2)
    state.set(tracer=f"{program.dialect}{batch}", seconds=dict(seconds), captured=captured)
    _require(captured, "capture")
    del module
    result = Pipeline.parse(_surgery(job)).run(program, device="cpu")
    groups, plan = result.facts[DependencyGroups], result.facts[Plan]
    assert isinstance(groups, DependencyGroups)
    assert isinstance(plan, Plan)
    after = groups.cost.total(plan.keep(program, groups))
    dense = groups.cost.total()
    took = [record.seconds for record in result.records]
    seconds |= {"analyse": took[0], "choose": took[1] + took[2], "cut": took[3]}
    state.set(
        params=(_count(program), _count(result.program)),
        macs=(dense.macs, after.macs),
        groups=len(groups),
        parts=_parts(groups, model.parts),
        seconds=seconds,
        surgery=result.checks["surgery"],
    )
    _require(result.checks["surgery"], "surgery")
    _require_costs(state.row, after, dense)
    if job.export:
        del groups, plan
        exported = _export(result.program)
        state.set(onnx=exported.checks["onnx"])
        _require(exported.checks["onnx"], "onnx")


def _parts(groups: DependencyGroups, places: Mapping[str, str]) -> dict[str, str]:
    """Say of each place whether its channels can go."""
    found = {}
    for part, place in places.items():
        group = next((g for g in groups if place in map(str, g.places)), None)
        found[part] = "none" if group is None else group.pinned or "yes"
    return found


def _surgery(job: Job) -> str:
    choice = format_pass("choose-channels", {"target": job.target})
    return f"dependency-groups,{job.method},{choice},remove-channels,clean-up"


def _export(program: Program) -> PipelineResult:
    with tempfile.TemporaryDirectory(prefix="graphprune-zoo-") as folder:
        return Pipeline.parse("export-onnx{measure=false}").run(program, device="cpu", out=folder)


def _count(program: Program) -> int:
    return sum(p.numel() for p in program.module.parameters())


def _require(check: Check, name: str) -> None:
    if not check.passed:
        raise PassError(f"the {name} check fell short: {check.detail}")


def _require_costs(row: Row, after: Cost, dense: Cost) -> None:
    """Raise unless the choice is at or under the target and near it, and the cut program is what was predicted."""
    target = parse_target(row.job.target)
    if target.ratio is None:
        limits = target.limits(dense)
        reached = [
            getattr(after, n) / getattr(limits, n)
            for n in ("macs", "params")
            if getattr(target, n) is not None
        ]
        if not NEAREST <= max(reached) <= 1:
            raise TargetError(
                f"expected to land at {NEAREST:.0%} to 100% of the target {row.job.target}, found "
                f"{max(reached):.2%} ({after.macs:,} of {dense.macs:,} MACs, {after.params:,} of "
                f"{dense.params:,} parameters)"
            )
    assert row.params is not None
    predicted = (dense.params, after.params)
    if row.params != predicted:
        raise PassError(f"expected parameters {predicted} from the cost model, found {row.params}")


def _text(error: BaseException) -> str:
    """Return the class and message of an error and of what caused it."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = f"{type(current).__name__}: {current}"
        if not parts or str(current) not in parts[-1]:
            parts.append(text)
        current = current.__cause__
    return "\ncaused by ".join(parts)


def warm_up() -> None:
    """Load what the first run loads, so that the seconds of the first row are its own."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    program = capture(tiny.eval(), torch.zeros(1, 3, 8, 8))
    Pipeline.parse(_surgery(Job())).run(program, device="cpu", verify=False)
