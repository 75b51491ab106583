"""Command line: thin commands over the library, and the boundary where errors become one line.

Results go to standard output, progress and messages to standard error. Exit status: 0 done and verified, 1 our error,
2 usage, 3 built but a check fell short.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence

import typer

from graphprune import registry, textform
from graphprune.cli.lists import demo, doctor, methods, passes
from graphprune.cli.models import apply, bench, compile, evaluate, inspect
from graphprune.defaults import DEFAULT_METHOD
from graphprune.errors import GraphpruneError, UsageError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = {
    command.__name__: command
    for command in (compile, inspect, apply, bench, evaluate, passes, methods, doctor, demo)
}
"""Every command by name, in the order of ``--help``."""

app = typer.Typer(
    name="graphprune",
    help="Cut trained PyTorch models smaller, prove that every cut is exact, and export what is left.",
    epilog="Exit status: 0 done and verified, 1 error, 2 usage, 3 built but a check fell short, "
    "130 interrupted.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS.values():
    app.command()(_command)


_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments without the program's name; those of the process unless given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    try:
        app(arguments, prog_name="graphprune")
    except (
        SystemExit
    ) as stop:  # typer's own: 0 for --help, 2 for a usage mistake, typer.Exit's code
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code == _INTERRUPTED:
            _print_interrupted(arguments)
        return code
    except GraphpruneError as error:
        _print_error(error, str(error), is_debug=is_debug)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        _print_interrupted(arguments)
        return _INTERRUPTED
    except Exception as error:  # a mistake of ours: still one line, and how to see more
        message = (
            f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"
        )
        _print_error(error, message, is_debug=is_debug)
        return 1
    return 0


def _print_interrupted(arguments: Sequence[str]) -> None:
    hint = "; the same command with --resume goes on with a training" if _trains(arguments) else ""
    print(f"error: interrupted{hint}", file=sys.stderr)


def _trains(arguments: Sequence[str]) -> bool:
    """Return whether the command has a training to go on with: epochs, or a pass that keeps the state of one."""
    if list(arguments[:1]) != ["compile"]:
        return False
    command = typer.main.get_group(app).commands["compile"]
    given = command.make_context("compile", list(arguments[1:]), resilient_parsing=True).params
    if given["epochs"]:
        return True
    with contextlib.suppress(UsageError):  # a text that nobody had read yet
        steps = textform.parse(given["passes"] or given["method"] or DEFAULT_METHOD)
        return any(hasattr(registry.load(step.name), "checkpoint_seconds") for step in steps)
    return False


def _print_error(error: Exception, message: str, *, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
