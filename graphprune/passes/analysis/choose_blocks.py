"""Choose which residual blocks go: those that the outputs miss least for what they save.

Blocks go one by one. Before each, every one that is left is tried: without it and those that are already gone, the
program runs on training samples, and the squared error of its outputs, relative to their variance, is taken. Its
batch norms take the statistics of the batch meanwhile, where it has 32 samples and more: they will be estimated anew
for what is left, and with those of before the error is mostly theirs. The block that adds the least error for each
multiply-accumulate (or parameter) that it saves goes next. What a block adds changes with what is gone, up and down,
so nothing is taken from the rounds before.

Greedy removal by the measured output is our own choice among the known ways to rank blocks; that residual blocks can
go one by one, and most of them at little cost, is from Veit, Wilber and Belongie 2016, "Residual Networks Behave Like
Ensembles of Relatively Shallow Networks", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphprune.contract import Context, Facts, Pass
from graphprune.cost import Cost, Resource
from graphprune.errors import TargetError, UsageError
from graphprune.groups import DependencyGroups
from graphprune.output_change import OutputChange
from graphprune.plan import Plan, fingerprint
from graphprune.program import Program
from graphprune.residual import (
    ResidualBlock,
    cost_of,
    find_residual_blocks,
    no_blocks,
    outermost,
    sharing_without,
    without_blocks,
)
from graphprune.target import Target, parse_target
from graphprune.training.drawn_samples import DrawnSamples
from graphprune.training.placement import fastest_layout, laid_out
from graphprune.training.running_statistics import BatchStatistics

__all__ = ["ChooseBlocks"]

ENOUGH = 32
"""Samples that a batch needs for its own statistics to say something; beside such ones, smaller are left out."""


@dataclass(frozen=True, kw_only=True)
class ChooseBlocks(Pass):
    """Choose the residual blocks that the outputs miss least, on unlabelled training samples."""

    name: ClassVar[str] = "choose-blocks"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    target: str = "macs=0.5"
    """Limits on macs= and params=, as for choose-channels."""
    share: float = 1.0
    """How much of the way to the target blocks go, counted in factors: 0.5 of ``macs=0.25`` is ``macs=0.5``. Below 1
    they go as far as they can, for something else is to go the rest."""
    num_samples: int = 256
    """How many training samples to run on; their labels are not looked at."""
    batch_size: int = 128
    """Samples in a batch."""
    task: str = ""
    """How samples are read, ``package.module:factory`` of a `graphprune.training.Task`; empty: (inputs, label)."""

    def run(self, program: Program, context: Context) -> Plan:
        """Return the plan that removes them."""
        groups = context.need(DependencyGroups)
        chosen = self._chosen(program, groups, context)
        after = without_blocks(program, groups, chosen) if chosen else program
        return Plan(
            slices={},
            blocks=after.lost_blocks,
            model=program.source,
            fingerprint=fingerprint(after),
            method=self.name,
            target=self.target,
            seed=context.seed,
        )

    def check(self, context: Context) -> None:
        """Look at the options and the data."""
        self._target()
        if not 0 < self.share <= 1:
            raise UsageError(f"{self.name} expected share above 0 up to 1, found {self.share:g}")
        DrawnSamples.check(self, context)

    def _target(self) -> Target:
        target = parse_target(self.target)
        if target.ratio is not None or set(target.resources) - {"macs", "params"}:
            raise TargetError(
                f"{self.name} expected a target of macs= or params=, found {self.target!r}; leave blocks out of the "
                "granularity, or give such a target"
            )
        return target

    def _limits(self, program: Program, groups: DependencyGroups) -> Cost:
        """Return the amounts that may be left."""
        dense = groups.cost.before(program)
        limits = self._target().limits(dense)
        return Cost(
            params=_part_of_the_way(dense.params, limits.params, self.share),
            macs=_part_of_the_way(dense.macs, limits.macs, self.share),
        )

    def _chosen(
        self, program: Program, groups: DependencyGroups, context: Context
    ) -> Sequence[ResidualBlock]:
        blocks, limits = find_residual_blocks(program, groups), self._limits(program, groups)
        if not _over(groups.cost.total(), limits):
            return ()
        layout = fastest_layout(program)
        module = program.clone().module.to(memory_format=layout)  # it goes to the device
        drawn = DrawnSamples.of(self, program, context)
        samples = [laid_out(inputs, layout, "cpu") for inputs in drawn]
        large = [inputs for inputs in samples if len(inputs[0]) >= ENOUGH]
        judge = OutputChange(module, large or samples, context.device)

        def error(left: fx.GraphModule) -> float:
            return judge.of(BatchStatistics(left) if large else left)

        now = _Trial(blocks=(), error=error(module), cost=groups.cost.total())
        with context.progress.task("choose-blocks: what the outputs miss least") as task:
            while over := _over(now.cost, limits):
                trials = []
                for block in _left(blocks, now.blocks):
                    going = outermost([*now.blocks, block])
                    smaller = sharing_without(module, going)
                    trial = _Trial(
                        blocks=tuple(going), error=error(smaller), cost=cost_of(smaller, groups)
                    )
                    trials.append(trial)
                    task.advance()
                useful = [trial for trial in trials if trial.saves(now, over)]
                # What two blocks share goes with the second of them.
                if trials := useful or (trials if self.share == 1 else []):
                    now = min(trials, key=lambda trial: trial.price(now, over))
                elif self.share == 1:
                    raise TargetError(self._out_of_reach(program, blocks, now.cost, limits))
                else:
                    break  # channels go the rest of the way
        return [block for block in blocks if block in now.blocks]

    def _out_of_reach(
        self, program: Program, blocks: Sequence[ResidualBlock], left: Cost, limits: Cost
    ) -> str:
        if not blocks:
            return f"{program.source} has {no_blocks(program)}; leave blocks out of the granularity"
        return (
            f"target {self.target!r}: without any of its {len(blocks)} residual blocks {program.source} has "
            f"{left.macs:,} MACs and {left.params:,} parameters; {limits.macs:,} and {limits.params:,} were asked for. "
            "Give a larger target, or let channels go as well: granularity channels,blocks"
        )


@dataclass(frozen=True)
class _Trial:
    """A program without some blocks."""

    blocks: tuple[ResidualBlock, ...]
    error: float
    """Of its outputs."""
    cost: Cost

    def saves(self, now: _Trial, resources: Sequence[Resource]) -> float:
        """Return how much less it costs than what there is now, as fractions of that, added up over resources."""
        pairs = [(getattr(now.cost, name), getattr(self.cost, name)) for name in resources]
        return sum(float((before - after) / before) for before, after in pairs)

    def price(self, now: _Trial, resources: Sequence[Resource]) -> float:
        """Return the error that it adds for what it saves; infinite where the error is no number."""
        price = (self.error - now.error) / (self.saves(now, resources) or 1.0)
        return math.inf if math.isnan(price) else price


def _left(blocks: Sequence[ResidualBlock], gone: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """Return the blocks that are neither gone nor inside one that is."""
    inside = {name for block in gone for name in (block.sum, *block.nodes)}
    return [block for block in blocks if block.sum not in inside]


def _part_of_the_way(dense: int, limit: int, share: float) -> int:
    """Return the amount that lies between two, by factors."""
    if limit >= dense:
        return dense
    logarithm = (1 - share) * math.log(dense) + share * math.log(max(1, limit))
    return math.floor(math.exp(logarithm) + 1e-6)


def _over(left: Cost, limits: Cost) -> tuple[Resource, ...]:
    """Return the resources of which too much is left."""
    named: tuple[Resource, ...] = ("params", "macs")
    return tuple(name for name in named if getattr(left, name) > getattr(limits, name))
