"""What was measured outlives an interrupted run: times vary, and what goes on decides as the run before it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune import measured
from graphprune.checkpoint import Checkpoint
from graphprune.errors import CheckpointError
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.runtime import Latency
from tests.training.networks import data, program

Weather = Callable[[int], list[Path]]
KilledAfter = Callable[[str, int], None]
COSTS = "dependency-groups,measure-costs"
TARGET = 'target="latency=0.7" round_to=1'
CHOICE = f"magnitude,choose-channels{{{TARGET}}}"
TRAINING = "epochs=2 batch_size=32 precision=float32 checkpoint_seconds=0.0"
FINE_TUNE = f"remove-channels,fine-tune{{{TRAINING}}}"
METHODS = {
    "magnitude": f"{COSTS},{CHOICE},{FINE_TUNE}",
    "obs": f"{COSTS},obs{{{TARGET} num_samples=32}},{FINE_TUNE}",
    "trainable-gates": f"{COSTS},trainable-gates{{{TARGET} {TRAINING}}},remove-channels",
}


def bytes_alone(cut: Program, path: Path) -> SimpleNamespace:
    """Write as many bytes as the tensors of a cut have, in place of an export, which takes its time."""
    path.write_bytes(bytes(sum(t.element_size() * t.numel() for _, t in cut.named_tensors())))
    return SimpleNamespace(path=path)


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Weather:
    """Return what sets the noise of a clock that goes by the bytes of a file, and gives the list of what is timed."""
    monkeypatch.setattr(measured, "PROBES", (0.8, 0.5))
    monkeypatch.setattr(measured, "export_onnx", bytes_alone)

    def set_in(seed: int) -> list[Path]:
        generator = np.random.default_rng(seed)
        timed: list[Path] = []

        def bench(paths: Sequence[Path], inputs: Sequence[Tensor], **_: Any) -> list[Latency]:
            timed.extend(paths)
            noise = generator.uniform(0.95, 1.05, len(paths))
            return [
                Latency(
                    path=path,
                    median_ms=float(factor) * (0.1 + 1e-4 * path.stat().st_size),
                    p10_ms=0.0,
                    p90_ms=0.0,
                    runs=1,
                    provider="a clock of our own",
                )
                for path, factor in zip(paths, noise, strict=True)
            ]

        monkeypatch.setattr(measured, "bench", bench)
        return timed

    return set_in


class _Killed(BaseException):
    """Comes like a signal: nothing but the driver and the staging sees it."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> KilledAfter:
    """Return what kills one run when it has saved files of a name so many times."""

    def arrange(name: str, number: int) -> None:
        def save_and_die(self: Checkpoint, state: Mapping[str, Any]) -> None:
            nonlocal number
            save(self, state)
            number -= self.path.name == name
            if not number:
                monkeypatch.setattr(Checkpoint, "save", save)
                raise _Killed

        save = Checkpoint.save
        monkeypatch.setattr(Checkpoint, "save", save_and_die)

    return arrange


def run(steps: str, folder: Path, dense: Program | None = None, **options: Any) -> PipelineResult:
    return Pipeline.parse(steps).run(
        dense or program(), data=data(), device="cpu", checkpoints=folder, **options
    )


def plan(result: PipelineResult) -> Plan:
    found = result.facts[Plan]
    assert isinstance(found, Plan)
    return found


def assert_same(a: PipelineResult, b: PipelineResult) -> None:
    assert plan(a) == plan(b)
    for (name, x), (_, y) in zip(a.program.named_tensors(), b.program.named_tensors(), strict=True):
        assert torch.equal(x, y), name
    numbers = [
        {key: value for key, value in result.measurements.items() if "seconds" not in key}
        for result in (a, b)
    ]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_training_goes_on_under_the_costs_that_it_began_with(
    method: str,
    weather: Weather,
    killed_after: KilledAfter,
    tmp_path: Path,
) -> None:
    weather(1)
    whole = run(METHODS[method], tmp_path / "whole")
    weather(2)
    other = run(METHODS[method], tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_same(whole, other)
    weather(1)
    killed_after("state.pt", 4)
    with pytest.raises(_Killed):
        run(METHODS[method], tmp_path / "broken")
    timed = weather(2)
    assert_same(whole, run(METHODS[method], tmp_path / "broken", resume=True))
    assert not timed
    assert_same(other, run(METHODS[method], tmp_path / "broken"))
    assert timed


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_choice_goes_on_with_what_was_timed_for_it(
    number: int, weather: Weather, killed_after: KilledAfter, tmp_path: Path
) -> None:
    weather(3)
    killed_after("measured.pt", number)
    with pytest.raises(_Killed):
        run(f"{COSTS},{CHOICE}", tmp_path)
    before = measurements(tmp_path)
    weather(4)
    resumed = run(f"{COSTS},{CHOICE}", tmp_path, resume=True)
    assert measurements(tmp_path)[:number] == before
    weather(5)
    assert_same(resumed, run(f"{COSTS},{CHOICE}", tmp_path, resume=True))


def measurements(folder: Path) -> list[Any]:
    """Return what is kept, in the order in which it was measured."""
    states = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*/measured.pt"))]
    return [entry for state in states for entry in state["entries"]]


def test_a_report_is_that_of_a_run_without_interruption(
    weather: Weather, killed_after: KilledAfter, tmp_path: Path
) -> None:
    def compile(out: Path, **options: Any) -> Any:
        gp.compile(
            program(),
            target="latency=0.7",
            round_to=1,
            data=data(),
            epochs=1,
            fine_tune="batch_size=32 precision=float32 checkpoint_seconds=0.0",
            export=False,
            out=out,
            **options,
        )
        report = json.loads((out / "report.json").read_text())
        passes = [(step["name"], step["modified"]) for step in report.pop("passes")]
        return report, passes, (out / "plan.json").read_text()

    weather(1)
    whole, broken = compile(tmp_path / "whole"), tmp_path / "broken"
    weather(1)
    killed_after("measured.pt", 3)
    with pytest.raises(_Killed):
        compile(broken)
    assert not broken.exists()  # no training has begun, so nothing goes on from what was measured
    weather(1)
    killed_after("state.pt", 2)
    with pytest.raises(_Killed):
        compile(broken)
    assert {path.name for path in broken.iterdir()} == {"checkpoints"}
    weather(2)
    assert compile(broken, resume=True) == whole
    assert not (broken / "checkpoints").exists()


@pytest.mark.parametrize(
    ("steps", "dense", "message"),
    [
        (
            f"{COSTS},{CHOICE.replace('0.7', '0.6')}",
            program(),
            "its pass is 'choose-channels{target=\"latency=0.7\" .*, this run's is 'choose-channels{.*0.6",
        ),
        (f"{COSTS},{CHOICE}", program(dropout=0.3), "its program is '.{16}', this run's is '"),
        (f"{COSTS},{CHOICE}", program(seed=1), "its weights to start from is of absolute sum"),
        (
            f"{COSTS},{CHOICE.replace('magnitude', 'random')}",
            program(),
            r"measurement 1 of choose-channels{.*} is of other cuts than this run chooses; repeat the command",
        ),
    ],
)
def test_what_another_run_measured_is_refused(
    steps: str, dense: Program, message: str, weather: Weather, tmp_path: Path
) -> None:
    weather(1)
    run(f"{COSTS},{CHOICE}", tmp_path)
    kept = measurements(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        run(steps, tmp_path, dense, resume=True)
    assert measurements(tmp_path) == kept


def test_gates_are_not_trained_on_under_other_costs(weather: Weather, tmp_path: Path) -> None:
    weather(1)
    run(METHODS["trainable-gates"], tmp_path)
    shutil.rmtree(tmp_path / "2-measure-costs")
    weather(2)
    with pytest.raises(
        CheckpointError, match="its measured costs is 'size=[0-9.]+ latency=[0-9.]+', this run's is"
    ):
        run(METHODS["trainable-gates"], tmp_path, resume=True)
