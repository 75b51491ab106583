"""Metrics: event files show every epoch once, even of interrupted runs; without TensorBoard there are none."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graphprune.checkpoint import Checkpoint
from graphprune.training import Recipe, Trainer
from graphprune.training.metrics import EVENTS, EventWriter, publish
from tests.training.networks import data, files, program

LINE = {"pass": "fine-tune", "epoch": 1, "loss": 0.5, "macs": 7}


class Writer:
    """Writes events as lines of JSON, a file for each writer as torch's does, and the start of a run first."""

    def __init__(self, folder: str, *, purge_step: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(folder) / f"events.{len(list(Path(folder).iterdir()))}"
        self.events: list[Any] = [["start", purge_step]]
        self.is_closed = False
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.events.append([name, step, value])

    def flush(self) -> None:
        self.path.write_text("\n".join(map(json.dumps, self.events)))

    def close(self) -> None:
        self.flush()
        self.is_closed = True


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: a start hides what older files say from its step on."""
    found: list[tuple[str, int, float]] = []
    for path in sorted(folder.iterdir()):
        (_, start), *events = map(json.loads, path.read_text().splitlines())
        found = [event for event in found if event[1] < start]
        found += map(tuple, events)
    return {
        name: [(step, value) for other, step, value in found if other == name]
        for name, _, _ in found
    }


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("tensorboard"), ModuleType("torch.utils.tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    vars(module)["SummaryWriter"] = Writer
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_numbers_are_written_under_their_epoch(tensorboard: None, tmp_path: Path) -> None:
    events = EventWriter(tmp_path, start=0)
    events.write(LINE)
    assert shown(tmp_path) == {"loss": [(1, 0.5)], "macs": [(1, 7)]}  # at once, not at the end
    events.close()
    assert events.writer.is_closed


def test_without_tensorboard_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    events = EventWriter(tmp_path, start=0)
    events.write(LINE)
    events.close()
    assert list(tmp_path.iterdir()) == []


class _Killed(Exception):
    pass


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_run_that_goes_on_shows_every_epoch_once(
    is_saved: bool, tensorboard: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fit(**options: Any) -> list[Mapping[str, Any]]:
        recipe = Recipe(epochs=3, batch_size=32, lr=0.05, precision="float32")
        trainer = Trainer(
            program=program(), recipe=recipe, data=data(), checkpoint=tmp_path, **options
        )
        return list(trainer.fit().history)

    def die_after_two_epochs(self: Checkpoint, state: Mapping[str, Any]) -> None:
        is_over = state["epoch"] == 2
        if is_saved or not is_over:
            save(self, state)
        if is_over:
            raise _Killed

    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", die_after_two_epochs)
    with pytest.raises(_Killed):
        fit()
    assert [step for step, _ in shown(tmp_path / EVENTS)["loss"]] == [1, 2]
    monkeypatch.setattr(Checkpoint, "save", save)
    history = fit(resume=True)
    found = shown(tmp_path / EVENTS)
    for name in ("loss", "test_accuracy", "lr"):
        assert found[name] == [(line["epoch"], line[name]) for line in history]
    assert len(history) == 3
    assert files(tmp_path) == {"metrics.jsonl", "state.pt"}
    fit()
    assert len(list((tmp_path / EVENTS).iterdir())) == 1


def test_events_come_into_the_output_again_and_again(tensorboard: None, tmp_path: Path) -> None:
    folder, out = tmp_path / "4-fine-tune", tmp_path / "out"
    out.mkdir()
    for loss in (0.5, 0.25):
        events = EventWriter(folder / EVENTS, start=0)
        events.write({**LINE, "loss": loss})
        events.close()
        publish([LINE], out=out, checkpoint=folder)
    assert shown(out / EVENTS / folder.name)["loss"] == [(1, 0.25)]
