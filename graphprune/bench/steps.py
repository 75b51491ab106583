"""What a training step costs: with and without gates, of a cut program, and of the teacher, all taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.exported import flat_outputs
from graphprune.gates.insertion import Gated, insert_gates
from graphprune.gates.training import GateHook
from graphprune.groups import analyze
from graphprune.program import Program
from graphprune.scores import Scores
from graphprune.target import parse_target
from graphprune.training.batch_norm import TrainedBatchNorm
from graphprune.training.compiled import MANY_STEPS, compiled
from graphprune.training.distill import Teacher
from graphprune.training.forms import training_form
from graphprune.training.recipe import Moment
from graphprune.training.task import classification

__all__ = ["Setting", "Steps", "measure_steps"]

WARM_UP = 2
"""Steps of each kind that do not count."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How steps are taken."""

    batch_size: int = 128
    """Samples in a batch of random numbers."""
    steps: int = 15
    """How many steps of each kind count."""
    device: str = "cpu"
    """Where to compute."""
    precision: torch.dtype | None = None
    """What autocast computes in; None: float32."""
    target: str = "macs=0.5"
    """What the cut program is cut to."""
    round_to: int = 1
    """Its counts of channels are multiples of this."""
    is_compiled: bool = True
    """Whether compiled steps are timed as well."""

    def autocast(self) -> torch.autocast:
        """Return the context in which a program is called."""
        return torch.autocast(
            torch.device(self.device).type,
            self.precision or torch.bfloat16,
            enabled=self.precision is not None,
        )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Medians in milliseconds."""

    milliseconds: Mapping[str, float]

    def ratio(self, name: str, base: str = "dense") -> float:
        """Return how long one kind takes, relative to another."""
        return self.milliseconds[name] / self.milliseconds[base]

    def __str__(self) -> str:
        """Return a line for each kind."""
        return "\n".join(
            f"{name:32} {found:9.1f} ms {self.ratio(name):6.2f} x dense"
            for name, found in self.milliseconds.items()
        )


def measure_steps(program: Program, setting: Setting) -> Steps:
    """Time forward, backward, optimizer and what moves the gates, one step of each kind after the other.

    Args:
        program: Its first output is a row of logits.
        setting: How.
    """
    kinds = _kinds(program, setting)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for count in range(WARM_UP + setting.steps):
        for name, step in kinds.items():
            seconds = _timed(step, setting.device)
            if count >= WARM_UP:
                times[name].append(1e3 * seconds)
    return Steps(milliseconds={name: statistics.median(found) for name, found in times.items()})


def _kinds(program: Program, setting: Setting) -> dict[str, Callable[[], None]]:
    groups = analyze(program)
    scores = Scores(values=groups.cost.saved("macs"), method="macs")
    gated, again = (insert_gates(program, groups, scores) for _ in range(2))
    choice = choose(groups, scores.values, parse_target(setting.target), round_to=setting.round_to)
    cut = cut_program(program, groups, choice.keep).program
    kinds = {
        "dense": _step(program.clone(), setting),
        "dense, with gates": _step(gated.program, setting, hook=_hook(gated)),
        "cut": _step(cut.clone(), setting),
        "cut, torch's batch norms": _step(cut.clone(), setting, has_torchs_norms=True),
        "teacher": _look(program, setting),
    }
    if setting.is_compiled:
        kinds |= {
            "dense, compiled": _step(program.clone(), setting, steps=MANY_STEPS),
            "dense, with gates, compiled": _step(
                again.program, setting, hook=_hook(again), steps=MANY_STEPS
            ),
            "cut, compiled": _step(cut.clone(), setting, steps=MANY_STEPS),
            "teacher, compiled": _look(program, setting, steps=MANY_STEPS),
        }
    return kinds


def _hook(gated: Gated) -> GateHook:
    return GateHook(
        gated,
        parse_target("macs=0.5"),
        granularity=("channels",),
        round_to=1,
        lr=1e-9,  # all gates stay open: this is the most that gates ever cost
        penalty=1.0,
        frozen=0.4,
    )


def _timed(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _step(
    program: Program,
    setting: Setting,
    *,
    hook: GateHook | None = None,
    has_torchs_norms: bool = False,
    steps: int = 0,
) -> Callable[[], None]:
    device, layout = setting.device, _layout(program)
    module = program.module.to(device)
    form: nn.Module = training_form(program).to(memory_format=layout).train()
    if has_torchs_norms:
        for child in form.modules():
            if isinstance(child, TrainedBatchNorm):
                child.normalise = partial(F.batch_norm, training=True)
    inputs = _inputs(program, setting)
    optimizer = torch.optim.SGD(form.parameters(), lr=1e-9, momentum=0.9, nesterov=True)
    with torch.no_grad():
        classes = flat_outputs(form(*inputs))[0].shape[-1]
    form = compiled(form, device=torch.device(device), steps=steps)
    labels = torch.randint(0, classes, (setting.batch_size,), device=device)
    moment = Moment(epoch=0, step=0, steps_per_epoch=1000, epochs=10, module=module)
    if hook is not None:
        hook.before_epoch(moment)

    def step() -> None:
        with setting.autocast():
            logits = flat_outputs(form(*inputs))[0]
        loss = F.cross_entropy(logits.float(), labels)
        if hook is not None and (extra := hook.extra_loss(moment)) is not None:
            loss = loss + extra
        loss.backward()
        if hook is not None:
            hook.after_backward(moment)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _look(program: Program, setting: Setting, *, steps: int = 0) -> Callable[[], None]:
    teacher = Teacher(
        program,
        classification(),
        temperature=4.0,
        device=torch.device(setting.device),
        memory_format=_layout(program),
        steps=steps,
    )
    inputs = _inputs(program, setting)

    def look() -> None:
        with setting.autocast():
            teacher.look(inputs)

    return look


def _layout(program: Program) -> torch.memory_format:
    is_image = program.example_inputs[0].dim() == 4
    return torch.channels_last if is_image else torch.contiguous_format


def _inputs(program: Program, setting: Setting) -> tuple[Tensor, ...]:
    layout = _layout(program)
    return tuple(
        t.to(setting.device, memory_format=layout if t.dim() == 4 else torch.preserve_format)
        for t in program.batch(setting.batch_size)
    )
