"""What a machine must show before graphprune is trusted on it: proofs, training, resuming and times, on one device.

Every check is run whatever became of the ones before, and its figures are written as soon as they are there.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.bench.steps import Setting, measure_steps
from graphprune.capture import capture
from graphprune.check import Check
from graphprune.compiler import CompileResult, compile
from graphprune.data import load_data
from graphprune.demo import train_digits
from graphprune.environment import environment
from graphprune.errors import UsageError
from graphprune.exported import first_line
from graphprune.files import write_atomic
from graphprune.inputs import parse_inputs
from graphprune.load import load_model
from graphprune.training.engine import Trainer
from graphprune.training.recipe import Hook, Moment, Recipe

__all__ = ["NETWORKS", "Machine", "Workload", "checks", "run_checks"]

NETWORKS: Mapping[str, str] = {
    "torchvision:resnet18": "1x3x224x224",
    "torchvision:mobilenet_v3_small": "1x3x224x224",
    "torchvision:vit_b_16": "1x3x224x224",
    "graphprune.bench.networks:depthwise": "1x1x28x28",
    "graphprune.bench.networks:vit": "1x1x28x28",
}
"""Networks with random weights that are cut to half their MACs -> the input that they take."""

CUDA_PROVIDER = "CUDAExecutionProvider"
LANDED = 0.01
"""How far from its target a training with gates may end, as a fraction of the target."""
FLOOR = 0.9
"""Least accuracy on the digits after half the MACs are gone and a few epochs of training."""
TARGET = 0.5

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and data of the user's own, to be cut and trained."""

    model: str
    weights: Path | None
    data: str
    method: str = "obs"
    """How channels are chosen."""
    epochs: int = 5
    """Of fine-tuning."""
    options: str = ""
    """Of fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to check, and how much."""

    device: str
    """``cpu``, ``cuda`` or ``cuda:N``."""
    networks: Mapping[str, str]
    """Model -> input, as on the command line."""
    steps: int = 15
    """Training steps of each kind that are timed."""
    recipe: Workload | None = None
    """What to train besides."""

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")


def checks(machine: Machine) -> Mapping[str, Callable[[], Figures]]:
    """Return every check by name. Each returns its figures, ``passed`` among them."""
    found: dict[str, Callable[[], Figures]] = {
        f"compile {model}": partial(_compiled, machine, model, shape)
        for model, shape in machine.networks.items()
    }
    found["gates"] = partial(_digits, machine, "trainable-gates{epochs=8}", 4)
    found["obs"] = partial(_digits, machine, "obs", 2)
    found["resume"] = partial(_resumed, machine)
    for model, shape in tuple(machine.networks.items())[:1]:
        for precision in (None, torch.bfloat16):
            name = "float32" if precision is None else "bfloat16"
            found[f"steps {model} {name}"] = partial(_steps, machine, model, shape, precision)
    if machine.recipe is not None:
        found[f"recipe {machine.recipe.model}"] = partial(_recipe, machine, machine.recipe)
    return found


def run_checks(
    machine: Machine,
    path: Path,
    *,
    only: Sequence[str] = (),
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Run the checks, rewrite `path` after each of them, and return whether those that were wanted passed.

    Args:
        machine: Where.
        path: A JSON file: ``environment``, the figures of every check under ``checks``, and ``passed``: whether all
            that are in the file did.
        only: Run the checks whose names begin with one of these; all of them if empty.
        resume: Keep what an earlier run on the same device wrote there, and leave out what passed.
        say: Where a line about every check goes.

    Raises:
        UsageError: No check has such a name, or `path` holds what another device or other versions wrote.
        OutputError: `path` cannot be written.
    """
    known = checks(machine)
    for start in only:
        if not any(name.startswith(start) for name in known):
            raise UsageError(f"expected the start of one of {', '.join(known)}; found {start!r}")
    wanted = {n: c for n, c in known.items() if not only or n.startswith(tuple(only))}
    here = environment(machine.device)
    results = _earlier(path, here) if resume else {}
    for name, check in wanted.items():
        asked = _asked(machine, name)
        if results.get(name, {}).get("passed") and results[name].get("asked") == asked:
            say(f"{name}: passed before")
            continue
        results[name] = {"asked": asked, **_guarded(check, machine)}
        with write_atomic(path) as temporary:
            text = {"environment": here, "passed": _all_passed(results), "checks": results}
            temporary.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        word = "passed" if results[name]["passed"] else f"FAILED: {results[name]['why']}"
        say(f"{name}: {word} ({results[name]['seconds']:.0f} s)")
    return all(results[name]["passed"] for name in wanted)


def _asked(machine: Machine, name: str) -> Figures:
    """Return what the user may have asked of a check; another answer is the figure of another check."""
    if name.startswith("steps "):
        return {"steps": machine.steps}
    if name.startswith("recipe ") and machine.recipe is not None:
        return {k: str(v) for k, v in dataclasses.asdict(machine.recipe).items()}
    return {}


def _all_passed(results: Mapping[str, Figures]) -> bool:
    return all(figures["passed"] for figures in results.values())


def _earlier(path: Path, here: Mapping[str, str | None]) -> dict[str, Figures]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there, results = dict(found["environment"]), dict(found["checks"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"expected figures of an earlier run, found {str(path)!r}: {error}"
        ) from error
    for name in sorted({*here, *there} - {"platform"}):
        if here.get(name) != there.get(name):
            raise UsageError(
                f"{str(path)!r} was written with {name}={there.get(name)}, here it is {here.get(name)}; "
                "choose another file, or go without --resume"
            )
    return results


def _guarded(check: Callable[[], Figures], machine: Machine) -> Figures:
    """Run one check; what it raises is a figure too, so that the others still run."""
    gc.collect()
    start = time.perf_counter()
    try:
        if machine.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(machine.device)
        figures = check()
        if machine.is_gpu:
            peak = torch.cuda.max_memory_allocated(machine.device)
            figures["peak_gpu_mib"] = round(peak / 2**20, 1)
    except Exception as error:
        lines = traceback.format_exc().splitlines()[-12:]
        figures = {
            "passed": False,
            "why": f"{type(error).__name__}: {first_line(error)}",
            "traceback": lines,
        }
    figures["seconds"] = round(time.perf_counter() - start, 2)
    return figures


# The checks


def _compiled(machine: Machine, model: str, shape: str) -> Figures:
    """Cut to half the MACs without training: proved on the device, exported, compared in ONNX Runtime, timed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = compile(model, parse_inputs(shape), target=f"macs={TARGET}", device=machine.device)
    return _report(machine, result)


def _digits(machine: Machine, method: str, epochs: int) -> Figures:
    """Cut a network that knows the digits to half its MACs and fine-tune it: it still knows them, at the target."""
    result = compile(
        train_digits(),
        data="digits",
        target=f"macs={TARGET}",
        method=method,
        epochs=epochs,
        round_to=1,
        device=machine.device,
    )
    return _trained(machine, result)


def _resumed(machine: Machine) -> Figures:
    """Stop a training in the middle and go on: the weights are those of a training that did not stop, bit for bit."""
    model = train_digits()
    dense = capture(model, torch.zeros(1, 1, 8, 8))
    recipe = Recipe(epochs=3, lr=0.02, average=0.9, precision="float32", checkpoint_seconds=0.0)
    data = load_data("digits")

    def train(folder: Path, *, hooks: Sequence[Hook] = (), resume: bool = False) -> list[Tensor]:
        program = dense.clone()
        Trainer(
            program=program,
            recipe=recipe,
            data=data,
            device=machine.device,
            hooks=hooks,
            checkpoint=folder,
            resume=resume,
        ).fit()
        return [tensor.detach().cpu() for _, tensor in program.named_tensors()]

    with tempfile.TemporaryDirectory() as name, _deterministic():
        whole = train(Path(name, "whole"))
        again = train(Path(name, "again"))
        try:
            train(Path(name, "broken"), hooks=[_StopAfter(17)])
        except _Stop:
            pass
        else:
            raise AssertionError("expected the training to stop after 17 steps, it went on")
        # A hook's state belongs to the checkpoint, so the second run has a hook too.
        watch = _StopAfter(0)
        resumed = train(Path(name, "broken"), hooks=[watch], resume=True)
    why = []
    if watch.first < 2:
        why.append("the training started over: there was no checkpoint, or it was not read")
    if not all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)):
        why.append("a training that was resumed ends with other weights than one that was not")
    figures: Figures = {
        "resumed_at_step": watch.first - 1,
        "repeated_max_abs_err": _distance(whole, again),
        "resumed_max_abs_err": _distance(whole, resumed),
    }
    return figures | {"passed": not why} | ({"why": "; ".join(why)} if why else {})


def _steps(machine: Machine, model: str, shape: str, precision: torch.dtype | None) -> Figures:
    """Time training steps; a figure, and no condition."""
    program = capture(load_model(model), parse_inputs(shape))
    batch = 128 if machine.is_gpu else 4
    steps = measure_steps(
        program,
        Setting(
            batch_size=batch,
            steps=machine.steps,
            device=machine.device,
            precision=precision,
            is_compiled=machine.is_gpu,
        ),
    )
    return {
        "passed": True,
        "batch_size": batch,
        "milliseconds": {name: round(ms, 3) for name, ms in steps.milliseconds.items()},
    }


def _recipe(machine: Machine, recipe: Workload) -> Figures:
    """Cut and train what the user gave."""
    result = compile(
        recipe.model,
        weights=recipe.weights,
        data=recipe.data,
        target=f"macs={TARGET}",
        method=recipe.method,
        epochs=recipe.epochs,
        fine_tune=recipe.options,
        device=machine.device,
    )
    figures = _report(machine, result)
    return figures | {
        "accuracy": [result.report.before.accuracy, result.report.after.accuracy],
    }


# What they have in common


def _report(machine: Machine, result: CompileResult) -> Figures:
    report = result.report
    before, after = report.before, report.after
    figures: Figures = {
        "macs": [before.macs, after.macs],
        "params": [before.params, after.params],
        "latency_ms": [before.latency_ms, after.latency_ms],
        "checks": {n: c.to_json() for n, c in report.checks.items() if c is not None},
        "passes_s": {record.name: round(record.seconds, 3) for record in report.passes},
    }
    why = [*report.failed, *_not_on_the_gpu(machine, report.checks)]
    return figures | {"passed": not why} | ({"why": "; ".join(why)} if why else {})


def _not_on_the_gpu(machine: Machine, found: Mapping[str, Check | None]) -> Iterator[str]:
    """Say which file ONNX Runtime computed elsewhere, though a GPU is what is being checked."""
    if not machine.is_gpu:
        return
    for name, check in found.items():
        provider = check.provider if check is not None else None
        if provider not in (None, CUDA_PROVIDER):
            yield f"check {name} ran on {provider}, expected {CUDA_PROVIDER}"


def _trained(machine: Machine, result: CompileResult) -> Figures:
    figures = _report(machine, result)
    before, after = result.report.before, result.report.after
    assert before.macs
    assert after.macs
    assert after.accuracy is not None
    why = [figures["why"]] if "why" in figures else []
    left = after.macs / before.macs
    if not TARGET * (1 - LANDED) <= left <= TARGET:
        why.append(f"{left:.4f} of the MACs are left, expected {TARGET} and at most 1 % less")
    if after.accuracy < FLOOR:
        why.append(f"accuracy {after.accuracy:.2%}, expected at least {FLOOR:.0%}")
    figures["accuracy"] = [before.accuracy, after.accuracy]
    return figures | {"passed": not why} | ({"why": "; ".join(why)} if why else {})


class _Stop(Exception):
    """A training that is interrupted on purpose."""


class _StopAfter(Hook):
    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first = 0
        """The first step that was seen, counted from 1."""

    def after_step(self, moment: Moment) -> None:
        self.first = self.first or moment.steps
        if moment.steps == self.steps:
            raise _Stop


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.numel()]
    return max((x - y).abs().max().item() for x, y in pairs)
