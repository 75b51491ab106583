"""A hook may cut the program while it is trained: everything that belongs to the training goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.cut import cut_program
from graphprune.groups import analyze
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.training import Hook, Moment, Outcome, Recipe, Smaller, Trainer, write_slices
from tests.training.networks import data, program

STEPS = 6
"""Of an epoch: 96 samples, 16 at a time."""


class CutAt(Hook):
    """Cuts off every second channel before the given step."""

    def __init__(self, start: Program, step: int) -> None:
        self.start, self.step, self.is_cut = start, step, False
        self.groups = analyze(start)
        self.keep = self.groups.close(self._every_second())
        self.plan = Plan.of(start, self.groups, self.keep)

    def _every_second(self) -> Any:
        keep = self.groups.cost.everything()
        for group in self.groups:
            if not group.pinned:
                keep[group.channels[::2]] = False
        return keep

    def surgery(self, moment: Moment) -> Smaller | None:
        if self.is_cut or moment.steps < self.step:
            return None
        self.is_cut = True
        cut = cut_program(self.start, self.groups, self.keep)
        return Smaller(program=cut.program, slices=self.plan.slices)


class Stop(Exception):
    pass


class StopsAt(CutAt):
    """The same, but the run is interrupted after another step."""

    def __init__(self, start: Program, step: int, stop: int) -> None:
        super().__init__(start, step)
        self.stop = stop

    def after_step(self, moment: Moment) -> None:
        if moment.steps == self.stop:
            raise Stop


def fit(step: int, *, stop: int = -1, **options: Any) -> tuple[Program, Outcome]:
    start = program(dropout=0.0)
    recipe = Recipe(
        epochs=3,
        batch_size=16,
        optimizer="adamw",
        lr=0.01,
        average=0.8,
        mixup=0.3,
        precision="float32",
        checkpoint_seconds=0.0,
    )
    hook = StopsAt(start, step, stop)
    trainer = Trainer(
        program=start, recipe=recipe, data=data(), hooks=[hook], device="cpu", **options
    )
    return start, trainer.fit()


@pytest.mark.parametrize("step", [0, 8, STEPS])
def test_what_is_left_is_trained_to_the_end(step: int) -> None:
    start, outcome = fit(step)
    assert outcome.program.module is not start.module
    assert len(outcome.program.module.get_parameter("conv1.weight")) == 3
    assert outcome.last["epoch"] == 3
    assert outcome.last["loss"] < outcome.history[0]["loss"]
    assert not any(module.training for module in outcome.program.module.modules())
    assert all(p.grad is None for p in outcome.program.module.parameters())


def test_an_end_without_surgery_gives_the_program_back() -> None:
    start, outcome = fit(3 * STEPS)
    assert outcome.program is start


@pytest.mark.parametrize("stop", [4, 8, 9, 15, 18])
def test_a_run_goes_on_across_its_surgery(stop: int, tmp_path: Path) -> None:
    _, whole = fit(8)
    with pytest.raises(Stop):
        fit(8, stop=stop, checkpoint=tmp_path)
    _, resumed = fit(8, checkpoint=tmp_path, resume=True)
    found = dict(resumed.program.named_tensors())
    for name, tensor in whole.program.named_tensors():
        assert torch.equal(tensor, found[name]), name
    assert resumed.last["loss"] == whole.last["loss"]


def test_what_is_left_is_written_back_into_the_whole() -> None:
    start, outcome = fit(8)
    hook = CutAt(start, 0)
    before = {name: t.detach().clone() for name, t in start.named_tensors()}
    write_slices(start.module, outcome.program.module, hook.plan.slices)
    again = cut_program(start, hook.groups, hook.keep).program
    left = dict(outcome.program.named_tensors())
    for name, tensor in again.named_tensors():
        assert torch.equal(tensor, left[name]), name
    after = dict(start.named_tensors())
    gone = [i for i in range(6) if i not in hook.plan.slices["conv1.weight"][0]]
    assert torch.equal(after["conv1.weight"][gone], before["conv1.weight"][gone])
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])
