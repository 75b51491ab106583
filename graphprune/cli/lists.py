"""Commands that need no model: passes, methods, doctor, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphprune import registry
from graphprune.cli.common import DebugOption, DeviceOption, JsonOption, SeedOption, emit, working
from graphprune.report.text import TABLE_BOX, print_report

__all__ = ["demo", "doctor", "methods", "passes"]


def passes(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List every pass with its options, for --passes."""
    with working(debug=debug):
        infos = registry.infos()
    emit([i.to_json() for i in infos], lambda console: _show(console, infos), as_json=json)


def methods(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the ways to score channels, for --method."""
    with working(debug=debug):
        infos = tuple(i for i in registry.infos() if i.is_method)
    emit([i.to_json() for i in infos], lambda console: _show(console, infos), as_json=json)


def doctor(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show versions, devices and ONNX Runtime providers.

    Tells whether the CUDA provider really loads, and which extras are installed.
    """
    from graphprune.doctor import diagnose

    with working(debug=debug):
        diagnosis = diagnose()

    def show(console: Console) -> None:
        for section, entries in diagnosis.items():
            console.print(f"[bold]{escape(section)}[/bold]")
            for name, value in entries.items():
                console.print(
                    f"  {name:<26} {value if value is not None else 'not installed'}", markup=False
                )

    emit(diagnosis, show, as_json=json)


def demo(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder to write into; made where it is missing."
        ),
    ] = Path("demo"),
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a small network on digits, and compile it.

    The network is residual, the digits are scikit-learn's (the extra `demo`); under a minute on one core.
    """
    from graphprune.demo import run_demo

    with working(debug=debug) as progress:
        made = run_demo(out, device=device, seed=seed, progress=progress)

    def show(console: Console) -> None:
        print_report(made.result.report, console)
        for path in (made.model_path, *made.result.files):
            console.print(f"wrote {path}", markup=False, soft_wrap=True)

    emit(made.result.report.to_json(), show, as_json=json)
    for line in made.result.report.failed:
        print(line, file=sys.stderr)
    if made.result.report.failed:
        raise typer.Exit(3)


def _show(console: Console, infos: tuple[registry.PassInfo, ...]) -> None:
    table = Table(box=TABLE_BOX, pad_edge=False)
    for heading in ("name", "kind", "what it does", "options"):
        table.add_column(heading)
    for item in infos:
        options = "\n".join(f"{name}: {text}" for name, text in item.options.items())
        table.add_row(item.name, item.kind, escape(item.summary), escape(options))
    console.print(table)
