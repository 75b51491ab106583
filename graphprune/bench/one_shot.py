"""One shot: accuracy right after a cut, without training, of our methods and of Torch-Pruning's criteria.

All rows start from the same trained network and are measured on the same whole test set. Every row but `obs` gets its
batch norms re-estimated on the same training images, without labels; `obs` has refitted its layers and needs none.
Torch-Pruning fails on shortcuts that slice and pad channels, so it gets the channels inside the blocks to choose from.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune import registry
from graphprune.capture import capture
from graphprune.data import DataSource, evaluate
from graphprune.errors import UsageError
from graphprune.groups import analyze
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from graphprune.textform import format_pass
from graphprune.zoo.peer import is_fused_attention

__all__ = ["OBS", "PEERS", "Row", "Start", "methods", "row_name", "run_row", "to_markdown"]

OBS = "obs"
"""The one row of ours that chooses by itself, on as many images as it is given."""
PEERS: Mapping[str, str] = {
    "tp-magnitude": "GroupMagnitudeImportance",
    "tp-bn-scale": "BNScaleImportance",
    "tp-lamp": "LAMPImportance",
    "tp-fpgm": "FPGMImportance",
    "tp-random": "RandomImportance",
    "tp-taylor": "GroupTaylorImportance",
    "tp-hessian": "GroupHessianImportance",
    "tp-obdc": "OBDCImportance",
}
"""Name of a row -> class of Torch-Pruning's criterion, which ranks the channels of all layers together."""
UNIFORM = "-uniform"
"""Ends the name of a row where Torch-Pruning cuts the same share of each layer."""
GRADIENT_SAMPLES = 512
"""How many training images Torch-Pruning's gradients are taken over, as many as for our own `taylor`."""
SEARCH = 9
"""Steps of the search for Torch-Pruning's ratio, which it takes instead of a target: the last is of 0.002."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every row starts from."""

    model: nn.Module
    example: Tensor
    data: DataSource
    inner: tuple[str, ...] | None = None
    """Modules whose outputs Torch-Pruning may cut; None: all but the last linear layer."""
    cuts: dict[tuple[str, float, int], Program] = field(default_factory=dict)
    """What Torch-Pruning made, by criterion, ratio and seed: searches for several targets try the same ratios."""
    scored: dict[tuple[str, int], tuple[nn.Module, Any]] = field(default_factory=dict)
    """By criterion and seed: a model with the gradients that the criterion works with, and the criterion."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one method at one target."""

    method: str
    target: float
    """Fraction of the dense MACs."""
    samples: int
    """Training images that `obs` calibrates on, or that batch norms are re-estimated on."""
    macs: float | None
    """Fraction of the dense MACs that was reached; None where Torch-Pruning failed."""
    accuracy: float | None
    seconds: float
    """Choice, cut, refit or re-estimation; not the evaluation."""
    error: str = ""
    """What Torch-Pruning said when it failed."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return dataclasses.asdict(self)


def methods() -> tuple[str, ...]:
    """Return the names of all rows; ours take options as well: ``magnitude{relative=false}``."""
    scoring = (name for name in registry.methods() if not registry.load(name).chooses)
    return (OBS, *scoring, *PEERS, *(name + UNIFORM for name in PEERS))


def run_row(start: Start, method: str, target: float, samples: int, *, seed: int = 0) -> Row:
    """Cut by one method and measure.

    Raises:
        UsageError: There is no such row, or Torch-Pruning is not installed.
    """
    name = row_name(method)
    if name not in methods():
        raise UsageError(f"expected one of {', '.join(methods())}, found {method!r}")
    started = time.perf_counter()
    dense = capture(start.model, start.example)
    error, macs, accuracy = "", None, None
    try:
        cut = (_peer if _is_peer(name) else _own)(start, dense, method, target, samples, seed)
    except _PeerFails as failure:
        error, seconds = str(failure), time.perf_counter() - started
    else:
        seconds = time.perf_counter() - started
        macs = analyze(cut).cost.macs / analyze(dense).cost.macs
        accuracy = evaluate(cut.module, start.data.test(250))
    return Row(
        method=method,
        target=target,
        samples=samples,
        macs=macs,
        accuracy=accuracy,
        seconds=seconds,
        error=error,
    )


def _is_peer(name: str) -> bool:
    return name.removesuffix(UNIFORM) in PEERS


def row_name(method: str) -> str:
    """Return a row's name without options."""
    return method if _is_peer(method) else method.partition("{")[0]


class _PeerFails(Exception):
    """Torch-Pruning has no cut to show, and this is why."""


def _own(
    start: Start, dense: Program, method: str, target: float, samples: int, seed: int
) -> Program:
    limit = f"macs={target}"
    (own,) = Pipeline.parse(method).passes
    if own.name == OBS:
        options: dict[str, Any] = {"target": limit, "round_to": "1", "num_samples": samples}
        steps = [dataclasses.replace(own, **options).spec(), "remove-channels"]
    else:
        choose = format_pass("choose-channels", {"target": limit, "round_to": "1"})
        steps = [own.spec(), choose, "remove-channels", _reestimate(samples)]
    text = ",".join(["dependency-groups", *steps])
    return Pipeline.parse(text).run(dense, data=start.data, device="cpu", seed=seed).program


def _reestimate(samples: int) -> str:
    return format_pass("reestimate-batch-norm", {"num_samples": samples})


def _peer(
    start: Start, dense: Program, method: str, target: float, samples: int, seed: int
) -> Program:
    """Search for the ratio that comes to the target from below, and re-estimate batch norms."""
    criterion, together = PEERS[method.removesuffix(UNIFORM)], not method.endswith(UNIFORM)
    goal = target * analyze(dense).cost.macs
    low, high = 0.0, 0.95
    best = None
    for _ in range(SEARCH):
        ratio = (low + high) / 2
        if (key := (method, ratio, seed)) not in start.cuts:
            torch.manual_seed(seed)
            try:
                model = _torch_pruning(start, criterion, ratio, seed, together=together)
                model(start.example)
            except UsageError:
                raise
            except Exception as error:  # whatever it raises is its result
                raise _PeerFails(f"{type(error).__name__}: {error}") from error
            start.cuts[key] = capture(model, start.example)
        program = start.cuts[key]
        if analyze(program).cost.macs <= goal:
            best, high = program, ratio
        else:
            low = ratio
    if best is None:
        raise _PeerFails(f"no ratio up to {high} reaches {target} of the MACs")
    return Pipeline.parse(_reestimate(samples)).run(best, data=start.data, device="cpu").program


def _torch_pruning(
    start: Start, criterion: str, ratio: float, seed: int, *, together: bool
) -> nn.Module:
    try:
        import torch_pruning
    except ImportError as error:
        raise UsageError("the comparison needs Torch-Pruning: pip install -e '.[bench]'") from error
    if (key := (criterion, seed)) not in start.scored:
        start.scored[key] = _with_gradients(
            start, getattr(torch_pruning.importance, criterion), seed
        )
    scored, _ = start.scored[key]
    model, importance = copy.deepcopy(start.scored[key])
    for parameter, source in zip(model.parameters(), scored.parameters(), strict=True):
        parameter.grad = None if source.grad is None else source.grad.clone()
    named = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    inner = set(list(named)[:-1] if start.inner is None else start.inner)
    fixed = [module for name, module in named.items() if name not in inner]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        start.example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=together,
        ignored_layers=fixed,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={m.qkv: m.num_heads for m in model.modules() if is_fused_attention(m)},
    )
    pruner.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model


def _with_gradients(start: Start, kind: Any, seed: int) -> tuple[nn.Module, Any]:
    """Return a copy of the model and a criterion of this kind, with the gradients that it works with.

    They are taken as Torch-Pruning's own benchmark takes them.
    """
    model, data = copy.deepcopy(start.model).eval(), start.data
    criterion = kind.__name__
    importance = kind(num_classes=data.num_classes) if criterion == "OBDCImportance" else kind()
    batches = list(data.train(64, seed=seed, limit=GRADIENT_SAMPLES))
    if criterion == "GroupTaylorImportance":
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
    elif criterion == "GroupHessianImportance":
        importance.zero_grad()
        for images, labels in batches[:1]:
            for loss in F.cross_entropy(model(images), labels, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
    elif criterion == "OBDCImportance":
        # Its own set-up fails in version 1.6.1 where layers are ignored: it leaves out layers that it scores later.
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                importance.modules.append(layer)
                layer.register_forward_pre_hook(importance._save_input)
                layer.register_full_backward_hook(importance._save_grad_output)
        for images, _ in batches:
            logits = model(images.requires_grad_())
            sampled = torch.multinomial(logits.softmax(1), 1).flatten()
            F.cross_entropy(logits, sampled).backward()
            importance.step()
        importance._rm_hooks(model)
    return model, importance


def _cell(row: Row) -> str:
    """Return the accuracy, and where it was reached if that is not the target; or that there is none."""
    if row.macs is None or row.accuracy is None:
        return "fails"
    where = f" at {row.macs:.3f}" if abs(row.macs - row.target) > 0.002 else ""
    return f"{row.accuracy:.2%}{where}"


def to_markdown(rows: Sequence[Row], *, dense: float) -> str:
    """Return a table: a line for each method, a column for each target."""
    targets = sorted({r.target for r in rows}, reverse=True)
    head = ["method", "images", *(f"{t:g} of MACs" for t in targets), "seconds, each"]
    lines = [" | ".join(head), "|".join(["---", "--:", *["--:"] * len(targets), "--:"])]
    order = methods()
    for method in sorted({r.method for r in rows}, key=lambda m: (order.index(row_name(m)), m)):
        for samples in sorted({r.samples for r in rows if r.method == method}):
            mine = {r.target: r for r in rows if r.method == method and r.samples == samples}
            cells = [_cell(mine[t]) if t in mine else "" for t in targets]
            seconds = [r.seconds for r in mine.values()]
            spent = f"{min(seconds):.0f} to {max(seconds):.0f}"
            lines.append(" | ".join([method, str(samples), *cells, spent]))
    return "\n".join([f"Dense: {dense:.2%}.", "", *(f"| {line} |" for line in lines), ""])
