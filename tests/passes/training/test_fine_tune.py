"""fine-tune: as a pass, in the whole compilation, from the command line, interrupted and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.checkpoint import Checkpoint
from graphprune.cli import main
from graphprune.contract import Context
from graphprune.defaults import default_pipeline, replay_pipeline
from graphprune.errors import CheckpointError, DataError, UsageError
from graphprune.passes.training import FineTune
from graphprune.pipeline import Pipeline
from graphprune.program import Dialect, Program
from graphprune.training import load_task
from tests.training.masked_language import model
from tests.training.networks import Net, children, data, files, program, regression, regression_data

__all__ = ["make", "regression", "regression_data"]

TASK = "tests.training.networks:regression"


def make() -> nn.Module:
    """Return a network: what MODEL ``tests.passes.training.test_fine_tune:make`` names."""
    torch.manual_seed(0)
    return Net()


def context(dense: Program, **options: Any) -> Context:
    return Context(facts={}, dense=dense, **{"data": data(), **options})


def equal(a: Program, b: Program) -> bool:
    return all(
        torch.equal(x, y)
        for (_, x), (_, y) in zip(a.named_tensors(), b.named_tensors(), strict=True)
    )


@pytest.mark.parametrize("name", ["fine-tune", "trainable-gates"])
def test_a_wrong_fixed_batch_is_told_before_the_first_pass(name: str) -> None:
    fixed = replace(program(), dynamic_batch=False)
    text = default_pipeline(method="magnitude", has_data=True, export=False)
    pipeline = Pipeline.parse(f"{text},{name}{{epochs=1 batch_size=32}}")
    started = list[str]()
    with pytest.raises(UsageError, match="batches of 2 samples only, found 32 per process"):
        pipeline.run(fixed, data=data(), callbacks=[lambda *args: started.append(str(args))])
    assert not started


@pytest.mark.parametrize(
    ("options", "processes", "error", "message"),
    [
        ("batch_size=3", 2, DataError, "2 processes can share equally, found 3"),
        ("batch_size=6 mixup=0.3", 2, UsageError, "even number of samples in each of 2 processes"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_told_first(
    options: str,
    processes: int,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    (step,) = Pipeline.parse(f"fine-tune{{epochs=1 {options}}}").passes
    with pytest.raises(error, match=message):
        step.check(context(program()))


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_it_trains_a_clone_and_says_what_it_measured(dialect: Dialect, tmp_path: Path) -> None:
    before = program(dialect)
    copy = before.clone()
    step = FineTune(epochs=8, batch_size=16, lr=0.05, distill=0.0)
    result = step.run(before, context(before, out=tmp_path))
    assert result.modified
    assert equal(before, copy)
    assert str(result.program) == str(before)
    assert result.metrics["fine-tune.test_accuracy"] >= 0.8
    assert result.metrics["fine-tune.epoch"] == 8
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["test_accuracy"] == result.metrics["fine-tune.test_accuracy"]
    again = step.run(before, context(before))
    assert equal(result.program, again.program)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_zeros_stay_where_they_are_asked_to(dialect: Dialect, optimizer: str) -> None:
    before = program(dialect)
    weights = {n: p for n, p in before.module.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        for weight in weights.values():
            weight[torch.rand(weight.shape) < 0.5] = 0
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "optimizer": optimizer}
    kept = FineTune(**options, keep_zeros=True).run(before, context(before)).program
    freed = FineTune(**options).run(before, context(before)).program
    for name, parameter in kept.module.named_parameters():
        if name in weights:
            assert torch.equal(parameter == 0, weights[name] == 0)
            assert not torch.equal(parameter, weights[name])
    assert any((p != 0).all() for _, p in freed.module.named_parameters() if p.dim() > 1)


def test_no_epochs_are_not_a_change() -> None:
    before = program()
    result = FineTune(epochs=0).run(before, context(before))
    assert not result.modified
    assert result.program is before
    assert result.metrics == {}


def test_the_dense_program_teaches_unless_told_otherwise() -> None:
    before, dense = program(), program(seed=1)
    found = [
        FineTune(epochs=1, distill=share).run(before, context(dense)).program
        for share in (None, 0.5, 0.0)
    ]
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_the_text_form_round_trips() -> None:
    step = FineTune(
        epochs=3,
        lr=0.1,
        optimizer="adamw{betas=(0.9,0.95)}",
        schedule="cosine{warmup=1}",
        weight_decay=0.0,
        batch_size=32,
        distill=0.1,
        temperature=2.0,
        average=0.99,
        clip=1.0,
        augment="none",
        precision="float32",
        task="a.b:c",
        workers=2,
        checkpoint_seconds=5.0,
    )
    pipeline = Pipeline([step])
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_it_needs_data_and_good_options() -> None:
    before = program()
    with pytest.raises(DataError, match="fine-tune expected training data, found none"):
        FineTune(epochs=1).run(before, context(before, data=None))
    for options, message in (
        ({"epochs": -1}, "expected epochs from 0 on, found -1"),
        ({"optimizer": "sgdd"}, "optimizer: expected one of"),
        ({"optimizer": "sgd{speed=2}"}, "optimizer 'sgd{speed=2}': .*speed"),
        ({"schedule": "warp"}, "schedule: expected one of cosine, constant"),
        ({"schedule": "step"}, "StepLR needs step_size; give step{step_size=...}"),
        ({"task": "tests.nowhere:regression"}, "cannot import 'tests.nowhere'"),
        ({"task": TASK, "distill": 0.5}, "the task is no classification"),
    ):
        with pytest.raises(UsageError, match=message):
            FineTune(**options).run(before, context(before))


@pytest.mark.parametrize(
    ("later", "kind", "message"),
    [
        ("schedule=warp", UsageError, "schedule: expected one of"),
        ("optimizer=sdg", UsageError, "optimizer: expected one of"),
        ("optimizer=muon", UsageError, "optimizer 'muon': .*only supports 2D parameters"),
        ('optimizer="no.such:Class"', UsageError, "optimizer 'no.such:Class': cannot import"),
        ("epochs=-1", UsageError, "expected epochs from 0 on"),
        ('task="tests.training.networks:regression" distill=0.5', UsageError, "give the Task"),
        ('task="no.such:task"', UsageError, "no.such"),
    ],
)
def test_a_later_training_is_looked_at_before_the_first(
    later: str, kind: type[Exception], message: str
) -> None:
    steps = Pipeline.parse(
        f"dependency-groups,trainable-gates,remove-channels,fine-tune{{{later}}}"
    )
    ran = []
    with pytest.raises(kind, match=message) as found:
        steps.run(program(), data=data(), callbacks=[lambda *now: ran.append(now)])
    assert ran == []
    assert any("fine-tune{" in note for note in found.value.__notes__)


def test_it_stands_between_surgery_and_export() -> None:
    text = default_pipeline(has_data=True, epochs=3)
    assert ",reestimate-batch-norm,fine-tune{epochs=3},export-onnx," in text
    assert "fine-tune" not in replay_pipeline("plan.json", has_data=True)
    with pytest.raises(UsageError, match="expected epochs from 0 on, found -2"):
        default_pipeline(has_data=True, epochs=-2)
    with pytest.raises(UsageError, match="epochs=2 needs data to train on; give data= or --data"):
        default_pipeline(epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0, "fine_tune": "lr=0.1"}, "nothing is fine-tuned; give epochs="),
        ({"fine_tune": "epochs=4"}, "the number of epochs is none of these options"),
        ({"fine_tune": "speed=3"}, "pass 'fine-tune' has no option 'speed'; it takes epochs, lr"),
        ({"fine_tune": "lr=fast"}, "option lr expects"),
        ({"fine_tune": "lr=0.1},random{"}, "expected options such as lr=0.05 mixup=1.0"),
        ({"fine_tune": "lr"}, "pipeline text: expected"),
    ],
)
def test_options_that_are_none_of_a_training_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        default_pipeline(**{"has_data": True, "epochs": 3, **options})


def test_options_and_task_go_to_the_training() -> None:
    text = default_pipeline(
        has_data=True, epochs=3, fine_tune='optimizer="adamw{betas=(0.9,0.95)}" lr=1e-3', task="a:b"
    )
    step = gp.Pipeline.parse(text).passes[-3]
    assert isinstance(step, FineTune)
    assert (step.epochs, step.lr, step.task) == (3, 1e-3, "a:b")
    assert step.optimizer == "adamw{betas=(0.9,0.95)}"


def test_compile_trains_what_it_has_cut(tmp_path: Path) -> None:
    model = make().eval()
    options: dict[str, Any] = {"target": "params=0.5", "data": "digits", "export": False}
    cut = gp.compile(model, torch.randn(1, 1, 8, 8), **options)
    tuned = gp.compile(model, torch.randn(1, 1, 8, 8), epochs=3, out=tmp_path, **options)
    assert cut.report.after.accuracy is not None
    assert tuned.report.after.accuracy is not None
    assert tuned.report.after.accuracy > cut.report.after.accuracy
    assert tuned.report.after.macs == cut.report.after.macs
    assert str(tuned.program) == str(cut.program)
    assert tuned.report.checks["surgery"] is not None
    assert files(tmp_path) == {"metrics.jsonl", "plan.json", "report.html", "report.json"}
    assert tmp_path / "metrics.jsonl" in tuned.files


def test_a_task_is_that_of_passes_that_name_none(tmp_path: Path) -> None:
    data = "tests.passes.training.test_fine_tune:regression_data"
    head = nn.Sequential(make(), nn.Linear(10, 1)).eval()
    for option in ("", f' task="{TASK}"'):
        steps = f"fine-tune{{epochs=1 batch_size=16{option}}}"
        result = gp.compile(
            head, data=data, task=TASK, passes=steps, out=tmp_path / f"out{option[:1]}"
        )
        (record,) = result.report.passes
        assert TASK in record.name


def test_passes_and_epochs_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="passes= stands in place of .* epochs= and fine_tune="):
        gp.compile(make(), passes="magnitude", epochs=2, data="digits")
    with pytest.raises(UsageError, match="give that folder as out="):
        gp.compile(make(), epochs=1, data="digits", resume=True)


def test_a_regression_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        [
            *("compile", "tests.passes.training.test_fine_tune:make"),
            *("--data", "tests.training.networks:regression_data", "--task", TASK),
            *("--epochs", "4", "--fine-tune", "batch_size=64", "--out", str(tmp_path)),
            *("--no-export", "--json"),
        ]
    )
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert any(p["name"].startswith("fine-tune{epochs=4 batch_size=64 ") for p in report["passes"])
    assert report["after"]["accuracy"] is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["test_error"] < 0.7 * lines[0]["test_error"]


@pytest.mark.parametrize("kind", ["dicts", "tuples"])
def test_a_model_of_two_inputs_from_the_command_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = "tests.training.masked_language"
    status = main(
        [
            *("compile", f"{here}:model", "--data", f"{here}:{kind},holdout=0.25"),
            *("--task", f"{here}:task_of_{kind}", "--method", "taylor", "--target", "ratio=0.3"),
            *("--epochs", "10", "--fine-tune", "batch_size=12 lr=0.1 precision=float32"),
            *("--out", str(tmp_path), "--no-export", "--json"),
        ]
    )
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert report["after"]["params"] < report["before"]["params"]
    assert report["after"]["accuracy"] is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["test_right"] > 0.9


def test_samples_that_a_task_cannot_read() -> None:
    here = "tests.training.masked_language"
    data, task = f"{here}:dicts", f"{here}:task_of_dicts"
    with pytest.raises(DataError, match=r"samples \(tensor, label\), found dict; a task= of your"):
        gp.compile(model(), data=data)
    for other, message in (
        (
            TASK,
            r"can unpack, found dict of ids, mask, words: ValueError: .* give the Task an unpack",
        ),
        (f"{here}:task_of_tuples", "test sample makes no batch: .* give the Task a collate"),
    ):
        with pytest.raises(DataError, match=message):
            gp.compile(model(), data=data, task=other)
    with pytest.raises(
        DataError, match=r"batch into \(one tensor per input, target\), found inputs dict"
    ):
        replace(load_task(task), unpack=lambda batch: (batch, None)).read({})


def _compile(out: Path, *more: str) -> int:
    torch.set_num_threads(1)
    options = "epochs=3 precision=float32 checkpoint_seconds=0.0"
    steps = (
        'dependency-groups,magnitude,choose-channels{target="params=0.5"},remove-channels,'
        f"fine-tune{{{options}}}"
    )
    model = "tests.passes.training.test_fine_tune:make"
    given = ("--data", "digits", "--passes", steps, "--out", str(out), "--no-export", "--no-verify")
    return main(["compile", model, *given, *more])


def _weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights that a run in `out` keeps in its checkpoint."""
    (path,) = out.glob("checkpoints/*-fine-tune/state.pt")
    state = torch.load(path, weights_only=True)
    tensors: dict[str, torch.Tensor] = state["tensors"]
    return tensors if state["epoch"] == 3 else {}


@pytest.mark.slow
def test_a_killed_command_goes_on_with_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last state is what a run has learned; a complete run takes it away, so this one keeps it.
    monkeypatch.setattr("graphprune.staging.shutil.rmtree", lambda *_, **__: None)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _compile(whole) == 0
    child = children().Process(target=_compile, args=(broken,))
    child.start()
    while not list(broken.glob("checkpoints/*/state.pt")):
        assert child.is_alive()
        time.sleep(0.005)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert {p.name for p in broken.iterdir() if p.name[0] != "."} == {"checkpoints"}
    assert _compile(broken, "--resume") == 0
    expected, found = _weights(whole), _weights(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert json.loads((broken / "plan.json").read_text()) == json.loads(
        (whole / "plan.json").read_text()
    )
    capsys.readouterr()


def test_an_interrupted_command_goes_on_with_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _compile(whole) == 0
    save, saves = Checkpoint.save, []

    def interrupt(self: Checkpoint, state: Mapping[str, Any]) -> None:
        save(self, state)
        saves.append(state["step"])
        if len(saves) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupt)
    assert _compile(broken) == 130
    assert {p.name for p in broken.iterdir()} == {"checkpoints"}
    assert _compile(broken, "--resume") == 0
    assert len(saves) == 3 * 11  # the rest of the steps, none of them twice
    assert files(broken) == {"metrics.jsonl", "plan.json", "report.html", "report.json"}
    a, b = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (whole, broken)
    )
    assert [{**line, "seconds": 0} for line in a] == [{**line, "seconds": 0} for line in b]
    capsys.readouterr()


def test_a_complete_run_leaves_no_checkpoint_and_resuming_it_repeats_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target": "params=0.5",
        "data": "digits",
        "export": False,
        "epochs": 1,
        "out": tmp_path,
    }
    first = gp.compile(make(), **options)
    (tmp_path / ".graphprune-killed").mkdir()
    second = gp.compile(make(), resume=True, **options)
    assert equal(first.program, second.program)
    assert not (tmp_path / "checkpoints").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_error_keeps_the_state_of_a_training(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    pipeline = Pipeline([FineTune(epochs=2, precision="float32")])
    before = program()
    pipeline.run(before, data=data(), device="cpu", checkpoints=folder)
    assert files(folder / "1-fine-tune") == {"metrics.jsonl", "state.pt"}
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        Pipeline([FineTune(epochs=3, precision="float32")]).run(
            before, data=data(), device="cpu", checkpoints=folder, resume=True
        )
    assert "raised by the pass fine-tune{epochs=3" in caught.value.__notes__[0]
