"""What gates cost: the time of a training step with and without them, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from graphprune.budget import parse_target
from graphprune.exported import flat_outputs
from graphprune.gates.insertion import insert_gates
from graphprune.gates.training import GateHook
from graphprune.groups import analyze
from graphprune.program import Program
from graphprune.scores import Scores
from graphprune.training.forms import training_form
from graphprune.training.recipe import Moment

__all__ = ["Overhead", "measure_overhead"]

WARM_UP = 2
"""Steps of either side that do not count."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Medians of one training step."""

    plain_ms: float
    gated_ms: float

    @property
    def fraction(self) -> float:
        """How much longer a step with gates takes."""
        return self.gated_ms / self.plain_ms - 1.0


def measure_overhead(
    program: Program,
    *,
    batch_size: int,
    steps: int,
    device: str = "cpu",
    precision: torch.dtype | None = None,
) -> Overhead:
    """Time forward, backward, optimizer and what moves the gates, one step of either side after the other.

    Args:
        program: Its first output is a row of logits.
        batch_size: Samples in a batch of random numbers.
        steps: How many steps of either side count.
        device: Where to compute.
        precision: What autocast computes in; None: float32.
    """
    groups = analyze(program)
    scores = Scores(values=groups.cost.saved("macs"), method="macs")
    gated = insert_gates(program, groups, scores)
    hook = GateHook(
        gated,
        parse_target("macs=0.5"),
        granularity=("channels",),
        round_to=1,
        lr=1e-9,  # all gates stay open: this is the most that gates ever cost
        penalty=1.0,
        frozen=0.4,
    )
    plain = _step(program.clone(), None, batch_size, device, precision)
    with_gates = _step(gated.program, hook, batch_size, device, precision)
    times: tuple[list[float], list[float]] = ([], [])
    for count in range(WARM_UP + steps):
        for step, found in zip((plain, with_gates), times, strict=True):
            seconds = _timed(step, device)
            if count >= WARM_UP:
                found.append(1e3 * seconds)
    return Overhead(plain_ms=statistics.median(times[0]), gated_ms=statistics.median(times[1]))


def _timed(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _step(
    program: Program,
    hook: GateHook | None,
    batch_size: int,
    device: str,
    precision: torch.dtype | None,
) -> Callable[[], None]:
    module = program.module.to(device)
    is_image = program.example_inputs[0].dim() == 4
    layout = torch.channels_last if is_image else torch.contiguous_format
    form: nn.Module = training_form(program).to(memory_format=layout).train()
    inputs = tuple(
        t.to(device, memory_format=layout if t.dim() == 4 else torch.preserve_format)
        for t in program.batch(batch_size)
    )
    optimizer = torch.optim.SGD(form.parameters(), lr=1e-9, momentum=0.9, nesterov=True)
    with torch.no_grad():
        classes = flat_outputs(form(*inputs))[0].shape[-1]
    labels = torch.randint(0, classes, (batch_size,), device=device)
    moment = Moment(epoch=0, step=0, steps_per_epoch=1000, epochs=10, module=module)
    if hook is not None:
        hook.before_epoch(moment)

    def step() -> None:
        with torch.autocast(
            torch.device(device).type, precision or torch.bfloat16, enabled=precision is not None
        ):
            logits = flat_outputs(form(*inputs))[0]
        loss = F.cross_entropy(logits.float(), labels)
        if hook is not None:
            loss = loss + hook.extra_loss(moment)
        loss.backward()
        if hook is not None:
            hook.after_backward(moment)
        optimizer.step()
        optimizer.zero_grad()

    return step
