"""Job: one run of the compiler, from what the user gave to what lies in the folder.

capture, compared with the user's model --> accuracy --> pipeline --> accuracy --> plan, report, files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphprune.check import Check
from graphprune.environment import environment
from graphprune.errors import CaptureError, PlanError, UsageError
from graphprune.groups import DependencyGroups, analyze
from graphprune.outcome import Kept
from graphprune.pipeline import Callback, Pipeline, PipelineResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.progress import Progress
from graphprune.report.data import Figures, Report, parameter_changes
from graphprune.staging import Staging

if TYPE_CHECKING:
    from graphprune.data import DataSource

__all__ = ["EVALUATION_BATCH", "CompileResult", "Job"]

EVALUATION_BATCH = 256
"""Samples at a time where accuracy is measured."""


@dataclass(frozen=True, kw_only=True)
class CompileResult:
    """What came out of `compile` or `apply`."""

    program: Program
    """The smaller program; `program.module` runs like the model that went in."""
    dense: Program
    """The program that went in."""
    plan: Plan | None
    """What was removed; None if nothing was chosen and nothing went, or the report says why none can tell it."""
    report: Report
    """What was found, done, proved and measured."""
    pipeline: PipelineResult = field(repr=False)
    """Facts, records and files of the run."""
    files: tuple[Path, ...] = ()
    """What was written into `out`."""

    @property
    def passed(self) -> bool:
        """Whether no check fell short."""
        return self.report.passed

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Return a copy of the user's own model, cut like the program.

        Raises:
            ApplyError: The class of the model cannot hold the cut; the message says why.
            PlanError: There is no plan; the message says why.
        """
        if self.plan is None:
            whys = [kept.why for kept in self.report.kept if kept.what == "plan.json"]
            why = whys[-1] if whys else "its pipeline made none"
            raise PlanError(f"expected a result with a plan, but {why}")
        from graphprune.apply_to import apply_plan_to

        return apply_plan_to(model, self.dense, self.program, self.plan)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `compile` and `apply` have in common."""

    model: nn.Module | str | Path | Program
    example_inputs: Any
    weights: str | Path | None
    trust: tuple[str, ...]
    trust_all: bool
    data: DataSource | None
    device: str
    seed: int
    verify: bool
    callbacks: tuple[Callback, ...]
    progress: Progress
    outputs: tuple[str, ...] = ()
    sample: tuple[Tensor, ...] | None = None
    """Inputs as a task reads them from the data; None: it is a classification."""

    def run(self, pipeline: Pipeline, folder: Staging) -> CompileResult:
        """Capture, run the pipeline, measure, and deliver the files.

        Raises:
            GraphpruneError: See `graphprune.errors` for the tree; nothing is delivered then.
        """
        dense, captured = self.captured()
        imported = self.import_check(dense)
        accuracy_before = self.accuracy(dense)
        result = pipeline.run(
            dense,
            data=self.data,
            device=self.device,
            seed=self.seed,
            out=folder.path,
            verify=self.verify,
            callbacks=self.callbacks,
            progress=self.progress,
            checkpoints=folder.checkpoints,
            resume=folder.resume,
        )
        accuracy_after = self.accuracy(result.program)
        groups = analyze(dense)
        last = result.facts.get(Plan)
        assert last is None or isinstance(last, Plan)
        plan, kept = self.plan(dense, groups, result, last)
        report = Report(
            model=dense.source,
            method=last.method or None if last else None,
            target=last.target or None if last else None,
            seed=self.seed,
            environment=environment(self.device),
            before=_figures(groups, result.measurements.get("before", {}), accuracy_before),
            after=_figures(
                analyze(result.program), result.measurements.get("after", {}), accuracy_after
            ),
            checks={**captured, "surgery": None, "onnx": None, **imported, **result.checks},
            removed=result.removed,
            kept=kept,
            passes=result.records,
            whole=_whole(dense, result.measurements),
            parameters=parameter_changes(dense, result.program),
        )
        if plan is not None:
            plan.save(folder.path / "plan.json")
        report.save(folder.path / "report.json")
        report.to_html(folder.path / "report.html")
        return CompileResult(
            program=result.program,
            dense=dense,
            plan=plan,
            report=report,
            pipeline=result,
            files=folder.deliver(),
        )

    def plan(
        self, dense: Program, groups: DependencyGroups, result: PipelineResult, last: Plan | None
    ) -> tuple[Plan | None, tuple[Kept, ...]]:
        """Return the plan of all that a pipeline removed, if one can tell it, and what the report says was kept.

        Args:
            dense: What came in.
            groups: Its analysis.
            result: What the pipeline made of it.
            last: The last choice that the pipeline made.
        """
        if result.program.origin is None:
            return last, result.kept
        try:
            plan = Plan.between(
                dense,
                groups,
                result.program,
                method=last.method if last else "",
                target=last.target if last else "",
                seed=self.seed,
                heads=result.removed.heads,
            )
        except PlanError as error:
            return None, (*result.kept, Kept("plan.json", str(error)))
        return plan, result.kept

    def captured(self) -> tuple[Program, dict[str, Check]]:
        """Return the program, and how it compares with the user's own model where there is one."""
        from graphprune.capture import capture
        from graphprune.load import is_onnx, load_model, load_weights

        if isinstance(self.model, Program):
            if self.example_inputs is not None or self.weights is not None or self.outputs:
                raise UsageError(
                    "a captured program has its inputs, outputs and weights; give example_inputs=, outputs= and "
                    "weights= to capture()"
                )
            return self.model, {}
        with self.progress.task("capturing the model"):
            model: Any = str(self.model) if isinstance(self.model, Path) else self.model
            source, weights = None, self.weights
            if isinstance(model, str) and not is_onnx(model):
                source, weights = model, None
                model = load_model(
                    model, weights=self.weights, trust=self.trust, trust_all=self.trust_all
                )
            elif isinstance(model, nn.Module) and weights is not None:
                model, weights = load_weights(model, weights), None
            program = capture(
                model, self.inputs(), outputs=self.outputs, weights=weights, source=source
            )
            return program, self.capture_check(model, program)

    def capture_check(self, model: Any, program: Program) -> dict[str, Check]:
        """Compare the program with the model; a model that runs whole is the program."""
        from graphprune.capture import evaluation_mode
        from graphprune.verify_capture import verify_capture

        is_own = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
        if not self.verify or not is_own or program.dialect == "module":
            return {}
        if any(t.is_meta for _, t in program.named_tensors()):
            return {}
        with evaluation_mode(model):
            check = verify_capture(model, program, seed=self.seed)
        if not check.passed:
            raise CaptureError(
                f"the graph that was captured of {program.source} does not compute what the model computes: "
                f"its outputs differ by {check.max_abs_err:.3g} of the largest value. Please report the model; "
                "--no-verify goes on all the same"
            )
        return {"capture": check}

    def import_check(self, dense: Program) -> dict[str, Check]:
        """Compare a program that was read from an ONNX file with that file in ONNX Runtime."""
        from graphprune.load import is_onnx
        from graphprune.runtime import open_session, parity

        if isinstance(self.model, (nn.Module, Program)) or not is_onnx(str(self.model)):
            return {}
        with self.progress.task("comparing with the file in ONNX Runtime"):
            session = open_session(self.model, self.device.replace("cuda", "auto"))
            return {"import": parity(dense, session, seed=self.seed)}

    def inputs(self) -> Any:
        """Return the example inputs: what was given, else a sample of the data, or random numbers of its shape."""
        if self.example_inputs is not None or self.data is None:
            return self.example_inputs
        if self.sample is not None:
            return self.sample
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn((1, *self.data.input_shape), generator=generator),)

    def accuracy(self, program: Program) -> float | None:
        """Return top-1 accuracy on the test split; None without data, or where it is no classification."""
        from graphprune.data import evaluate

        if self.data is None or not self.data.num_classes or self.sample is not None:
            return None
        return evaluate(
            program,
            self.data.test(EVALUATION_BATCH),
            device=self.device,
            progress=self.progress,
        )


def _whole(dense: Program, measurements: Mapping[str, Any]) -> dict[str, Any] | None:
    if dense.dialect != "module":
        return None
    return {
        "untraced": list(dense.untraced),
        "exported": dict(measurements.get("exported_parts", {})),
        "not_written": dict(measurements.get("not_written", {})),
    }


def _figures(groups: DependencyGroups, measured: Any, accuracy: float | None) -> Figures:
    return Figures(
        params=groups.cost.params,
        macs=groups.cost.macs,
        onnx_bytes=measured.get("onnx_bytes"),
        onnx_zipped_bytes=measured.get("onnx_zipped_bytes"),
        nonzero=measured.get("nonzero"),
        latency_ms=measured.get("latency_ms"),
        accuracy=accuracy,
    )
