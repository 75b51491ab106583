"""Measured costs: bytes of the exported file, and milliseconds in ONNX Runtime, as functions of the channels that stay.

Both are models, and a choice is exported and measured before it is accepted (`land`). Bytes are those of the tensors,
and a rest that no cut changes; the exporter may fold some tensors into others. For milliseconds, a few cuts of the
program are exported and timed where it will run, and

    latency(kept) = a x MACs of dense contractions + b x MACs of thin ones + c x elements of all tensors + d

is fitted to them, with coefficients that are not negative. A contraction is thin where a result takes few
multiplications, as in a depthwise convolution: memory limits it, not arithmetic. All terms are sums of products of
counts, as MACs are, so what chooses channels by MACs chooses by milliseconds.

No two measurements are alike. What a run measured is kept with the state of its training (`Measurements`), and all
that was decided follows from it: a run that goes on reads it there, and trains what the interrupted one trained.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from graphprune.budget import choose
from graphprune.checkpoint import MEASURED, Checkpoint, absolute_sums
from graphprune.contract import Context
from graphprune.cost import Cost, Keep, Products, Resource, element_term
from graphprune.cut import cut_program
from graphprune.devices import is_main_process
from graphprune.errors import AnalysisError, CheckpointError, TargetError
from graphprune.groups import DependencyGroups
from graphprune.labels.atoms import Atoms
from graphprune.labels.trace import tensor_infos
from graphprune.onnx_export import export_onnx
from graphprune.program import Program
from graphprune.runtime import bench
from graphprune.target import Target
from graphprune.units import Units, find_units

__all__ = [
    "Cuts",
    "Fit",
    "Measurements",
    "exported_cuts",
    "fit_latency",
    "land",
    "probes",
    "size_products",
]

THIN = 64
"""A result of so many multiplications, or fewer, costs the memory that it touches."""
PROBES = (0.85, 0.7, 0.55, 0.4, 0.7, 0.4)
"""MACs that are left in the cuts that are timed, as fractions; where channels go differs from cut to cut."""
SECONDS = 12.0
"""How long all of them are timed together."""
ROUNDS = 5
"""How many choices are timed at most before one is settled on."""
NEAR: Mapping[Resource, float] = {"size": 0.005, "latency": 0.03}
"""A choice is good enough this far below a limit, as a fraction of what the model that came in has."""


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
        program: The program that is to be cut.
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


class Measurements:
    """What one pass measured, in order; a run that goes on with another one reads it before it measures."""

    def __init__(self, step: str, program: Program, context: Context) -> None:
        """Keep what the pass `step` measures of `program` in its folder of the run's checkpoints, if it has one."""
        self.step = step
        self.program = program
        self.context = context
        self.number = 0

    def recall(
        self, what: str, choices: Sequence[Keep], measure: Callable[[], list[float]]
    ) -> list[float]:
        """Return the next measurement, made by `measure` where an interrupted run has not come that far.

        Raises:
            CheckpointError: That run was another one: of another command, or one that measured other cuts.
        """
        digest = hashlib.sha256(b"".join(keep.tobytes() for keep in choices)).hexdigest()
        if self.number == len(self._entries):
            self._entries.append((what, digest, measure()))
            self._save()
        *found, values = self._entries[self.number]
        if found != [what, digest]:
            assert self._checkpoint is not None
            raise CheckpointError(
                f"checkpoint {str(self._checkpoint.path)!r} belongs to another run: measurement {self.number + 1} of "
                f"{self.step} is of other cuts than this run chooses; repeat the command that was interrupted, "
                "or start over without --resume"
            )
        self.number += 1
        return values

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        if self.context.checkpoint is None:
            return None
        identity = {
            "run": self.step,
            "program": hashlib.sha256(str(self.program).encode()).hexdigest()[:16],
            "weights": absolute_sums(self.program),
            "seed": self.context.seed,
        }
        return Checkpoint(self.context.checkpoint, identity, name=MEASURED)

    @cached_property
    def _entries(self) -> list[tuple[str, str, list[float]]]:
        if self._checkpoint is None:
            return []
        if is_main_process():
            self._checkpoint.prepare(keep=self.context.resume)
        state = self._checkpoint.load() if self.context.resume else None
        return [] if state is None else state["entries"]

    def _save(self) -> None:
        if self._checkpoint is not None and is_main_process():
            self._checkpoint.save({"entries": self._entries})


class Cuts:
    """The files of cuts of a program, each exported once, and what was measured of them."""

    def __init__(
        self,
        program: Program,
        groups: DependencyGroups,
        folder: Path,
        measurements: Measurements | None = None,
    ) -> None:
        self.program = program
        self.groups = groups
        self.folder = folder
        self.measurements = measurements
        self._paths: dict[bytes, Path] = {}

    def path(self, keep: Keep) -> Path:
        """Return the file of the cut that keeps these channels.

        Raises:
            ExportError: The program cannot be exported.
        """
        key = keep.tobytes()
        if key not in self._paths:
            is_dense = bool(keep.all())
            cut = self.program if is_dense else cut_program(self.program, self.groups, keep).program
            target = self.folder / f"{len(self._paths)}.onnx"
            self._paths[key] = export_onnx(cut, target).path
        return self._paths[key]

    def num_bytes(self, keep: Keep) -> int:
        """Return the size of the file."""
        (found,) = self._recall("bytes", [keep], lambda: [float(self.path(keep).stat().st_size)])
        return int(found)

    def milliseconds(
        self,
        choices: Sequence[Keep],
        *,
        device: str,
        seed: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Return how long each takes for one sample, timed in turns; `advance` is called after every export."""

        def measure() -> list[float]:
            paths = []
            for keep in choices:
                paths.append(self.path(keep))
                advance()
            inputs = self.program.batch(1, seed=seed)
            found = bench(paths, inputs, device=device, budget_s=SECONDS)
            return [latency.median_ms for latency in found]

        return self._recall("milliseconds", choices, measure)

    def _recall(
        self, what: str, choices: Sequence[Keep], measure: Callable[[], list[float]]
    ) -> list[float]:
        if self.measurements is None:
            return measure()
        return self.measurements.recall(what, choices, measure)


@contextmanager
def exported_cuts(
    program: Program, groups: DependencyGroups, measurements: Measurements | None = None
) -> Iterator[Cuts]:
    """Yield `Cuts` whose files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        yield Cuts(program, groups, Path(folder), measurements)


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
    measurements: Measurements | None = None,
) -> C:
    """Return a choice that meets its limits on size and latency when it is exported and timed.

    Each choice is cut, exported and timed beside the program; what the model of a resource was wrong by corrects it,
    and the next choice is made with the corrected one, until what is measured is at the limit or just below, or
    nothing changes any more.

    Args:
        program: The program that is to be cut.
        groups: Its analysis, with measured costs.
        target: What must be reached.
        decide: Makes a choice with the costs that it is given, and raises TargetError where there is none.
        device: Where to time.
        seed: Seed of the inputs.
        measurements: Where to keep what is measured; nowhere unless given.

    Raises:
        TargetError: No choice that was measured meets the limits; the message says what was measured.
    """
    choice = decide(groups)
    if not target.needs_measuring:
        return choice
    best: tuple[float, C] | None = None
    seen: list[Mapping[Resource, _Share]] = []
    with exported_cuts(program, groups, measurements) as cuts:
        for _ in range(ROUNDS):
            shares = _shares(cuts, choice.keep, target, device=device, seed=seed)
            seen.append(shares)
            reached = max(share.found / share.limit for share in shares.values())
            if reached <= 1 and (best is None or reached > best[0]):
                best = reached, choice
            if reached <= 1 and any(s.found >= s.limit - NEAR[r] for r, s in shares.items()):
                break
            for resource, share in shares.items():
                groups = _corrected(groups, resource, choice.keep, share.found / share.own)
            previous = choice.keep
            try:
                choice = decide(groups)
            except TargetError:
                break
            if np.array_equal(previous, choice.keep):
                break
    if best is None:
        raise TargetError(_not_reached(target, target.whole(groups.cost.total()), seen))
    return best[1]


@dataclass(frozen=True)
class _Share:
    """What was measured of a cut, and what it may be, as fractions of the model that came in."""

    found: float
    limit: float
    own: float
    """The fraction that the program has, of which it is a cut; 1 where nothing has gone before."""

    @classmethod
    def of(cls, resource: Resource, target: Target, before: Cost, after: float) -> _Share:
        """Return the share of a cut that was measured beside the program, whose cost is `before`."""
        whole = getattr(target.whole(before), resource)
        limit, own = (getattr(cost, resource) for cost in (target.limits(before), before))
        return cls(found=after / whole, limit=limit / whole, own=own / whole)


def _shares(
    cuts: Cuts, keep: Keep, target: Target, *, device: str, seed: int
) -> dict[Resource, _Share]:
    dense, everything = cuts.groups.cost.total(), cuts.groups.cost.everything()
    shares: dict[Resource, _Share] = {}
    if target.size is not None:
        first, second = (cuts.num_bytes(choice) for choice in (everything, keep))
        shares["size"] = _Share.of("size", target, replace(dense, size=first), second)
    if target.latency is not None:
        own, cut = cuts.milliseconds([everything, keep], device=device, seed=seed)
        shares["latency"] = _Share.of("latency", target, replace(dense, latency=own), cut)
    return shares


def _corrected(
    groups: DependencyGroups, resource: Resource, keep: Keep, found: float
) -> DependencyGroups:
    """Return the analysis with a model of `resource` that says of this choice what was found."""
    cost = groups.cost
    dense, predicted = (getattr(total, resource) for total in (cost.total(), cost.total(keep)))
    factor = max(0.05, (1 - found) / max(1e-6, 1 - predicted / dense))
    scaled = Products.sum_of([(factor, cost.products(resource))], (1 - factor) * dense)
    return replace(groups, cost=cost.with_measured(resource, scaled))


def _not_reached(target: Target, dense: Cost, seen: Sequence[Mapping[Resource, _Share]]) -> str:
    """Say what was measured, and why it cannot be less."""
    units = {"size": f"{dense.size:,} bytes", "latency": f"{dense.latency:.3f} ms"}
    reasons = {
        "size": "The description of the graph, and what cannot go, do not shrink",
        "latency": "What the runtime does per call, and channels that do not fill its vectors, do not shrink",
    }
    lines = []
    for resource in seen[0]:
        found = [shares[resource].found for shares in seen]
        if min(found) > seen[0][resource].limit:
            listed = ", ".join(f"{share:.3f}" for share in found)
            lines.append(
                f"target {resource}={getattr(target, resource):g} was not reached: cuts were measured at {listed} of "
                f"the {units[resource]} of the model that came in. {reasons[resource]}; give a target of at least "
                f"{resource}={math.ceil(100 * min(found)) / 100:.2f}, or macs="
            )
    return (
        "; ".join(lines) or f"no cut that was measured meets the limits {target.resources} together"
    )
