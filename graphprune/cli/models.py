"""Commands that work on a model: compile, inspect, apply, bench, evaluate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphprune import compiler
from graphprune.cli.common import (
    DebugOption,
    DeviceOption,
    EpochsOption,
    FineTuneOption,
    InputOption,
    JsonOption,
    ModelArgument,
    NoExportOption,
    NoVerifyOption,
    OptionalData,
    OutOption,
    OutputsOption,
    PrintOption,
    RequiredData,
    ResumeOption,
    SeedOption,
    TaskOption,
    TimeOption,
    TrustAllOption,
    TrustOption,
    WeightsOption,
    emit,
    working,
)
from graphprune.contract import Pass
from graphprune.pipeline import Callback
from graphprune.program import Program
from graphprune.report.text import TABLE_BOX, print_report

__all__ = ["apply", "bench", "compile", "evaluate", "inspect"]

CHECK_FELL_SHORT = 3
"""Exit status of a build whose proof failed."""


def compile(
    model: ModelArgument,
    weights: WeightsOption = None,
    input: InputOption = None,
    output: OutputsOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME=AMOUNT",
            help="macs=, params=, size= (of the ONNX file) or latency= (of one sample in ONNX Runtime), a fraction of "
            "the dense model or an amount such as 1.2G, 500KB or 3ms; several with commas; or ratio=, the fraction of "
            "each group's channels to remove.  [default: macs=0.5]",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How channels are scored; `graphprune methods` lists the names.  [default: magnitude]",
            show_default=False,
        ),
    ] = None,
    data: OptionalData = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            metavar="NAMES",
            help="What may go, several with commas: channels (any); widths (channels outside of attention heads); "
            "head-dims, query-key-dims, value-dims (those inside); heads; query-heads (of those that share a key, as "
            "many of each); blocks (residual ones; half of the way to the target if others may go too).  "
            "[default: channels]",
            show_default=False,
        ),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            metavar="TEXT",
            help="A pipeline of your own, such as 'dependency-groups,magnitude,...', in place of --target, "
            "--method, --granularity, --round-to, --epochs and --fine-tune; `graphprune passes` lists the names.",
            show_default=False,
        ),
    ] = None,
    epochs: EpochsOption = 0,
    fine_tune: FineTuneOption = "",
    task: TaskOption = "",
    resume: ResumeOption = False,
    device: DeviceOption = "auto",
    round_to: Annotated[
        str,
        typer.Option(
            "--round-to",
            metavar="auto|N",
            help="Keep multiples of N channels where divisibility allows; auto: of 8, or less where groups are small "
            "or the target would be missed.",
        ),
    ] = "auto",
    seed: SeedOption = 0,
    out: OutOption = Path("out"),
    trust: TrustOption = None,
    trust_all: TrustAllOption = False,
    no_verify: NoVerifyOption = False,
    no_export: NoExportOption = False,
    print_between_passes: PrintOption = False,
    time_passes: TimeOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a trained model smaller, proven, exported and measured.

    Writes model.onnx, model.pt2, plan.json, report.json and report.html into DIR; after an error, nothing but the
    state of a training under way, for --resume.
    """
    given = {"target": target, "method": method, "granularity": granularity, "round_to": round_to}
    choices: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with working(debug=debug) as progress:
        result = compiler.compile(
            model,
            _inputs(input),
            **choices,
            outputs=output or (),
            data=data,
            verify=not no_verify,
            export=not no_export,
            seed=seed,
            out=out,
            weights=weights,
            trust=trust or (),
            trust_all=trust_all,
            passes=passes,
            epochs=epochs,
            fine_tune=fine_tune,
            task=task,
            resume=resume,
            device=device,
            callbacks=_printers(print_between_passes),
            progress=progress,
        )
    _finish(result, as_json=json, time_passes=time_passes)


def inspect(
    model: ModelArgument,
    weights: WeightsOption = None,
    input: InputOption = None,
    output: OutputsOption = None,
    trust: TrustOption = None,
    trust_all: TrustAllOption = False,
    show_program: Annotated[
        bool, typer.Option("--program", help="Print the captured program as well.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show groups, costs, what is pinned and why."""
    from graphprune.capture import capture
    from graphprune.report.inspection import Inspection

    with working(debug=debug) as progress:
        with progress.task("capturing the model"):
            program = capture(
                model,
                _inputs(input),
                outputs=output or (),
                weights=weights,
                trust=trust or (),
                trust_all=trust_all,
            )
        with progress.task("finding dependency groups"):
            inspection = Inspection.of(program)

    def show(console: Console) -> None:
        if show_program:
            console.print(str(program), markup=False, soft_wrap=True)
        inspection.show(console)

    report = inspection.to_json()
    emit({**report, "program": str(program)} if show_program else report, show, as_json=json)


def apply(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help="The plan.json of an earlier compilation.", show_default=False
        ),
    ],
    model: ModelArgument,
    weights: WeightsOption = None,
    input: InputOption = None,
    output: OutputsOption = None,
    data: OptionalData = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = Path("out"),
    trust: TrustOption = None,
    trust_all: TrustAllOption = False,
    no_verify: NoVerifyOption = False,
    no_export: NoExportOption = False,
    print_between_passes: PrintOption = False,
    time_passes: TimeOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replay a plan on the model it was made for."""
    with working(debug=debug) as progress:
        result = compiler.apply(
            plan,
            model,
            _inputs(input),
            outputs=output or (),
            data=data,
            verify=not no_verify,
            export=not no_export,
            seed=seed,
            out=out,
            weights=weights,
            trust=trust or (),
            trust_all=trust_all,
            device=device,
            callbacks=_printers(print_between_passes),
            progress=progress,
        )
    _finish(result, as_json=json, time_passes=time_passes)


def bench(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="A.onnx [B.onnx ...]", help="ONNX files.", show_default=False),
    ],
    input: InputOption = None,
    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", min=1, help="Batch size where --input is not given."),
    ] = 1,
    runs: Annotated[
        int | None,
        typer.Option(
            "--runs",
            metavar="N",
            min=1,
            help="Timed runs of each file; as many as fit into eight seconds unless given.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time ONNX files side by side.

    Runs are interleaved (A B A B ...), so that a busy moment hits all files; medians are what counts.
    """
    from graphprune.runtime import bench as measure
    from graphprune.runtime import open_session, random_inputs

    with working(debug=debug) as progress:
        session = open_session(files[0], device=device)
        inputs = _inputs(input) or random_inputs(session, batch=batch)
        with progress.task("measuring latency"):
            latencies = measure(files, inputs, runs=runs, device=device)

    def show(console: Console) -> None:
        table = Table(box=TABLE_BOX, pad_edge=False)
        table.add_column("file")
        for heading in ("median (ms)", "10 % (ms)", "90 % (ms)", "runs", "speed-up"):
            table.add_column(heading, justify="right")
        for item in latencies:
            table.add_row(
                escape(str(item.path)),
                f"{item.median_ms:.3f}",
                f"{item.p10_ms:.3f}",
                f"{item.p90_ms:.3f}",
                str(item.runs),
                f"{latencies[0].median_ms / item.median_ms:.2f}x",
            )
        console.print(table)
        shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs)
        console.print(f"inputs {shapes}; {session.provider_note}", markup=False)

    emit([item.to_json() for item in latencies], show, as_json=json)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ONNX",
            help="A MODEL as for compile, or an .onnx file.",
            show_default=False,
        ),
    ],
    data: RequiredData,
    weights: WeightsOption = None,
    input: InputOption = None,
    device: DeviceOption = "auto",
    trust: TrustOption = None,
    trust_all: TrustAllOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure top-1 accuracy on a test split."""
    with working(debug=debug) as progress:
        result = compiler.evaluate_model(
            model,
            _inputs(input),
            data=data,
            weights=weights,
            trust=trust or (),
            trust_all=trust_all,
            device=device,
            progress=progress,
        )

    def show(console: Console) -> None:
        console.print(
            f"accuracy {100 * result['accuracy']:.2f} % on {result['samples']:,} test samples of "
            f"{data} ({result['runs_on']})",
            markup=False,
        )

    emit(result, show, as_json=json)


def _inputs(texts: Sequence[str] | None) -> Any:
    from graphprune.inputs import parse_inputs

    return parse_inputs(texts) if texts else None


def _printers(is_wanted: bool) -> tuple[Callback, ...]:
    def show(previous: Pass | None, program: Program, following: Pass | None) -> None:
        where = f"before {following.spec()}" if following else "after the last pass"
        print(f"// {where}\n{program}\n", file=sys.stderr)

    return (show,) if is_wanted else ()


def _finish(result: compiler.CompileResult, *, as_json: bool, time_passes: bool) -> None:
    """Print a compilation's report, and stop with the status that its checks deserve."""

    def show(console: Console) -> None:
        print_report(result.report, console)
        for path in result.files:
            console.print(f"wrote {path}", markup=False, soft_wrap=True)

    if time_passes:
        for record in result.report.passes:
            print(f"{record.seconds:9.3f} s  {record.name}", file=sys.stderr)
    emit(result.report.to_json(), show, as_json=as_json)
    for line in result.report.failed:
        print(line, file=sys.stderr)
    if result.report.failed:
        raise typer.Exit(CHECK_FELL_SHORT)
