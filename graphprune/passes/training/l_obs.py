"""Layer-wise optimal brain surgeon: exact zeros in the weights, and the other weights moved to make up for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphprune.contract import Context, Pass, TrainingResult
from graphprune.errors import UsageError
from graphprune.program import Program
from graphprune.second_order.chain import bound_of
from graphprune.second_order.layers import layers
from graphprune.second_order.layerwise import Amount, LayerOutcome, counts_for, prune_layers
from graphprune.training.drawn_samples import DrawnSamples

__all__ = ["LayerwiseObs"]


@dataclass(frozen=True, kw_only=True)
class LayerwiseObs(Pass):
    """Zero the weights that layers miss least, and refit the others on a few hundred unlabelled samples.

    The result's metrics count what is kept, layer by layer (``l-obs/WEIGHT/...``) and in all, and set the change of the
    output, measured on the samples, beside the paper's bound where the network is a chain of layers. Both are root mean
    squares per sample. Weights that are zero already stay zero, so the pass can be repeated after some training.
    Physical removal is another pass: ``remove-zeros``.

    Source: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon";
    `update=exact` after Frantar, Singh and Alistarh 2022, "Optimal Brain Compression".
    """

    name: ClassVar[str] = "l-obs"

    keep: float | str | None = None
    """Share of the weights to keep: one for all, as in 0.07, or by layer, as in "fc1:0.067,fc2:0.2"; others stay."""
    tolerance: float | None = None
    """Instead of keep: the largest sqrt(L) of a weight that goes."""
    update: Literal["static", "exact", "refit"] = "exact"
    """How what stays is chosen and moves: static as in the paper's code, exact, or refit once after the choice."""
    allocation: Literal["uniform", "global"] = "uniform"
    """Whether every layer keeps the share, or all layers together, by their relative errors."""
    inputs: Literal["dense", "pruned"] = "dense"
    """Whether a layer is fitted on the dense network's inputs, as in the paper, or on those behind pruned layers."""
    damping: float = 0.01
    """Share of the inputs' mean square that is added to the diagonal of their second moments."""
    num_samples: int = 1000
    """How many training samples to use, drawn at random."""
    batch_size: int = 128
    """Samples in a batch."""
    task: str = ""
    """How samples are read, ``package.module:factory`` of a `graphprune.training.Task`; empty: (inputs, label)."""

    def check(self, context: Context) -> None:
        """Look at the options, the data and the task."""
        self._check_options()
        DrawnSamples.check(self, context)

    def run(self, program: Program, context: Context) -> TrainingResult:
        """Return a clone with zeros."""
        samples = DrawnSamples.of(self, program, context, shuffle=False)

        def batches() -> Iterator[tuple[Tensor, ...]]:
            return iter(samples)

        with samples.told_by_shape():
            amounts = self._amounts(program, batches, context.device)
            pruned, outcomes = prune_layers(
                program,
                batches,
                amounts,
                update=self.update,
                inputs=self.inputs,
                damping=self.damping,
                device=context.device,
                progress=context.progress,
            )
            metrics = _metrics(outcomes)
            metrics |= _output_change(program, pruned, batches(), context.device)
        bound = bound_of(program, pruned, outcomes)
        if bound is not None:
            metrics["l-obs/bound"] = bound
        pairs = zip(program.named_tensors(), pruned.named_tensors(), strict=True)
        modified = any(not torch.equal(old, new) for (_, old), (_, new) in pairs)
        return TrainingResult(
            program=pruned if modified else program, modified=modified, metrics=metrics
        )

    def _check_options(self) -> None:
        if (self.keep is None) == (self.tolerance is None):
            raise UsageError(
                f"{self.name} expected either keep= or tolerance=, found keep={self.keep} "
                f"tolerance={self.tolerance}"
            )
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise UsageError(f"{self.name} expected keep= above 0 and up to 1, found {self.keep}")
        if self.tolerance is not None and self.tolerance < 0:
            raise UsageError(
                f"{self.name} expected tolerance= of 0 or more, found {self.tolerance}"
            )
        if self.damping < 0:
            raise UsageError(f"{self.name} expected damping= of 0 or more, found {self.damping}")
        if self.allocation == "global" and not isinstance(self.keep, float):
            raise UsageError(
                f"{self.name}: allocation=global expected one keep= for all layers, found {self.keep}"
            )

    def _amounts(self, program: Program, batches: Any, device: str) -> dict[str, Amount]:
        sizes = dict(program.module.named_parameters())
        names = list(dict.fromkeys(layer.weight for layer in layers(program)))
        if self.tolerance is not None:
            return {name: Amount(tolerance=self.tolerance) for name in names}
        if self.allocation == "global":
            assert isinstance(self.keep, float)
            counts = counts_for(
                program, batches, self.keep, names, damping=self.damping, device=device
            )
            return {name: Amount(keep=count) for name, count in counts.items()}
        shares = self._shares(program, names)
        return {n: Amount(keep=max(1, round(s * sizes[n].numel()))) for n, s in shares.items()}

    def _shares(self, program: Program, names: list[str]) -> dict[str, float]:
        if isinstance(self.keep, float):
            return dict.fromkeys(names, self.keep)
        assert self.keep is not None
        by_node = {layer.node: layer.weight for layer in layers(program)}
        known = {**by_node, **{name.removesuffix(".weight"): name for name in names}}
        known |= {name: name for name in names}
        shares = {}
        for part in self.keep.split(","):
            layer, _, text = part.strip().rpartition(":")
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if not layer or not 0 < share <= 1:
                raise UsageError(
                    f'{self.name} expected keep= as a share above 0 and up to 1, or as "fc1:0.067,fc2:0.2", '
                    f"found {part.strip()!r} in {self.keep!r}"
                )
            if layer not in known:
                raise UsageError(
                    f"{self.name}: keep= names {layer!r}, which is no linear or convolution layer; known: "
                    f"{', '.join(name.removesuffix('.weight') for name in names)}"
                )
            shares[known[layer]] = share
        return shares


def _metrics(outcomes: tuple[LayerOutcome, ...]) -> dict[str, float]:
    """Return what is kept, and the change of each layer's own output relative to that output."""
    metrics: dict[str, float] = {}
    for outcome in outcomes:
        name = f"l-obs/{outcome.layers[0].weight}"
        metrics[f"{name}/weights"] = float(outcome.weights)
        metrics[f"{name}/kept"] = float(outcome.kept)
        metrics[f"{name}/error"] = (
            (outcome.error / outcome.energy) ** 0.5 if outcome.energy else 0.0
        )
    total, kept = sum(o.weights for o in outcomes), sum(o.kept for o in outcomes)
    metrics["l-obs/weights"], metrics["l-obs/kept"] = float(total), float(kept)
    metrics["l-obs/kept_share"] = kept / total if total else 1.0
    return metrics


def _output_change(
    program: Program, pruned: Program, batches: Iterator[tuple[Tensor, ...]], device: str
) -> dict[str, float]:
    """Return the root mean square change of the first output, per sample, and that output's own root mean square."""
    before, after = (p.clone().module.to(device) for p in (program, pruned))
    change = energy = 0.0
    count = 0
    with torch.no_grad():
        for inputs in batches:
            there = [x.to(device) for x in inputs]
            old, new = (_first(module(*there)) for module in (before, after))
            change += float((new - old).double().square().sum())
            energy += float(old.double().square().sum())
            count += len(inputs[0])
    return {
        "l-obs/output_change": (change / max(1, count)) ** 0.5,
        "l-obs/output": (energy / max(1, count)) ** 0.5,
    }


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output
