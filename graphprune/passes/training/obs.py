"""Structured optimal brain surgeon: remove whole channels, and let the weights that stay make up for them.

    1  moments      second moments of the input of every layer that reads a removable channel, from unlabelled data
    2  order        per group, the channel whose loss the other columns of its readers make up for best, again and again
    3  sensitivity  what the network's output loses when one group has lost a quarter, a half, three quarters
    4  allocation   how many channels of each group go: dynamic programming over these errors and the exact cost
    5  refit        layer by layer in graph order, least squares towards the dense layer's output, from the inputs that
                    the layer gets in the pruned network

Needs no labels and no training. What it returns is the same graph with zero columns, and the plan that removes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graphprune.budget import AUTO_STEPS, limits_room, parse_round_to, unreachable
from graphprune.contract import Context, Facts, Pass, TrainingResult
from graphprune.cost import CostModel, Keep
from graphprune.errors import PassError, TargetError, UsageError
from graphprune.groups import DependencyGroups
from graphprune.measured import Measurements, land
from graphprune.outcome import Kept
from graphprune.output_change import OutputChange
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.second_order.allocation import Levels, allocate
from graphprune.second_order.calibration import Moments, collect
from graphprune.second_order.channels import Removal, refit, removal_order
from graphprune.second_order.layers import Layer
from graphprune.second_order.readers import UnitGroup, columns_of, unit_groups
from graphprune.second_order.side_by_side import walk
from graphprune.target import Target, parse_target
from graphprune.training.drawn_samples import DrawnSamples
from graphprune.units import Units, find_units, parse_granularity

__all__ = ["StructuredObs"]

PROBES = (0.25, 0.5, 0.75)
"""Fractions of a group's units after whose removal the network's output is looked at."""
MAX_LEVELS = 64
"""A wide group is offered about this many counts."""
MEMORY = 1 << 30
"""Bytes of second moments that are held at a time."""


@dataclass(frozen=True, kw_only=True)
class StructuredObs(Pass):
    """Remove channels by second-order information, without labels and without training.

    Source: Frantar, Singh and Alistarh 2022, "Optimal Brain Compression", equation 5, for the columns of a channel as
    in ZipLM (Kurtic, Frantar and Alistarh 2023); Dong, Chen and Pan 2017 for the layer-wise second moments. The
    measured sensitivities and the order of the refit are our own.
    """

    name: ClassVar[str] = "obs"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True
    chooses: ClassVar[bool] = True

    target: str = "macs=0.5"
    """Limits such as ``macs=0.5``, ``params=5M,latency=3ms`` or ``size=0.3``, or ``ratio=0.3`` of every group."""
    granularity: str = "channels"
    """What may go: ``channels``, ``heads``, or both with a comma."""
    round_to: str = "auto"
    """As for choose-channels."""
    num_samples: int = 1024
    """How many training samples to calibrate on; their labels are not looked at."""
    batch_size: int = 128
    """Samples in a batch."""
    task: str = ""
    """How samples are read, ``package.module:factory`` of a `graphprune.training.Task`; empty: (inputs, label)."""
    damping: float = 1e-4
    """Added to the diagonal of second moments, as a fraction of their mean diagonal."""
    probe_samples: int = 256
    """How many of the samples tell the sensitivity of the output; 0: trust the layers' own errors."""
    patches: int = 0
    """At most so many patches of a batch count in the refit of a convolution; 0: all."""

    def check(self, context: Context) -> None:
        """Look at the options, the data and the task."""
        if self.damping < 0 or self.patches < 0:
            raise UsageError(
                f"{self.name} expected damping and patches of 0 or more, found damping={self.damping:g} "
                f"patches={self.patches}"
            )
        DrawnSamples.check(self, context)

    def run(self, program: Program, context: Context) -> TrainingResult:
        """Choose, make up for what goes, and return the program with the plan that removes it."""
        groups = context.need(DependencyGroups)
        drawn = DrawnSamples.of(self, program, context)
        samples = list(drawn)
        units = find_units(
            groups,
            np.ones(groups.num_channels),
            granularity=parse_granularity(self.granularity),
        )
        found, kept = unit_groups(program, groups, units)
        if not found:
            raise PassError(
                f"{self.name} found no channel that only linear and convolution layers read"
                + (f"; {kept[0].what}: {kept[0].why}" if kept else "")
            )
        with drawn.told_by_shape():
            surgeon = _Surgeon(self, program.clone(), context, groups, units, found, samples)
            removals = surgeon.order()
            try:
                levels = surgeon.choose(removals)
            except TargetError as out_of_reach:
                raise TargetError(f"{out_of_reach}{_left_alone(kept)}") from out_of_reach
            error = surgeon.carry_out(removals, levels)
        keep = surgeon.keep(removals, levels)
        plan = Plan.of(
            program,
            groups,
            keep,
            method=self.name,
            target=self.target,
            seed=context.seed,
            heads=surgeon.heads(removals, levels),
        )
        return TrainingResult(
            program=surgeon.program,
            modified=True,
            metrics={
                "obs_output_error": error,
                "obs_samples": float(sum(len(x) for x, *_ in samples)),
            },
            facts=(groups, plan),
            kept=tuple(kept),
        )


def _left_alone(kept: Sequence[Kept]) -> str:
    """Return what a message about the target adds, where there are channels that another method could take."""
    if not kept:
        return ""
    others = f", and {len(kept) - 1} more" if len(kept) > 1 else ""
    return f" obs leaves alone what other methods may cut: {kept[0].what}, {kept[0].why}{others}."


@dataclass(frozen=True, kw_only=True)
class _Allocation:
    """How many units of each group go, and the channels that then stay."""

    removed: list[int]
    keep: Keep


class _Surgeon:
    """The state of one run; `program` is a clone whose weights it changes."""

    def __init__(
        self,
        options: StructuredObs,
        program: Program,
        context: Context,
        groups: DependencyGroups,
        units: Units,
        found: Sequence[UnitGroup],
        samples: Sequence[tuple[Tensor, ...]],
    ) -> None:
        self.options = options
        self.program = program
        self.context = context
        self.groups = groups
        self.units = units
        self.found = found
        self.samples = samples
        self.layers: dict[str, Layer] = {r.layer.node: r.layer for g in found for r in g.readers}
        tensors = dict(program.named_tensors())
        self.dense: dict[str, Tensor] = {
            node: tensors[layer.weight].detach().flatten(1).clone()
            for node, layer in self.layers.items()
        }
        self.tensors = tensors
        self.probe = self._probe()

    # -- order and sensitivity --------------------------------------------------------------------------------------

    def order(self) -> list[Removal]:
        """Return the order in which each group's units go, with errors of the network's output."""
        removals: list[Removal] = []
        with self.context.progress.task("obs: what can go", total=len(self.found)) as task:
            for wave in self._waves():
                nodes = {r.layer.node for g in wave for r in g.readers}
                moments = collect(
                    self.program,
                    self.samples,
                    [n for n in self.layers if n in nodes],
                    device=self.context.device,
                )
                for group in wave:
                    removals.append(self._measured(group, moments))
                    task.advance()
        return removals

    def _waves(self) -> list[list[UnitGroup]]:
        """Split the groups so that the second moments of each part fit into memory."""
        waves: list[list[UnitGroup]] = [[]]
        held: dict[str, int] = {}
        for group in self.found:
            new = {
                r.layer.node: 8 * r.layer.groups * (self.dense[r.layer.node].shape[1] + 1) ** 2
                for r in group.readers
            }
            if waves[-1] and sum((held | new).values()) > MEMORY:
                waves.append([])
                held = {}
            held |= new
            waves[-1].append(group)
        return waves

    def _measured(self, group: UnitGroup, moments: Mapping[str, Moments]) -> Removal:
        size = len(group)
        probes = sorted({round(f * size) for f in PROBES} - {0, size}) if self.probe else []
        removal = removal_order(
            group, self.dense, moments, damping=self.options.damping, keep_weights=probes
        )
        if not self.probe or not probes:
            return removal
        ratios = []
        for count in probes:
            for node, weight in removal.weights[count].items():
                self._write(node, weight)
            ratios.append(
                self.probe.of(self.program.module) / max(float(removal.errors[count]), 1e-30)
            )
        for node in removal.weights[probes[0]]:
            self._write(node, self.dense[node])
        scale = np.interp(np.arange(size), probes, ratios)
        errors = np.maximum.accumulate(removal.errors.numpy() * scale)
        return Removal(order=removal.order, errors=torch.from_numpy(errors), weights={})

    def _write(self, node: str, weight: Tensor) -> None:
        parameter = self.tensors[self.layers[node].weight]
        with torch.no_grad():
            parameter.copy_(weight.view_as(parameter))

    def _probe(self) -> OutputChange | None:
        """Return what tells how far the outputs are from the dense program's."""
        count = self.options.probe_samples
        if not count:
            return None
        taken: list[tuple[Tensor, ...]] = []
        for inputs in self.samples:
            if count <= 0:
                break
            part = inputs if self.program.fixed_batch else tuple(x[:count] for x in inputs)
            taken.append(part)
            count -= len(part[0])
        return OutputChange(self.program.module, taken, self.context.device)

    # -- choice -----------------------------------------------------------------------------------------------------

    def choose(self, removals: Sequence[Removal]) -> list[int]:
        """Return how many units of each group go.

        Raises:
            TargetError: The target cannot be reached.
        """
        target = parse_target(self.options.target).of(self.program, self.groups)
        if target.ratio is not None:
            return [
                max(n for n in self._counts(g, 1) if n <= target.ratio * len(g) + 1e-9)
                for g in self.found
            ]

        def decide(costs: DependencyGroups) -> _Allocation:
            removed = self._allocated(removals, target, costs.cost)
            return _Allocation(removed=removed, keep=self.keep(removals, removed))

        return land(
            self.program,
            self.groups,
            target,
            decide,
            device=self.context.runtime_device,
            seed=self.context.seed,
            measurements=Measurements(self.options.spec(), self.program, self.context),
        ).removed

    def _allocated(
        self, removals: Sequence[Removal], target: Target, model: CostModel
    ) -> list[int]:
        """Return how many units of each group go to meet a target by a cost model."""
        dense = model.total()
        if limits_room(dense, target, dense) >= 0:
            return [0] * len(self.found)
        step = parse_round_to(self.options.round_to)
        least = None
        for limit in AUTO_STEPS if step == "auto" else (step,):
            counts = [self._counts(g, limit, auto=step == "auto") for g in self.found]
            levels = [
                Levels(removed=np.array(c), errors=r.errors.numpy()[c])
                for c, r in zip(counts, removals, strict=True)
            ]

            def room(chosen: Sequence[int], counts: Any = counts) -> float:
                removed = [c[i] for c, i in zip(counts, chosen, strict=True)]
                return limits_room(model.total(self.keep(removals, removed)), target, dense)

            chosen = allocate(levels, room)
            if chosen is not None:
                removed = [c[i] for c, i in zip(counts, chosen, strict=True)]
                if limit == 1 or room(chosen) <= 0.01 or step != "auto":
                    return removed
                least = removed
        if least is not None:
            return least
        reached = model.total(self.keep(removals, [c[-1] for c in counts]))
        raise TargetError(unreachable(self.groups, target, dense, reached))

    def _counts(self, group: UnitGroup, limit: int, *, auto: bool = False) -> list[int]:
        """Return how many units of a group may go, so that what is left is a multiple of `limit` channels."""
        size, width = len(group), group.width
        wanted = min(limit, 1 << max(0, (size * width // 4).bit_length() - 1)) if auto else limit
        step = wanted // int(np.gcd(wanted, width))
        allowed = [n for n in range(1, size) if (size - n) % step == 0]
        stride = -(-len(allowed) // MAX_LEVELS) if allowed else 1
        return [0, *allowed[::stride]]

    def _gone(self, removals: Sequence[Removal], removed: Sequence[int]) -> np.ndarray:
        flags = np.zeros(len(self.units), np.bool_)
        for group, removal, count in zip(self.found, removals, removed, strict=True):
            flags[[group.units[i] for i in removal.order[:count]]] = True
        return flags

    def keep(self, removals: Sequence[Removal], removed: Sequence[int]) -> Keep:
        """Return the channels that stay when so many units of each group go."""
        flags = self._gone(removals, removed)
        return self.groups.close(self.units.without(flags, self.groups.num_channels))

    def heads(self, removals: Sequence[Removal], removed: Sequence[int]) -> int:
        """Return how many attention heads go."""
        return int(self.units.is_head[self._gone(removals, removed)].sum())

    # -- refit ------------------------------------------------------------------------------------------------------

    def carry_out(self, removals: Sequence[Removal], removed: Sequence[int]) -> float:
        """Empty the columns of what goes, refit every reader in graph order, and return the output's error."""
        alive = {node: torch.ones(w.shape[1], dtype=torch.bool) for node, w in self.dense.items()}
        for group, removal, count in zip(self.found, removals, removed, strict=True):
            for reader in group.readers:
                alive[reader.layer.node][columns_of(reader, removal.order[:count])] = False
        reference = self.program.clone()
        names = [n.name for n in self.program.module.graph.nodes if n.name in alive]
        for node in names:
            self._write(node, self.dense[node] * alive[node])
        with self.context.progress.task("obs: make up for it", total=len(names)) as task:
            for moments in walk(
                self.program,
                reference,
                self.samples,
                names,
                device=self.context.device,
                max_patches=self.options.patches or None,
            ):
                self._refit(moments, alive[moments.layer.node])
                task.advance()
        return self.probe.of(self.program.module) if self.probe else float("nan")

    def _refit(self, moments: Moments, alive: Tensor) -> None:
        layer = moments.layer
        node = layer.node
        bias = None if layer.bias is None else self.tensors[layer.bias].detach()
        weight, shift = refit(self.dense[node], bias, moments, alive, damping=self.options.damping)
        self._write(node, weight)
        if layer.bias is not None and shift is not None:
            with torch.no_grad():
                self.tensors[layer.bias].copy_(shift)
