"""Measure what the graph alone does not say: bytes of the exported file, and milliseconds where the model will run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from graphprune.contract import Context, Facts, Pass
from graphprune.cost import Resource
from graphprune.devices import process_count
from graphprune.errors import UsageError
from graphprune.groups import DependencyGroups, analyze
from graphprune.measured import (
    Measurements,
    exported_cuts,
    fit_latency,
    probes,
    size_products,
)
from graphprune.program import Program

__all__ = ["MeasureCosts"]


@dataclass(frozen=True, kw_only=True)
class MeasureCosts(Pass):
    """Measure the file's size, and fit a model of latency to a few cuts timed in ONNX Runtime.

    Afterwards ``size=`` and ``latency=`` are targets like ``macs=``, for every pass that chooses channels.
    """

    name: ClassVar[str] = "measure-costs"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)

    latency: bool = True
    """Whether to time cuts, which takes an export each; else only the size is measured."""

    def run(self, program: Program, context: Context) -> DependencyGroups:
        """Return the analysis with the measured costs added to its cost model."""
        groups = context.need(DependencyGroups)
        if program.dialect == "module":
            raise UsageError(
                f"{self.name} measures an exported file, and {program.source} runs whole, so that it cannot be "
                "exported; give a target of macs= or params="
            )
        if self.latency and process_count() > 1:
            raise UsageError(
                f"{self.name} times cuts in one process, found several, which would measure differently; "
                "choose channels by latency in one process, and train what is left in several"
            )
        everything = groups.cost.everything()
        choices = probes(groups, seed=context.seed) if self.latency else [everything]
        measurements = Measurements(self.spec(), program, context)
        with (
            context.progress.task("measure costs", len(choices)) as task,
            exported_cuts(program, groups, measurements) as cuts,
        ):
            sizes = size_products(program, groups, cuts.num_bytes(everything))
            cost = groups.cost.with_measured("size", sizes)
            if self.latency:
                times = cuts.milliseconds(
                    choices,
                    device=context.runtime_device,
                    seed=context.seed,
                    advance=task.advance,
                )
                fit = fit_latency(groups, choices, times)
                cost = cost.with_measured("latency", fit.products(groups))
        if program.origin is not None:
            before = self._measure_before(context, measurements)
            cost = dataclasses.replace(cost, measured_before=before)
        return dataclasses.replace(groups, cost=cost)

    def _measure_before(
        self, context: Context, measurements: Measurements
    ) -> Mapping[Resource, float]:
        """Return the same of the model that came in, which targets are fractions of."""
        groups = analyze(context.dense)
        everything = groups.cost.everything()
        with exported_cuts(context.dense, groups, measurements) as cuts:
            found: dict[Resource, float] = {"size": cuts.num_bytes(everything)}
            if self.latency:
                device = context.runtime_device
                (found["latency"],) = cuts.milliseconds(
                    [everything], device=device, seed=context.seed
                )
        return MappingProxyType(found)
