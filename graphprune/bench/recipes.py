"""Recipes: accuracy after a cut and training, every method with the same compute, in the same harness.

One unit of compute is one epoch of the dense network, forward and backward. Where it teaches, each look of the dense
network costs a third of that more, a forward pass; an epoch of the cut network costs its share of the MACs:

    gates       epochs with gates, of the dense network until they freeze, then epochs of what is left
    others      a choice without training, then epochs of what is left
    scratch     the network that `magnitude` leaves, with new weights, trained from labels alone
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.contract import Pass
from graphprune.data import DataSource, evaluate
from graphprune.defaults import DEFAULT_GRANULARITY, default_pipeline, training_options
from graphprune.devices import pick_device
from graphprune.errors import UsageError
from graphprune.groups import analyze
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from graphprune.registry import methods as registered_methods
from graphprune.textform import format_pass

__all__ = ["Budget", "Key", "Row", "pipelines", "run_row", "to_markdown"]

TEACHER = 1 / 3
"""What one look of the teacher costs in an epoch: the dense network's forward pass."""
GATES = "trainable-gates"
FROZEN = 0.4
"""The part of its epochs in which that pass trains what is left, by default."""
SCRATCH = "scratch"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a row may train."""

    compute: float
    """In epochs of the dense network."""
    target: float
    """Fraction of the dense MACs that the cut network has."""
    gates: float = 0.5
    """Share of the compute that gates may take."""
    granularity: str = DEFAULT_GRANULARITY
    """What may go."""
    options: str = ""
    """Of the training after the cut: ``mixup=1.0 distill=0.9``."""

    @property
    def gate_epochs(self) -> int:
        """Epochs with gates, distilled."""
        return max(1, round(self.gates * self.compute / self.gate_epoch))

    @property
    def gate_epoch(self) -> float:
        """What an epoch with gates costs: of the dense network for a part, then of what is left."""
        return 1.0 - FROZEN + FROZEN * self.target + TEACHER

    def epochs(self, *, spent: float = 0.0, looks: int = 1) -> int:
        """Return the epochs of the cut network that the rest of the compute is enough for.

        Args:
            spent: Compute that is gone before.
            looks: How often the dense network looks at each image.
        """
        return max(1, round((self.compute - spent) / (self.target + looks * TEACHER)))


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a row is the row of; of two runs with equal keys the second is not made."""

    method: str
    target: float
    seed: int
    compute: float
    """Allowed, in epochs of the dense network."""
    gates: float | None = None
    """Share of the compute that gates may take; None: there are none, or it was not recorded then."""
    granularity: str = DEFAULT_GRANULARITY
    """What may go."""
    options: str = ""
    """Of the training after the cut."""
    data: str = ""
    """As the user named it, and so the next two; empty: not recorded then."""
    model: str = ""
    weights: str = ""

    @classmethod
    def of(
        cls, method: str, budget: Budget, *, seed: int, data: str, model: str, weights: str
    ) -> Key:
        """Return the key of a method under a budget."""
        return cls(
            method=method,
            target=budget.target,
            seed=seed,
            compute=budget.compute,
            gates=budget.gates if method == GATES else None,
            granularity=budget.granularity,
            options=budget.options,
            data=data,
            model=model,
            weights=weights,
        )

    def folder(self) -> str:
        """Return a name for the folder of the run's state: what can be read of it, and a hash of all of it."""
        parts = [self.method, f"{self.target:g}", str(self.seed), f"{self.compute:g}"]
        parts += [] if self.gates is None else [f"gates={self.gates:g}"]
        parts += [] if self.granularity == DEFAULT_GRANULARITY else [self.granularity]
        text = re.sub(r"[^\w.=+-]", "_", "-".join([*parts, *self.options.split()]))
        values = [getattr(self, field.name) for field in dataclasses.fields(Key)]
        return f"{text[:100]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class Row(Key):
    """What came of one method at one target."""

    epochs: str
    """Trained: with gates + after the cut."""
    macs: float
    """Fraction of the dense MACs that was reached."""
    cut_accuracy: float
    """On the test set, before the epochs of the cut network."""
    accuracy: float
    """On the test set, after the last epoch."""
    seconds: float | None
    """None where the row was interrupted, and went on from its checkpoint."""

    @property
    def key(self) -> Key:
        """What the row is the row of."""
        return Key(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Key)})

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return dataclasses.asdict(self)


def pipelines(method: str, budget: Budget) -> tuple[str, str, str]:
    """Return the pipeline that chooses and cuts, the one that trains what is left, and the epochs of both as text.

    Raises:
        UsageError: There is no such method, or the options are not those of a training.
    """
    if method not in (*registered_methods(), SCRATCH):
        known = ", ".join((*registered_methods(), SCRATCH))
        raise UsageError(f"expected one of {known}, found {method!r}")
    spent, gated, choice = 0.0, 0, method
    if method == GATES:
        gated = budget.gate_epochs
        spent = gated * budget.gate_epoch
        choice = format_pass(GATES, {"epochs": gated})
    elif method == SCRATCH:
        choice = "magnitude"
    cut = default_pipeline(
        target=f"macs={budget.target:g}",
        method=choice,
        granularity=budget.granularity,
        has_data=method != SCRATCH,
        export=False,
    )
    options: dict[str, Any] = {"lr": 0.1, "distill": 0.0} if method == SCRATCH else {}
    options |= training_options(budget.options)
    epochs = budget.epochs(spent=spent, looks=_looks(options))
    options = {"epochs": epochs, **options}
    return cut, format_pass("fine-tune", options), f"{gated} + {epochs}"


def _looks(options: Mapping[str, Any]) -> int:
    """Return how often the dense network looks at an image in a fine-tuning with these options."""
    if options.get("distill") == 0 and not options.get("features"):
        return 0
    return 2 if options.get("mirror") else 1


def run_row(
    dense: Program,
    data: DataSource,
    method: str,
    budget: Budget,
    *,
    model: str = "",
    weights: str = "",
    seed: int = 0,
    device: str = "auto",
    checkpoints: Path | None = None,
) -> Row:
    """Cut and train by one method, and measure; a run that was interrupted goes on from `checkpoints`.

    Raises:
        UsageError: There is no such method.
    """
    device = pick_device(device)
    first, second, epochs = pipelines(method, budget)
    fresh = checkpoints is None or not any(checkpoints.iterdir())
    started = time.perf_counter()
    accuracies: list[float] = []

    def measure(before: Pass | None, program: Program, after: Pass | None) -> None:
        if after is not None and after.name == "fine-tune":
            accuracies.append(evaluate(program.module, data.test(250), device=device))

    start, steps = dense, f"{first},{second}"
    if method == SCRATCH:
        start, steps = (
            _with_new_weights(Pipeline.parse(first).run(dense, data=data).program, seed),
            second,
        )
    result = Pipeline.parse(steps).run(
        start,
        data=data,
        device=device,
        seed=seed,
        callbacks=(measure,),
        checkpoints=checkpoints,
        resume=checkpoints is not None,
    )
    seconds = time.perf_counter() - started
    key = Key.of(method, budget, seed=seed, data=data.name, model=model, weights=weights)
    return Row(
        **dataclasses.asdict(key),
        epochs=epochs,
        macs=analyze(result.program).cost.macs / analyze(dense).cost.macs,
        cut_accuracy=accuracies[0],
        accuracy=evaluate(result.program.module, data.test(250), device=device),
        seconds=seconds if fresh else None,
    )


def _with_new_weights(program: Program, seed: int) -> Program:
    """Return a clone in which every layer has the weights that its class starts with.

    Raises:
        UsageError: A trained tensor belongs to no such layer: its values would stay.
    """
    clone = program.clone()
    before = {name: value.detach().clone() for name, value in clone.module.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in clone.module.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    left = [n for n, p in clone.module.named_parameters() if _is_trained(p, before[n])]
    if left:
        raise UsageError(
            f"{SCRATCH} expected every weight of {program.source} to be in a layer that starts anew "
            f"(reset_parameters), found {', '.join(left[:3])}{' and others' if left[3:] else ''} "
            f"with the values of before ({program.dialect} dialect); leave {SCRATCH} out for this model"
        )
    return clone


def _is_trained(parameter: Tensor, before: Tensor) -> bool:
    """Tell whether a tensor still knows something: nothing is known by a norm's ones and zeros."""
    is_start = bool((parameter == 1).all() or (parameter == 0).all())
    return parameter.requires_grad and torch.equal(parameter, before) and not is_start


def to_markdown(rows: Sequence[Row], *, dense: float) -> str:
    """Return a table: rows by target, best first."""
    heads = ("MACs", "method", "epochs: gates + cut", "after the cut", "trained", "seed", "seconds")
    lines = [" | ".join(heads), "--: | --- | --: | --: | --: | --: | --:"]
    lines += [
        f"{r.macs:.3f} | {_label(r)} | {r.epochs} | {r.cut_accuracy:.2%} | {r.accuracy:.2%} | {r.seed} | "
        + ("interrupted" if r.seconds is None else f"{r.seconds:.0f}")
        for r in sorted(rows, key=lambda r: (-r.target, -r.accuracy))
    ]
    return "\n".join([f"Dense: {dense:.2%}.", "", *(f"| {line} |" for line in lines), ""])


def _label(row: Row) -> str:
    granularity = "" if row.granularity == DEFAULT_GRANULARITY else row.granularity
    return ", ".join(part for part in (row.method, granularity, row.options) if part)
