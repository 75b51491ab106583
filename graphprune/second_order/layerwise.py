"""Layer-wise pruning of a whole network: layers in graph order, each to least squares on its own inputs.

    moments of the dense network's inputs --> how many weights each layer keeps --> per layer: which, and new values
                                                                             |
                     with inputs="pruned": moments again, behind the layers that are pruned already

Source: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon",
algorithm 1. Counting what is kept over all layers (`allocation="global"`) and inputs of the pruned network are our
reconstruction: the paper gives ratios per layer by hand, and notes that the dense network's inputs make errors add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graphprune.errors import PassError
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress
from graphprune.second_order.calibration import Moments, collect
from graphprune.second_order.layers import Layer, layers
from graphprune.second_order.weights import (
    adapt,
    chosen,
    damped,
    damped_inverse,
    live_inputs,
    obs_order_static,
    obs_prune_static,
    obs_trace,
    output_error,
    refit,
)

__all__ = ["Amount", "LayerOutcome", "Update", "counts_for", "prune_layers"]

Batches = Callable[[], Iterable[Any]]
"""Starts a new run over the same batches."""

Update = Literal["static", "exact", "refit"]
"""How values follow: as the paper's code does, exactly step by step, or by one least squares fit after the choice."""

_MEMORY = 1 << 30
"""Bytes of moments that are held at the same time, unless one layer has more."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of one weight to keep: a count, or by the error of what goes."""

    keep: int | None = None
    """Number of weights, the bias not counted."""
    tolerance: float | None = None
    """Largest sqrt(L) of a weight that goes."""


@dataclass(frozen=True, kw_only=True)
class LayerOutcome:
    """What happened to one weight."""

    layers: tuple[Layer, ...]
    """The layers that use it."""
    weights: int
    """How many numbers it has."""
    kept: int
    """How many are not zero; counted."""
    error: float
    """Mean squared change of the layer's output (one place of a convolution's), on the dense network's inputs."""
    energy: float
    """Mean square of that output itself."""
    places: float
    """Samples of the layer per element of the batch: the places of a convolution's output."""


def counts_for(
    program: Program,
    batches: Batches,
    share: float,
    names: Sequence[str],
    *,
    damping: float,
    device: str = "cpu",
) -> dict[str, int]:
    """Return how many weights each layer keeps, so that all together keep the share `share` of them.

    Sensitivities of all layers, each relative to the energy of its layer's output, are ranked together. Every layer
    keeps one weight at least.
    """
    ranked: list[Tensor] = []
    for name, moments in _moments(program, batches, names, device=device):
        grams, matrices = _joined(moments), _matrices(program, moments, device)
        energy = sum(output_error(w, g) for w, g in zip(matrices, grams, strict=True))
        parts = []
        for weight, gram in zip(matrices, grams, strict=True):
            sensitivity = obs_order_static(weight, damped_inverse(gram, damping), live_inputs(gram))
            free = sensitivity[:, : sensitivity.shape[1] - _fixed(moments)]
            parts.append(free.flatten() / max(energy, torch.finfo(torch.float64).tiny))
        ranked.append(torch.cat(parts).cpu())
        del name
    total = sum(len(part) for part in ranked)
    everything = torch.cat(ranked)
    stays = torch.zeros(total, dtype=torch.bool)
    stays[everything.argsort(descending=True, stable=True)[: round(share * total)]] = True
    split = stays.split([len(part) for part in ranked])
    return {name: max(1, int(part.sum())) for name, part in zip(names, split, strict=True)}


def prune_layers(
    program: Program,
    batches: Batches,
    amounts: Mapping[str, Amount],
    *,
    update: Update,
    inputs: Literal["dense", "pruned"] = "dense",
    damping: float = 0.01,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Program, tuple[LayerOutcome, ...]]:
    """Return a clone with exact zeros in the weights that `amounts` names, and what happened to each of them.

    Biases stay, and move along. Weights that are zero already stay zero (`static`: come first).

    Args:
        program: The dense network; it stays as it was.
        batches: Calibration inputs.
        amounts: How much to keep, by the name of the weight.
        update: How the values that stay follow.
        inputs: Whether a layer's inputs are those of the dense network, or those behind what is pruned already.
        damping: Share of the inputs' mean square that is added to the diagonal of their moments.
        device: Where to compute.
        progress: Where to show progress.

    Raises:
        PassError: Moments are singular, or a name is not that of a layer's weight.
    """
    clone = program.clone()
    known = {layer.weight for layer in layers(program)}
    if unknown := [name for name in amounts if name not in known]:
        raise PassError(
            f"expected weights of linear or convolution layers, found {', '.join(unknown[:3])}; "
            f"known: {', '.join(sorted(known)[:8])}"
        )
    names = [n for n in dict.fromkeys(layer.weight for layer in layers(program)) if n in amounts]
    outcomes = []
    images = sum(len(_first(batch)) for batch in batches())
    progress = progress or SilentProgress()
    with torch.no_grad(), progress.task("prune layers", len(names)) as task:
        for name, moments in _moments(program, batches, names, device=device):
            dense = _joined(moments)
            before = _matrices(program, moments, device)
            start, grams = before, dense
            if inputs == "pruned":
                nodes = [one.layer.node for one in moments]
                found = collect(clone, batches(), nodes, reference=program, device=device)
                here = [found[node] for node in nodes]
                grams = [gram.to(device) for gram in _joined(here)]
                crosses = [cross.to(device) for cross in _joined(here, cross=True)]
                start = [adapt(*one, damping) for one in zip(before, grams, crosses, strict=True)]
                start = [
                    new * _unpruned(old, _fixed(here))
                    for new, old in zip(start, before, strict=True)
                ]
            after = _pruned(start, grams, amounts[name], update, damping, _fixed(moments))
            _write(clone, moments[0].layer, after)
            changes = zip(after, before, dense, strict=True)
            free = slice(None, None if not _fixed(moments) else -1)
            outcomes.append(
                LayerOutcome(
                    layers=tuple(one.layer for one in moments),
                    weights=sum(w[:, free].numel() for w in after),
                    kept=sum(int(w[:, free].count_nonzero()) for w in after),
                    error=sum(output_error(new - old, gram) for new, old, gram in changes),
                    energy=sum(output_error(w, g) for w, g in zip(before, dense, strict=True)),
                    places=sum(one.count for one in moments) / len(moments) / max(1, images),
                )
            )
            task.advance()
    return clone, tuple(outcomes)


def _first(batch: Any) -> Tensor:
    first: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    return first


def _unpruned(weight: Tensor, fixed: int) -> Tensor:
    """Return 1 where a weight is not out already; bias columns may always move."""
    mask = weight != 0
    if fixed:
        mask[:, -fixed:] = True
    return mask


def _moments(
    program: Program, batches: Batches, names: Sequence[str], *, device: str
) -> Iterable[tuple[str, list[Moments]]]:
    """Yield the moments of the layers of each weight; the data runs once per gibibyte of them."""
    by_weight: dict[str, list[Layer]] = {name: [] for name in names}
    for layer in layers(program):
        if layer.weight in by_weight:
            by_weight[layer.weight].append(layer)
    tensors = dict(program.module.named_parameters())
    waiting: list[str] = []
    size = 0
    for name in [*names, None]:
        cost = 0
        if name is not None:
            features = tensors[name][0].numel() + 1
            cost = 8 * features**2 * sum(layer.groups for layer in by_weight[name])
        if waiting and (name is None or size + cost > _MEMORY):
            nodes = [layer.node for ready in waiting for layer in by_weight[ready]]
            found = collect(program, batches(), nodes, device=device)
            for ready in waiting:
                yield ready, [found.pop(layer.node) for layer in by_weight[ready]]
            waiting, size = [], 0
        if name is not None:
            waiting.append(name)
            size += cost


def _fixed(moments: Sequence[Moments]) -> int:
    """Return 1 where the bias is a column: every layer of the weight has the same one."""
    biases = {one.layer.bias for one in moments}
    return int(len(biases) == 1 and moments[0].has_constant)


def _joined(moments: Sequence[Moments], *, cross: bool = False) -> list[Tensor]:
    """Return one matrix per convolution group: the mean over all samples of all layers that share the weight."""
    total = sum(one.count for one in moments)
    size = None if _fixed(moments) else -1
    joined: Tensor | None = None
    for one in moments:
        matrix = one.cross if cross else one.gram
        assert matrix is not None
        matrix = matrix[
            :, : size if one.has_constant else None, : size if one.has_constant else None
        ]
        part = matrix.double() * (one.count / total)
        joined = part if joined is None else joined + part
    assert joined is not None
    return list(joined)


def _matrices(program: Program, moments: Sequence[Moments], device: str) -> list[Tensor]:
    """Return one weight matrix per convolution group, float64, with the bias as last column."""
    layer = moments[0].layer
    tensors = dict(program.module.named_parameters())
    weight = tensors[layer.weight].detach().double().flatten(1)
    if _fixed(moments):
        assert layer.bias is not None
        weight = torch.cat([weight, tensors[layer.bias].detach().double()[:, None]], 1)
    return list(weight.to(device).chunk(layer.groups))


def _write(program: Program, layer: Layer, matrices: Sequence[Tensor]) -> None:
    tensors = dict(program.module.named_parameters())
    weight, joined = tensors[layer.weight], torch.cat(list(matrices))
    features = weight[0].numel()
    weight.copy_(joined[:, :features].view_as(weight))
    if joined.shape[1] > features:
        assert layer.bias is not None
        tensors[layer.bias].copy_(joined[:, -1])


def _pruned(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    amount: Amount,
    update: Update,
    damping: float,
    fixed: int,
) -> list[Tensor]:
    """Prune the groups of one layer; what stays is chosen over all of them together."""
    grams = [gram.to(weight.device) for gram, weight in zip(grams, weights, strict=True)]
    moments = [damped(gram, damping) for gram in grams]
    live = [live_inputs(gram) for gram in grams]
    weights = [weight * alive for weight, alive in zip(weights, live, strict=True)]
    pairs = list(zip(weights, moments, strict=True))
    turns = None
    inverses: list[Tensor] = []
    if update == "exact":
        traces = [obs_trace(weight, gram, fixed=fixed) for weight, gram in pairs]
        sensitivity = torch.cat([errors / 2 for errors, _ in traces])
        turns = torch.cat([turn for _, turn in traces])
    else:
        inverses = [damped_inverse(gram, damping) for gram in grams]
        sensitivity = torch.cat(
            [obs_order_static(w, i, a) for w, i, a in zip(weights, inverses, live, strict=True)]
        )
    whole = chosen(sensitivity, turns, keep=amount.keep, tolerance=amount.tolerance, fixed=fixed)
    masks = whole.chunk(len(weights))
    if update == "static":
        parts = sensitivity.chunk(len(weights))
        triples = zip(weights, inverses, masks, parts, strict=True)
        return [obs_prune_static(*one) for one in triples]
    return [refit(w, g, m) for (w, g), m in zip(pairs, masks, strict=True)]
