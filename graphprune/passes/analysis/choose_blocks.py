"""Choose which residual blocks go: those that the outputs miss least for what they save.

Blocks go one by one. Before each, every one that is left is tried: without it and those that are already gone, the
program runs on training samples, and the squared error of its outputs, relative to their variance, is taken. The one
that adds the least error for each multiply-accumulate (or parameter) that it saves goes next. What a block adds changes
with what is gone, up and down, so nothing is taken from the rounds before.

Greedy removal by the measured output is our own choice among the known ways to rank blocks; that residual blocks can
go one by one, and most of them at little cost, is from Veit, Wilber and Belongie 2016, "Residual Networks Behave Like
Ensembles of Relatively Shallow Networks", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from graphprune.budget import Target, parse_target
from graphprune.cost import Cost, Resource, with_blocks
from graphprune.errors import DataError, TargetError, UsageError
from graphprune.groups import DependencyGroups
from graphprune.output_error import OutputError
from graphprune.pipeline import Context, Facts, Pass
from graphprune.plan import Plan, fingerprint
from graphprune.program import Program
from graphprune.residual import (
    ResidualBlock,
    bypass,
    find_residual_blocks,
    sharing,
    without_blocks,
)

__all__ = ["ChooseBlocks"]


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

    def run(self, program: Program, context: Context) -> Plan:
        """Return the plan that removes them."""
        groups = context.need(DependencyGroups)
        blocks = find_residual_blocks(program, groups)
        limits = self._limits(program, groups)
        chosen = self._chosen(program, groups, blocks, limits, context)
        after = without_blocks(program, groups, chosen) if chosen else program
        return Plan(
            slices={},
            blocks=after.origin.blocks if after.origin is not None else (),
            model=program.source,
            fingerprint=fingerprint(after),
            method=self.name,
            target=self.target,
            seed=context.seed,
        )

    def check(self, context: Context) -> None:
        """Look at the options and the data."""
        self._target()
        if not 0 < self.share <= 1 or self.num_samples < 1 or self.batch_size < 1:
            raise UsageError(
                f"{self.name} expected share above 0 up to 1 and at least one sample, found share={self.share:g} "
                f"num_samples={self.num_samples} batch_size={self.batch_size}"
            )
        if context.data is None:
            raise DataError(
                f"{self.name} expected training data (labels are not needed), found none; give data= or --data"
            )

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
        whole = with_blocks(groups.cost.total(), program)
        limits = self._target().limits(whole)
        return Cost(
            params=_part_of_the_way(whole.params, limits.params, self.share),
            macs=_part_of_the_way(whole.macs, limits.macs, self.share),
        )

    def _chosen(
        self,
        program: Program,
        groups: DependencyGroups,
        blocks: Sequence[ResidualBlock],
        limits: Cost,
        context: Context,
    ) -> list[ResidualBlock]:
        module = program.clone().module  # it goes to the device
        judge = OutputError(module, self._samples(context), context.device)
        left, error, chosen = groups.cost.total(), 0.0, list[ResidualBlock]()
        with context.progress.task("choose-blocks: what the outputs miss least") as task:
            while over := _over(left, limits):
                saved = {b: _saved(b, left, over) for b in blocks if _is_open(b, chosen)}
                errors = dict[ResidualBlock, float]()
                for block in [block for block, share in saved.items() if share]:
                    without = partial(bypass, blocks=[*chosen, block])
                    errors[block] = judge.of(sharing(module, without))
                    task.advance()
                if not errors and self.share < 1:
                    break  # channels go the rest of the way
                if not errors:
                    raise TargetError(self._out_of_reach(program, blocks, left, limits))
                best = min(errors, key=lambda b: (errors[b] - error) / saved[b])
                error = errors[best]
                chosen = [block for block in chosen if block.sum not in best.nodes] + [best]
                left = Cost(
                    params=groups.cost.params - sum(block.params for block in chosen),
                    macs=groups.cost.macs - sum(block.macs for block in chosen),
                )
        return [block for block in blocks if block in chosen]

    def _out_of_reach(
        self, program: Program, blocks: Sequence[ResidualBlock], left: Cost, limits: Cost
    ) -> str:
        if not blocks:
            return (
                f"{program.source} has no residual block that could go: no sum of a tensor and something computed from "
                "it; leave blocks out of the granularity"
            )
        return (
            f"target {self.target!r}: without any of its {len(blocks)} residual blocks {program.source} has "
            f"{left.macs:,} MACs and {left.params:,} parameters; {limits.macs:,} and {limits.params:,} were asked for. "
            "Give a larger target, or let channels go as well: granularity channels,blocks"
        )

    def _samples(self, context: Context) -> list[Tensor]:
        assert context.data is not None
        loader = context.data.train(self.batch_size, seed=context.seed, limit=self.num_samples)
        return [batch[0] for batch in loader]


def _part_of_the_way(dense: int, limit: int, share: float) -> int:
    """Return the amount that lies between two, by factors."""
    if limit >= dense:
        return dense
    return math.floor(math.exp(math.log(dense) * (1 - share) + math.log(limit) * share) + 1e-6)


def _over(left: Cost, limits: Cost) -> tuple[Resource, ...]:
    """Return the resources of which too much is left."""
    named: tuple[Resource, ...] = ("params", "macs")
    return tuple(name for name in named if getattr(left, name) > getattr(limits, name))


def _saved(block: ResidualBlock, left: Cost, resources: Sequence[Resource]) -> float:
    """Return how much of what is left goes with a block, added up over resources."""
    return sum(float(getattr(block, name) / getattr(left, name)) for name in resources)


def _is_open(block: ResidualBlock, chosen: Sequence[ResidualBlock]) -> bool:
    """Tell whether a block is neither gone nor inside one that is."""
    return not any(block.sum == gone.sum or block.sum in gone.nodes for gone in chosen)
