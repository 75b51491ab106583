"""Measured costs: bytes of the exported file, and milliseconds in ONNX Runtime, as functions of the channels that stay.

Bytes are exact but for the description of the graph, whose length is measured once. Milliseconds are a model: a
few cuts of the program are exported and timed where it will run, and

    latency(kept) = a x MACs of dense contractions + b x MACs of thin ones + c x elements of all tensors + d

is fitted to them, with coefficients that are not negative. A contraction is thin where a result takes few
multiplications, as in a depthwise convolution: memory limits it, not arithmetic. All terms are sums of products of
counts, as MACs are, so what chooses channels by MACs chooses by milliseconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from graphprune.budget import Target, choose
from graphprune.cost import Cost, Keep, Products, element_term
from graphprune.cut import cut_program
from graphprune.errors import AnalysisError, TargetError
from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms
from graphprune.labels.trace import tensor_infos
from graphprune.onnx_export import export_onnx
from graphprune.program import Program
from graphprune.runtime import bench
from graphprune.units import Units, find_units

__all__ = ["Fit", "fit_latency", "land", "probes", "size_products", "time_cuts"]

THIN = 64
"""A result of so many multiplications, or fewer, costs the memory that it touches."""
PROBES = (0.85, 0.7, 0.55, 0.4, 0.7, 0.4)
"""MACs that are left in the cuts that are timed, as fractions; where channels go differs from cut to cut."""
SECONDS = 12.0
"""How long all of them are timed together."""
ROUNDS = 5
"""How many choices are timed at most before one is settled on."""
NEAR = 0.03
"""A choice is good enough this far below the limit, as a fraction of the dense latency."""


class _HasKeep(Protocol):
    @property
    def keep(self) -> Keep: ...


C = TypeVar("C", bound=_HasKeep)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model of latency, and how well it explains what was measured."""

    coefficients: Mapping[str, float]
    """Milliseconds for each unit of a feature; ``constant`` is the rest."""
    error: float
    """Largest relative distance of the model from a measurement."""

    def products(self, groups: DependencyGroups) -> Products:
        """Return the model as a sum of products."""
        features = _features(groups)
        parts = [(self.coefficients[name], products) for name, products in features.items()]
        return Products.sum_of(parts, self.coefficients["constant"])


def size_products(program: Program, groups: DependencyGroups, num_bytes: int) -> Products:
    """Return the bytes of a program's file: those of its tensors, and a rest that no cut changes.

    Args:
        program: The dense program.
        groups: Its analysis.
        num_bytes: Size of its file.
    """
    terms: list[tuple[float, Sequence[Atoms]]] = []
    for name, tensor in program.named_tensors():
        constant, factors = element_term(name, tensor, groups.labels)
        terms.append((tensor.element_size() * constant, factors))
    tensors = Products.of(terms, groups.channel_of)
    dense = float(tensors.values(groups.cost.everything()).sum())
    return Products.sum_of([(1.0, tensors)], num_bytes - dense)


def probes(groups: DependencyGroups, *, seed: int = 0) -> list[Keep]:
    """Return choices that differ in how much stays and where: what the coefficients are told apart by."""
    found: list[Keep] = [groups.cost.everything()]
    units = find_units(groups, np.ones(groups.num_channels))
    for number, macs in enumerate(PROBES):
        scores = _slanted(groups, units, seed=seed + number, slope=(-1.0, 0.0, 1.0)[number % 3])
        try:
            found.append(choose(groups, scores, Target(macs=macs), round_to="auto").keep)
        except TargetError:
            continue
    return found


def _slanted(
    groups: DependencyGroups, units: Units, *, seed: int, slope: float
) -> NDArray[np.float64]:
    """Return random scores that spare the first groups, the last ones, or neither."""
    scores = np.random.default_rng(seed).uniform(0.5, 1.5, groups.num_channels)
    place = np.zeros(groups.num_channels)
    place[units.channels] = units.group[units.owner] / max(1, len(groups) - 1) - 0.5
    slanted: NDArray[np.float64] = scores * np.exp(2.0 * slope * place)
    return slanted


def time_cuts(
    program: Program,
    groups: DependencyGroups,
    choices: Sequence[Keep],
    *,
    device: str,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Export the cuts of some choices, and time them in turns; return milliseconds for one sample.

    Raises:
        ExportError: The program cannot be exported.
    """
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        paths = []
        for number, keep in enumerate(choices):
            cut = program if keep.all() else cut_program(program, groups, keep).program
            paths.append(export_onnx(cut, Path(folder) / f"{number}.onnx").path)
            advance()
        inputs = program.batch(1, seed=seed)
        return [found.median_ms for found in bench(paths, inputs, device=device, budget_s=SECONDS)]


def fit_latency(
    groups: DependencyGroups, choices: Sequence[Keep], milliseconds: Sequence[float]
) -> Fit:
    """Fit the model to measurements, each weighted by its own size.

    Raises:
        AnalysisError: There are fewer than two measurements, so nothing says what a channel costs.
    """
    if len(choices) < 2:
        raise AnalysisError(
            "expected at least one cut to measure latency by, found none; no channel can be removed"
        )
    features = _features(groups)
    names = [*features, "constant"]
    columns = [[float(p.values(keep).sum()) for keep in choices] for p in features.values()]
    matrix = np.array([*columns, np.ones(len(choices))]).T
    times = np.asarray(milliseconds)
    scale = np.maximum(matrix.max(0), 1e-12)
    found, _ = nnls(matrix / scale / times[:, None], np.ones(len(times)))
    predicted = matrix / scale @ found
    return Fit(
        coefficients=dict(zip(names, (found / scale).tolist(), strict=True)),
        error=float(np.abs(predicted / times - 1).max()),
    )


def _features(groups: DependencyGroups) -> dict[str, Products]:
    """Return the features of the model; each is a sum over nodes."""
    labels = groups.labels
    batch = max(1, labels.batch)
    elements: list[tuple[float, Sequence[Atoms]]] = []
    results: dict[str, float] = {}
    for node, value in labels.values.items():
        for info in tensor_infos(value):
            number = float(np.prod(info.shape)) / batch
            results[node] = max(results.get(node, 0.0), number)
            atoms = [f.atoms for f in info.fields]
            elements.append((number / np.prod([a.size for a in atoms]), atoms))
    thick: list[tuple[float, Sequence[Atoms]]] = []
    thin: list[tuple[float, Sequence[Atoms]]] = []
    for term in labels.terms:
        macs = term.constant * float(np.prod([f.size for f in term.factors]))
        is_thin = macs <= THIN * results.get(term.node, 0.0)
        (thin if is_thin else thick).append((term.constant, term.factors))
    return {
        "dense_macs": Products.of(thick, groups.channel_of),
        "thin_macs": Products.of(thin, groups.channel_of),
        "elements": Products.of(elements, groups.channel_of),
    }


def land(
    program: Program,
    groups: DependencyGroups,
    target: Target,
    decide: Callable[[DependencyGroups], C],
    *,
    device: str,
    seed: int = 0,
) -> C:
    """Return a choice that meets its target when it is timed; only a limit on latency has to be.

    Each choice is cut, exported and timed beside the dense program; what the model of latency was wrong by corrects
    it, and the next choice is made with the corrected one, until the measured latency is at the limit or just below.

    Args:
        program: The dense program.
        groups: Its analysis, with measured costs.
        target: What must be reached.
        decide: Makes a choice with the costs that it is given, and raises TargetError where there is none.
        device: Where to time.
        seed: Seed of the inputs.

    Raises:
        TargetError: No choice that was timed is fast enough; the message says what was measured.
    """
    choice = decide(groups)
    if target.latency is None:
        return choice
    dense = groups.cost.total().latency
    best: tuple[float, C] | None = None
    seen: list[float] = []
    for _ in range(ROUNDS):
        before, after = time_cuts(
            program, groups, [groups.cost.everything(), choice.keep], device=device, seed=seed
        )
        share, limit = after / before, target.limits(Cost(0, 0, latency=before)).latency / before
        seen.append(share)
        if share <= limit and (best is None or share > best[0]):
            best = share, choice
        if limit - NEAR <= share <= limit:
            break
        predicted = groups.cost.total(choice.keep).latency / dense
        groups = _corrected(groups, (1 - share) / max(1e-6, 1 - predicted))
        try:
            choice = decide(groups)
        except TargetError:
            break
    if best is None:
        raise TargetError(
            f"target latency={target.latency:g} was not reached: cuts were timed at "
            f"{', '.join(f'{share:.3f}' for share in seen)} of the dense program's {dense:.3f} ms. "
            "What the runtime does per call, and channels that do not fill its vectors, do not shrink; "
            f"give a target of at least latency={min(seen):.2f}, or macs="
        )
    return best[1]


def _corrected(groups: DependencyGroups, factor: float) -> DependencyGroups:
    """Return the analysis with `factor` times the latency that its model says is saved."""
    cost = groups.cost
    factor = max(factor, 0.05)
    constant = (1 - factor) * cost.total().latency
    scaled = Products.sum_of([(factor, cost.products("latency"))], constant)
    return replace(groups, cost=cost.with_measured("latency", scaled))
