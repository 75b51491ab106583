"""How fast analysis is: capture + analysis + cut, against Torch-Pruning on the same models in the same process.

Both sides start from a fresh copy of a model, made outside the clock, and remove the same ratio of every group's
channels by L2 magnitude, in turns (A B A B ...), so that a busy moment hits both. Whether the results run is checked
outside the clock, too. The classifier's output stays as it is on both sides: graphprune pins it by itself,
Torch-Pruning is told to.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune import registry
from graphprune.budget import choose
from graphprune.capture import capture
from graphprune.contract import Context
from graphprune.cut import cut_program
from graphprune.groups import DependencyGroups, analyze
from graphprune.scores import Scores
from graphprune.target import Target
from graphprune.zoo.models import ZooModel
from graphprune.zoo.peer import count_parameters, output_shapes, processor_time, torch_pruning

__all__ = [
    "MODELS",
    "Comparison",
    "Side",
    "at_full_size",
    "compare",
    "geometric_mean",
    "to_markdown",
]

MODELS = (
    "alexnet",
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "fcn_resnet50",
    "googlenet",
    "inception_v3",
    "lraspp_mobilenet_v3_large",
    "maxvit_t",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "r3d_18",
    "regnet_x_1_6gf",
    "regnet_y_1_6gf",
    "resnet18",
    "resnet50",
    "resnet152",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg16_bn",
    "vit_b_16",
    "wide_resnet50_2",
)
"""What is compared unless models are named: every family of torchvision."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one of the two did with one model."""

    seconds: tuple[float, ...] = ()
    """Wall time of every repeat."""
    params: int | None = None
    """Parameters that were left."""
    failure: str | None = None
    """Why there is no result that runs."""

    @property
    def median(self) -> float | None:
        """Median seconds; None after a failure."""
        return statistics.median(self.seconds) if self.seconds and self.failure is None else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both sides on one model."""

    model: str
    input: str
    params: int
    """Parameters of the dense model."""
    ours: Side
    theirs: Side

    @property
    def ratio(self) -> float | None:
        """Torch-Pruning's seconds over ours; None where one of them failed."""
        ours, theirs = self.ours.median, self.theirs.median
        return None if ours is None or theirs is None else theirs / ours


def at_full_size(model: ZooModel) -> ZooModel:
    """Return the model with an input of the size that people use: what is compared here depends on it."""
    shape = _FULL_SIZE.get(model.name, _FULL_SIZE[model.kind])
    options = {key: value for key, value in model.options.items() if key != "image_size"}
    return dataclasses.replace(model, shape=shape, options=options)


_FULL_SIZE: Mapping[str, tuple[int, ...]] = {
    "classification": (3, 224, 224),
    "segmentation": (3, 224, 224),
    "video": (3, 16, 112, 112),
    "inception_v3": (3, 299, 299),
}
"""Name, else kind, of a model -> one sample; images as in Torch-Pruning's own example for torchvision."""


def compare(
    model: ZooModel, *, ratio: float = 0.5, repeats: int = 3, limit_s: float = 40.0
) -> Comparison:
    """Time both sides on one model.

    Args:
        model: The model.
        ratio: Fraction of each group's channels to remove.
        repeats: Timed runs of each side, in turns; a side that fails is not tried again.
        limit_s: Seconds of processor time after which one run is given up.

    Raises:
        UsageError: Torch-Pruning is not installed.
    """
    theirs = torch_pruning(ratio)
    dense, example = model.build(), model.example()
    with torch.no_grad():
        expected = output_shapes(dense(example))
    sides = [Side(), Side()]
    for _ in range(repeats):
        for index, run in enumerate((lambda m, x: _graphprune(m, x, ratio), theirs)):
            if sides[index].failure is None:
                sides[index] = _timed(run, dense, example, expected, sides[index], limit_s)
    return Comparison(
        model=model.name,
        input=model.input_text,
        params=count_parameters(dense),
        ours=sides[0],
        theirs=sides[1],
    )


Run = Callable[[nn.Module, Tensor], nn.Module]


def _timed(
    run: Run,
    dense: nn.Module,
    example: Tensor,
    expected: list[tuple[int, ...]],
    side: Side,
    limit_s: float,
) -> Side:
    """Return `side` with one more run, or with the failure of it."""
    model = copy.deepcopy(dense)
    gc.collect()
    try:
        with processor_time(limit_s):
            started = time.perf_counter()
            cut = run(model, example)
            seconds = time.perf_counter() - started
        with torch.no_grad():
            found = output_shapes(cut(example))
    # Whatever either side raises is its result on this model.
    except Exception as error:
        text = " ".join(str(error).split())
        return Side(seconds=side.seconds, failure=f"{type(error).__name__}: {text}")
    params = count_parameters(cut)
    failure = None
    if found != expected:
        failure = f"the cut model gives shapes {found}, expected {expected}"
    elif params >= count_parameters(dense):
        failure = "nothing was cut"
    return Side(seconds=(*side.seconds, seconds), params=params, failure=failure)


def _graphprune(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    program = capture(model, example)
    groups = analyze(program)
    scores = registry.load("magnitude")().run(
        program, Context(facts={DependencyGroups: groups}, dense=program)
    )
    assert isinstance(scores, Scores)
    choice = choose(groups, scores.values, Target(ratio=ratio))
    return cut_program(program, groups, choice.keep).program.module


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def to_markdown(
    rows: Sequence[Comparison], *, command: str, machine: str, ratio: float, repeats: int
) -> str:
    """Return the document: the summary, one line per model, and the text of every failure.

    Args:
        rows: What to show, in this order.
        command: What makes the document again.
        machine: What the seconds were measured on.
        ratio: Fraction of each group's channels that went.
        repeats: Timed runs of each side.
    """
    ratios = [(row.ratio, row.model) for row in rows if row.ratio is not None]
    lines = [
        "# Benchmarks",
        "",
        "## Capture, analysis and cut against Torch-Pruning 1.6.1",
        "",
        f"    {command}",
        "",
        f"{machine}; one thread; {ratio:g} of every group's channels by L2 magnitude; medians of {repeats} runs",
        "each, in turns, in one process, from a fresh copy of the model. Both sides get the same example input",
        "(Torch-Pruning runs the model on it, graphprune looks at shapes alone) and give a model that runs, which is",
        "checked outside the clock. The proof that a cut is exact, which only graphprune makes, is not timed.",
        "",
    ]
    if ratios:
        least, slowest = min(ratios)
        slower = sum(value < 1 for value, _ in ratios)
        lines += [
            f"Over the {len(ratios)} models where both succeed, graphprune is "
            f"**{geometric_mean([value for value, _ in ratios]):.1f} times** faster in the geometric mean;",
            f"at the least {least:.1f} times ({slowest}); slower on {slower}.",
            "",
        ]
    lines += [
        "| model | input | graphprune s | Torch-Pruning s | ratio | parameters left: graphprune | Torch-Pruning |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    failures = [
        f"- {row.model}, {name}: `{_shortened(side.failure)}`"
        for row in rows
        for name, side in (("graphprune", row.ours), ("Torch-Pruning", row.theirs))
        if side.failure is not None
    ]
    if failures:
        lines += ["", "Failures:", "", *failures]
    return "\n".join(lines) + "\n"


def _cells(row: Comparison) -> list[str]:
    def seconds(side: Side) -> str:
        return "failed" if side.median is None else f"{side.median:.3f}"

    def left(side: Side) -> str:
        return "" if side.params is None else f"{side.params / row.params:.1%}"

    return [
        row.model,
        row.input,
        seconds(row.ours),
        seconds(row.theirs),
        "" if row.ratio is None else f"{row.ratio:.1f}",
        left(row.ours),
        left(row.theirs),
    ]


def _shortened(text: str | None, limit: int = 200) -> str:
    text = (text or "").replace("`", "'")
    return text if len(text) <= limit else f"{text[:limit]}..."
