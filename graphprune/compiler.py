"""compile and apply: a model goes in; a smaller, proven, exported and measured one comes out.

Both build a pipeline as text (`graphprune.defaults`), and this module knows no pass class.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graphprune.check import Check
from graphprune.defaults import (
    DEFAULT_GRANULARITY,
    DEFAULT_METHOD,
    DEFAULT_ROUND_TO,
    DEFAULT_TARGET,
    default_pipeline,
    replay_pipeline,
)
from graphprune.devices import pick_device, take_own_gpu
from graphprune.environment import environment
from graphprune.errors import CaptureError, PlanError, UsageError
from graphprune.groups import DependencyGroups, analyze
from graphprune.outcome import Kept
from graphprune.pipeline import Callback, Pipeline, PipelineResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress
from graphprune.report.data import Figures, Report, parameter_changes
from graphprune.staging import Staging, staging

if TYPE_CHECKING:
    from graphprune.data import DataSource

__all__ = [
    "CompileResult",
    "apply",
    "compile",
    "default_pipeline",
    "evaluate_model",
    "replay_pipeline",
]

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
    """What was removed; None if the pipeline made no plan."""
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
            PlanError: The pipeline made no plan.
        """
        if self.plan is None:
            raise PlanError("expected a result with a plan, but its pipeline made none")
        from graphprune.apply_to import apply_plan_to

        return apply_plan_to(model, self.dense, self.program, self.plan)


def compile(
    model: nn.Module | str | Path | Program,
    example_inputs: Any = None,
    *,
    target: str = DEFAULT_TARGET,
    method: str = DEFAULT_METHOD,
    data: DataSource | str | None = None,
    granularity: str = DEFAULT_GRANULARITY,
    verify: bool = True,
    export: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    round_to: int | str = DEFAULT_ROUND_TO,
    outputs: Sequence[str] = (),
    weights: str | Path | None = None,
    trust: Sequence[str] = (),
    trust_all: bool = False,
    passes: str | Pipeline | None = None,
    epochs: int = 0,
    fine_tune: str = "",
    task: str = "",
    resume: bool = False,
    device: str = "auto",
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> CompileResult:
    """Make a trained model smaller, prove that the cut is exact, export it and measure it.

    The model that is given stays as it is.

    Args:
        model: A module, or what the command line calls MODEL: a file (``.onnx`` among them), ``torchvision:NAME``,
            ``timm:NAME`` or ``package.module:factory``; a captured program does as well.
        example_inputs: One tensor, a tuple of tensors, or a mapping from parameter names to tensors, such as what a
            tokenizer returns; with `data` they may be left out, as for models that state their own.
        target: What to reach: ``macs=``, ``params=`` or ``ratio=``, several with commas.
        method: How channels are scored; one of `graphprune.registry.methods()`, with options as in
            ``magnitude{norm=1}``.
        data: A data source, or its SPEC such as ``cifar10:DIR``; some methods need it, and accuracy is measured on it.
        granularity: What may go, several with commas: ``channels``, ``widths``, ``heads`` and others as on the command
            line, and ``blocks``, residual ones, which need `data`.
        verify: Prove every surgery exact.
        export: Export to ONNX and to ``.pt2``, check the ONNX file in ONNX Runtime and measure latency.
            Without `out` the files are checked and measured, then dropped.
        seed: Seed of everything random.
        out: Folder for model.onnx, model.pt2, plan.json, report.json and report.html. After an error nothing is
            left there.
        round_to: Keep multiples of this many channels where divisibility allows; ``auto``: of 8, or less where groups
            are small or the target would be missed.
        outputs: Which outputs of the model count, by key or position; all of them unless given.
        weights: A state dict to load, ``.safetensors`` or ``.pt``.
        trust: Classes that a pickle may name besides those of torch, torchvision and timm.
        trust_all: Let a pickle name any class.
        passes: A pipeline of your own in place of the default one; it has its own target and method.
        epochs: Epochs of fine-tuning after the cut, by the pass ``fine-tune``; needs `data`.
        fine_tune: Options of that pass other than its defaults, such as ``lr=0.05 mixup=1.0 distill=0.9``.
        task: What to train for, ``package.module:factory`` of a `graphprune.training.Task`, in place of
            classification; accuracy is not measured then.
        resume: Go on with a run into `out` that was interrupted while it trained.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        callbacks: Called between passes with (previous, program, next).
        progress: Where long work is shown; nowhere unless given.

    Raises:
        GraphpruneError: See `graphprune.errors` for the tree.
    """
    take_own_gpu()
    source, sample = _load_data(data, task), None
    if task:
        from graphprune.training import load_task

        reader = load_task(task)  # before any work is done for it
        sample = reader.sample(source) if source is not None else None
    if passes is None:
        text = default_pipeline(
            target=target,
            method=method,
            granularity=granularity,
            round_to=round_to,
            has_data=source is not None,
            epochs=epochs,
            fine_tune=fine_tune,
            task=task,
            export=export,
        )
        pipeline = Pipeline.parse(text)
    else:
        changed = (target, method, granularity, round_to, epochs, fine_tune) != (
            DEFAULT_TARGET,
            DEFAULT_METHOD,
            DEFAULT_GRANULARITY,
            DEFAULT_ROUND_TO,
            0,
            "",
        )
        if changed:
            raise UsageError(
                "passes= stands in place of target=, method=, granularity=, round_to=, epochs= and fine_tune=; "
                "give one or the other"
            )
        pipeline = Pipeline.parse(passes) if isinstance(passes, str) else passes
    if resume and not any(hasattr(step, "checkpoint_seconds") for step in pipeline.passes):
        raise UsageError(
            "resume: no pass of this pipeline trains, so there is nothing to go on with; give epochs= (--epochs N), "
            "or leave it out"
        )
    job = _Job(
        model=model,
        example_inputs=example_inputs,
        outputs=tuple(outputs),
        weights=weights,
        trust=tuple(trust),
        trust_all=trust_all,
        data=source,
        device=pick_device(device),
        seed=seed,
        verify=verify,
        callbacks=tuple(callbacks),
        progress=progress or SilentProgress(),
        sample=sample,
    )
    with staging(out, resume=resume) as folder:
        return job.run(pipeline, folder)


def apply(
    plan: Plan | str | Path,
    model: nn.Module | str | Path | Program,
    example_inputs: Any = None,
    *,
    data: DataSource | str | None = None,
    outputs: Sequence[str] = (),
    verify: bool = True,
    export: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    trust: Sequence[str] = (),
    trust_all: bool = False,
    device: str = "auto",
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> CompileResult:
    """Replay a plan on the model that it was made for; the arguments are those of `compile`.

    Raises:
        PlanError: The plan does not fit the model, or its file cannot be read.
        GraphpruneError: See `graphprune.errors` for the tree.
    """
    source = _load_data(data)
    job = _Job(
        model=model,
        example_inputs=example_inputs,
        outputs=tuple(outputs),
        weights=weights,
        trust=tuple(trust),
        trust_all=trust_all,
        data=source,
        device=pick_device(device),
        seed=seed,
        verify=verify,
        callbacks=tuple(callbacks),
        progress=progress or SilentProgress(),
    )
    with staging(out) as folder, tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "plan.json" if isinstance(plan, Plan) else Path(plan)
        if isinstance(plan, Plan):
            plan.save(path)
        blocks = Plan.load(path).blocks
        text = replay_pipeline(path, blocks=blocks, has_data=source is not None, export=export)
        return job.run(Pipeline.parse(text), folder)


def evaluate_model(
    model: nn.Module | str | Path | Program,
    example_inputs: Any = None,
    *,
    data: DataSource | str,
    weights: str | Path | None = None,
    trust: Sequence[str] = (),
    trust_all: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure top-1 accuracy on the test split; the arguments are those of `compile`.

    Args:
        model: As in `compile`, or an ``.onnx`` file, which runs in ONNX Runtime.
        example_inputs: As in `compile`.
        data: A data source, or its SPEC.
        weights: As in `compile`; not with an ``.onnx`` file.
        trust: As in `compile`.
        trust_all: As in `compile`.
        device: As in `compile`.
        progress: As in `compile`.

    Returns:
        ``model``, ``data``, ``accuracy`` (a fraction), ``samples`` and ``runs_on`` (provider or device).
    """
    from graphprune.data import evaluate, load_data

    source = load_data(data) if isinstance(data, str) else data
    loader = source.test(EVALUATION_BATCH)
    if isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
        from graphprune.runtime import open_session

        if weights is not None or example_inputs is not None:
            raise UsageError(
                "an ONNX file has its weights and inputs; leave out --weights and --input"
            )
        session = open_session(model, device)
        accuracy, runs_on = evaluate(session, loader, progress=progress), session.provider
        name = str(model)
    else:
        runs_on = pick_device(device)
        job = _Job(
            model=model,
            example_inputs=example_inputs,
            weights=weights,
            trust=tuple(trust),
            trust_all=trust_all,
            data=source,
            device=runs_on,
            seed=0,
            verify=False,
            callbacks=(),
            progress=progress or SilentProgress(),
        )
        program = job.captured()[0]
        accuracy = evaluate(program, loader, device=runs_on, progress=progress)
        name = program.source
    return {
        "model": name,
        "data": source.name,
        "accuracy": accuracy,
        "samples": len(cast("Sized", loader.dataset)),
        "runs_on": runs_on,
    }


@dataclass(frozen=True, kw_only=True)
class _Job:
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
        plan, kept = _plan(dense, groups, result)
        report = Report(
            model=dense.source,
            method=plan.method or None if plan else None,
            target=plan.target or None if plan else None,
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


def _plan(
    dense: Program, groups: DependencyGroups, result: PipelineResult
) -> tuple[Plan | None, tuple[Kept, ...]]:
    """Return the plan of all that a pipeline removed, if it can be told, and what the report says was kept."""
    last = result.facts.get(Plan)
    assert last is None or isinstance(last, Plan)
    if result.program.origin is None:
        return last, result.kept
    try:
        heads = result.removed.heads
        return Plan.between(dense, groups, result.program, last=last, heads=heads), result.kept
    except PlanError as error:
        return None, (*result.kept, Kept("plan.json", str(error)))


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


def _load_data(data: DataSource | str | None, task: str = "") -> DataSource | None:
    from graphprune.data import load_data

    return load_data(data, is_classification=not task) if isinstance(data, str) else data
