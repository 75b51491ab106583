"""What every command shares: options, and where output goes."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graphprune.devices import is_main_process
from graphprune.progress import BarProgress

__all__ = [
    "DebugOption",
    "DeviceOption",
    "EpochsOption",
    "InputOption",
    "JsonOption",
    "ModelArgument",
    "NoExportOption",
    "NoVerifyOption",
    "OptionalData",
    "OutOption",
    "OutputsOption",
    "PrintOption",
    "RequiredData",
    "ResumeOption",
    "SeedOption",
    "TaskOption",
    "TimeOption",
    "TrustAllOption",
    "TrustOption",
    "WeightsOption",
    "emit",
    "working",
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt, .pth, .pt2 or .onnx file, torchvision:NAME, timm:NAME, or package.module:factory.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="State dict to load: .safetensors or .pt.",
        show_default=False,
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SHAPE|FILE",
        help="Example input such as 1x3x224x224 or 1x16:int64:30522 (integers below 30522), or a file of tensors; "
        "once for each input. NAME= is the parameter that the model takes it as.",
        show_default=False,
    ),
]
OutputsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="NAME",
        help="An output of the model that counts, by key or position, where it has several; once for each. "
        "Channels that only the others need may go.",
        show_default=False,
    ),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="CLASS",
        help="Let a pickled model name package.Class besides those of torch, torchvision and timm.",
        show_default=False,
    ),
]
TrustAllOption = Annotated[
    bool,
    typer.Option("--trust-all", help="Let a pickled model name any class: it may run any code."),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="cifar10:DIR, mnist:DIR, fashion-mnist:DIR, imagefolder:DIR, digits or package.module:function; "
        "options after commas, such as cifar10:DIR,normalize=imagenet or digits,holdout=0.1.",
        show_default=False,
    ),
]
RequiredData = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="cifar10:DIR, mnist:DIR, fashion-mnist:DIR, imagefolder:DIR, digits or package.module:function; "
        "options after commas, such as cifar10:DIR,normalize=imagenet or digits,holdout=0.1.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
]
EpochsOption = Annotated[
    int,
    typer.Option(
        "--epochs", metavar="N", help="Epochs of fine-tuning after the cut; needs --data."
    ),
]
FineTuneOption = Annotated[
    str,
    typer.Option(
        "--fine-tune",
        metavar="TEXT",
        help="Options of the fine-tuning, such as 'lr=0.05 mixup=1.0 distill=0.9'; `graphprune passes` lists them.",
        show_default=False,
    ),
]
TaskOption = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="package.module:factory",
        help="What to train for, in place of classification: a function that returns a graphprune.training.Task.",
        show_default=False,
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on with a run into DIR that was interrupted in training."),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.")]
OutOption = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Folder to write into; made where it is missing."),
]
NoVerifyOption = Annotated[
    bool, typer.Option("--no-verify", help="Skip the proof that every cut is exact.")
]
NoExportOption = Annotated[bool, typer.Option("--no-export", help="Skip model.onnx and model.pt2.")]
PrintOption = Annotated[
    bool,
    typer.Option(
        "--print-between-passes", help="Print the program before and after every pass, on stderr."
    ),
]
TimeOption = Annotated[
    bool, typer.Option("--time-passes", help="Print the seconds that every pass took, on stderr.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks, and the warnings of other libraries.")
]


@contextlib.contextmanager
def working(*, debug: bool) -> Iterator[BarProgress]:
    """Keep standard output for results while the work goes on, and yield where progress is shown.

    What other libraries print goes to standard error; what they warn about is shown with ``--debug`` only.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if not debug:
            warnings.simplefilter("ignore")
            stack.enter_context(_quiet("torch", "onnxscript", "onnx_ir"))
        progress = stack.enter_context(BarProgress(is_shown=is_main_process()))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield progress


def emit(data: Any, show: Callable[[Console], None], *, as_json: bool) -> None:
    """Print a result: as JSON, or as `show` draws it for people; of several processes the first one prints."""
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
        return
    console = Console(highlight=False, soft_wrap=False)
    show(Console(width=100, highlight=False) if not console.is_terminal else console)


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
