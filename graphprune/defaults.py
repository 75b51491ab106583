"""The default pipelines, as text: what `compile` and `apply` do unless they are given passes.

They are text, so that what happens can be read, printed and changed on the command line, and the core knows no pass
class.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from graphprune import registry, textform
from graphprune.budget import parse_round_to
from graphprune.errors import UsageError
from graphprune.options import convert_options, option_types
from graphprune.target import Target, parse_target
from graphprune.units import parse_granularity

__all__ = [
    "DEFAULT_GRANULARITY",
    "DEFAULT_METHOD",
    "DEFAULT_ROUND_TO",
    "DEFAULT_TARGET",
    "default_pipeline",
    "replay_pipeline",
    "training_options",
]

DEFAULT_TARGET = "macs=0.5"
DEFAULT_METHOD = "magnitude"
DEFAULT_ROUND_TO = "auto"
DEFAULT_GRANULARITY = "channels"
BLOCKS = "blocks"
"""The word of a granularity that lets residual blocks go, before anything else does."""


def default_pipeline(
    *,
    target: str = DEFAULT_TARGET,
    method: str = DEFAULT_METHOD,
    granularity: str = DEFAULT_GRANULARITY,
    round_to: int | str = DEFAULT_ROUND_TO,
    has_data: bool = False,
    epochs: int = 0,
    fine_tune: str = "",
    task: str = "",
    export: bool = True,
) -> str:
    """Return the pipeline of `compile` as text.

    Raises:
        TargetError: `target` cannot be read or is out of range.
        UsageError: `method` is no method, `epochs` cannot be trained, or `fine_tune` are no options of a training.
    """
    limits = parse_target(target)  # before any work is done for it
    parse_round_to(str(round_to))
    words = [word.strip() for word in granularity.split(",")]
    has_blocks, others = BLOCKS in words, [word for word in words if word != BLOCKS]
    if others:
        parse_granularity(",".join(others))
    else:
        if (method, round_to) != (DEFAULT_METHOD, DEFAULT_ROUND_TO):
            raise UsageError(
                f"granularity={BLOCKS} chooses no channels, which the method and round_to are about, found "
                f"method={method} round_to={round_to}; give granularity=channels,{BLOCKS}, or leave them out"
            )
        training = _training(epochs, fine_tune, task, has_data=has_data)
        after = _after_the_choice(
            [], reestimate=has_data, task=task, training=training, export=export
        )
        return ",".join([*_blocks(target, task=task), *after])
    _must_be_method(method)
    choice: dict[str, textform.Value] = {"target": target}
    if round_to != DEFAULT_ROUND_TO:
        choice["round_to"] = str(round_to)
    if others != [DEFAULT_GRANULARITY]:
        choice["granularity"] = ",".join(others)
    parsed = textform.parse(method)[0]
    kind = registry.load(parsed.name)
    options = convert_options(kind, parsed.options)
    if task and "task" in option_types(kind):
        options.setdefault("task", task)
    if kind.chooses:  # it takes the limits, and leaves statistics that fit its choice
        chosen = [textform.format_pass(parsed.name, {**choice, **options})]
    else:  # what each channel is worth, and the cheapest choice that reaches the target
        chosen = [
            textform.format_pass(parsed.name, options),
            textform.format_pass("choose-channels", choice),
        ]
    steps = [
        # half of the way is made by blocks: depth and width shrink alike; channels are chosen for what they leave
        *([*_blocks(target, task=task, share=0.5), _reestimate(task)] if has_blocks else []),
        "dependency-groups",  # which channels must go together, and which cannot go
        *_measurements(limits),
        *chosen,
        *_after_the_choice(
            ["remove-channels"],  # the cut; the driver proves it exact
            reestimate=has_data and not kind.chooses,
            task=task,
            training=_training(epochs, fine_tune, task, has_data=has_data),
            export=export,
        ),
    ]
    return ",".join(steps)


def _measurements(limits: Target) -> list[str]:
    if not limits.needs_measuring:
        return []
    # bytes of the file, and milliseconds where it will run
    return ["measure-costs" if limits.latency is not None else "measure-costs{latency=false}"]


def replay_pipeline(
    plan: str | Path,
    *,
    blocks: Sequence[str] = (),
    has_data: bool = False,
    export: bool = True,
) -> str:
    """Return the pipeline of `apply` as text, for a plan that removes these residual blocks among others."""
    remove = [
        "dependency-groups",  # what the residual blocks are
        textform.format_pass("remove-blocks", {"names": tuple(blocks)}),
    ]
    steps = [
        *(remove if blocks else []),  # first: the rest of the plan is about what they leave
        "dependency-groups",  # the plan is checked against the coupling of this model
        textform.format_pass("load-plan", {"path": str(plan)}),
        *_after_the_choice(["remove-channels"], reestimate=has_data, training=[], export=export),
    ]
    return ",".join(steps)


def training_options(text: str) -> dict[str, textform.Value]:
    """Return the options of a fine-tuning that a text such as ``lr=0.05 mixup=1.0`` holds, all but the epochs.

    Raises:
        UsageError: They are no options of ``fine-tune``, or the epochs are among them.
    """
    parsed = textform.parse(f"fine-tune{{{text}}}")
    if len(parsed) > 1:
        raise UsageError(f"expected options such as lr=0.05 mixup=1.0, found {text!r}")
    options = convert_options(registry.load("fine-tune"), parsed[0].options)
    if "epochs" in options:
        raise UsageError(
            f"{text!r}: the number of epochs is none of these options; it is given by itself "
            "(epochs=, --epochs N)"
        )
    return options


def _blocks(target: str, *, task: str, **options: textform.Value) -> list[str]:
    if task:
        options["task"] = task
    return [
        "dependency-groups",  # what the residual blocks are, and what they cost
        textform.format_pass("choose-blocks", {"target": target, **options}),
        "remove-blocks",  # the driver proves it exact
    ]


def _after_the_choice(
    cut: list[str], *, reestimate: bool, training: list[str], export: bool, task: str = ""
) -> list[str]:
    steps = [*cut, "clean-up"]  # what the cut left without a purpose
    if reestimate:
        steps.append(_reestimate(task))  # fewer channels, other statistics
    steps += training  # what the cut has cost comes back
    if export:
        steps += ["export-onnx", "export-program"]  # written, read back, compared
    return steps


def _reestimate(task: str) -> str:
    return textform.format_pass("reestimate-batch-norm", {"task": task} if task else {})


def _training(epochs: int, fine_tune: str, task: str, *, has_data: bool) -> list[str]:
    if epochs < 0:
        raise UsageError(f"expected epochs from 0 on, found {epochs}")
    if epochs and not has_data:
        raise UsageError(f"epochs={epochs} needs data to train on; give data= or --data")
    if not epochs and not fine_tune:
        return []
    options = training_options(fine_tune)
    if not epochs:
        raise UsageError(
            f"{fine_tune!r} says how to fine-tune, and nothing is fine-tuned; give epochs= (--epochs N)"
        )
    if task:
        options.setdefault("task", task)
    return [textform.format_pass("fine-tune", {"epochs": epochs, **options})]


def _must_be_method(method: str) -> None:
    parsed = textform.parse(method)
    known = registry.names()
    if len(parsed) == 1 and parsed[0].name in known and registry.load(parsed[0].name).is_method:
        return
    methods = registry.methods()
    close = difflib.get_close_matches(parsed[0].name, methods, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"methods are {', '.join(methods)}"
    raise UsageError(f"no method is called {method!r}; {hint}")
