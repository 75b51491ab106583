"""compile and apply: a model goes in; a smaller, proven, exported and measured one comes out.

Both build a pipeline as text (`graphprune.defaults`), and this module knows no pass class.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from graphprune.contract import Pass
from graphprune.defaults import (
    DEFAULT_GRANULARITY,
    DEFAULT_METHOD,
    DEFAULT_ROUND_TO,
    DEFAULT_TARGET,
    default_pipeline,
    replay_pipeline,
)
from graphprune.devices import pick_device, take_own_gpu
from graphprune.errors import UsageError
from graphprune.job import EVALUATION_BATCH, CompileResult, Job
from graphprune.pipeline import Callback, Pipeline
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress
from graphprune.staging import staging

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
            classification; accuracy is not measured then. Of `passes`, those take it that name none themselves.
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
        if task:
            pipeline = Pipeline(_with_task(step, task) for step in pipeline.passes)
    if resume and not any(hasattr(step, "checkpoint_seconds") for step in pipeline.passes):
        raise UsageError(
            "resume: no pass of this pipeline trains, so there is nothing to go on with; give epochs= (--epochs N), "
            "or leave it out"
        )
    job = Job(
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


def _with_task(step: Pass, task: str) -> Pass:
    """Return a pass that reads samples as `task` says, where it reads any and names no task itself."""
    taken: dict[str, Any] = {"task": task}
    return replace(step, **taken) if getattr(step, "task", None) == "" else step


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
    job = Job(
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
        job = Job(
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


def _load_data(data: DataSource | str | None, task: str = "") -> DataSource | None:
    from graphprune.data import load_data

    return load_data(data, is_classification=not task) if isinstance(data, str) else data
