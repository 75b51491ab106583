"""trainable-gates: really trains, lands on the target, keeps accuracy, resumes, and says what went wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.capture import capture
from graphprune.checkpoint import Checkpoint
from graphprune.contract import Context
from graphprune.cost import Products
from graphprune.data import DataSource, evaluate, load_data
from graphprune.defaults import default_pipeline
from graphprune.errors import DataError, PassError, TargetError, UsageError
from graphprune.gates.layers import Mask
from graphprune.gates.training import GateHook
from graphprune.groups import DependencyGroups, analyze
from graphprune.passes.training import FineTune, TrainableGates
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.target import parse_target
from graphprune.training import slice_tensors
from tests import gate_networks
from tests.exactness import ERROR, capture_as
from tests.training.networks import data as bright
from tests.training.networks import program as tiny

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load_data("digits")


def trained(make: Callable[[], nn.Module], digits: DataSource, dialect: str = "fx") -> Program:
    """Return a network after six epochs."""
    step = FineTune(epochs=6, batch_size=64, lr=0.05, distill=0.0, average=0.0)
    program = capture_as(make(), torch.randn(2, 1, 8, 8), dialect)
    return Pipeline([step]).run(program, data=digits, device="cpu").program


def transformer() -> Program:
    return capture_as(gate_networks.transformer(), torch.randn(2, 1, 8, 8), "fx")


def run(program: Program, text: str, data: DataSource | None) -> PipelineResult:
    steps = f"dependency-groups,{text},remove-channels,clean-up"
    return Pipeline.parse(steps).run(program, data=data, device="cpu")


def context(program: Program, **options: Any) -> Context:
    facts = {DependencyGroups: analyze(program)}
    return Context(**{"facts": facts, "dense": program, "data": bright(), **options})


def equal(a: Program, b: Program) -> bool:
    pairs = zip(a.named_tensors(), b.named_tensors(), strict=True)
    return all(torch.equal(x, y) for (_, x), (_, y) in pairs)


@pytest.mark.parametrize(
    ("make", "options", "floor"),
    [
        (gate_networks.residual, "", 0.95),
        (gate_networks.branches, "", 0.95),
        (gate_networks.dense, "", 0.90),
        (gate_networks.depthwise, "", 0.80),
        (gate_networks.transformer, "epochs=16 granularity=channels,heads", 0.80),
    ],
    ids=["residual", "concatenation", "dense", "depthwise", "transformer"],
)
def test_half_the_macs_at_a_stated_accuracy(
    make: Callable[[], nn.Module], options: str, floor: float, digits: DataSource
) -> None:
    before = trained(make, digits)
    options = options.replace("=channels,heads", '="channels,heads"')
    options = options if "epochs=" in options else f"epochs=8 {options}"
    result = run(before, f"trainable-gates{{batch_size=64 round_to=1 {options}}}", digits)
    assert result.checks["surgery"].passed
    assert result.checks["gates"].passed
    cost, dense = analyze(result.program).cost.total(), analyze(before).cost.total()
    share = cost.macs / dense.macs
    assert 0.49 <= share <= 0.5
    # Some networks have no single channel that is worth less than 1 %: then the report says so.
    assert (share < 0.495) == any(kept.what == "target" for kept in result.kept)
    accuracy = evaluate(result.program.module, digits.test(256))
    assert accuracy >= floor
    measured = result.measurements
    # What was trained with frozen gates is what is left: the cut changes nothing.
    assert accuracy == pytest.approx(measured["trainable-gates.test_accuracy"], abs=0.006)
    assert measured["trainable-gates.chosen_macs"] == pytest.approx(cost.macs / dense.macs)
    assert measured["trainable-gates.own_macs"] == pytest.approx(0.5, abs=0.2)


def test_the_export_dialect_and_parameters_as_the_budget(digits: DataSource) -> None:
    before = trained(gate_networks.residual, digits, "export")
    text = 'trainable-gates{target="params=0.6" epochs=6 batch_size=64 round_to=1}'
    result = run(before, text, digits)
    assert result.checks["surgery"].passed
    assert result.checks["gates"].passed
    cost, dense = analyze(result.program).cost.total(), analyze(before).cost.total()
    share = cost.params / dense.params
    assert 0.58 < share <= 0.6
    assert (share < 0.594) == any(kept.what == "target" for kept in result.kept)
    assert evaluate(result.program.module, digits.test(256)) >= 0.9


def test_it_trains_a_clone_and_keeps_the_gates_frozen_at_the_choice(tmp_path: Path) -> None:
    before = tiny()
    copy = before.clone()
    step = TrainableGates(epochs=5, batch_size=16, frozen=0.4, round_to="1", target="ratio=0.25")
    result = step.run(before, context(before, out=tmp_path))
    assert result.modified
    assert equal(before, copy)
    assert str(result.program) == str(before)
    groups, plan = result.facts
    assert isinstance(plan, Plan)
    assert isinstance(groups, DependencyGroups)
    cost = groups.cost.total(plan.keep(before, groups))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["macs"] for line in lines[2:]] == [cost.macs] * 3
    assert {len(kept) for kept in plan.slices["conv1.weight"].values()} == {5}
    assert lines[-1]["gates_macs"] == result.metrics["trainable-gates.chosen_macs"]
    assert 0 < lines[-1]["gates_open"] < 16
    again = step.run(before, context(before))
    assert equal(result.program, again.program)
    assert again.facts[1] == plan


def test_what_the_gates_leave_is_trained_as_if_it_were_gated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tiny(dropout=0.0)
    step = TrainableGates(epochs=5, batch_size=16, round_to="1", precision="float32", clip=1.0)
    cut = step.run(before, context(before))
    monkeypatch.setattr(GateHook, "surgery", lambda self, moment: None)
    gated = step.run(before, context(before))
    plan = cut.facts[1]
    assert isinstance(plan, Plan)
    assert plan == gated.facts[1]
    left, expected = (
        slice_tensors(dict(result.program.named_tensors()), plan.slices) for result in (cut, gated)
    )
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    # A channel that is gone has the weights with which the training began.
    gone = [i for i in range(6) if i not in plan.slices["conv1.weight"][0]]
    weights = [p.module.get_parameter("conv1.weight")[gone] for p in (cut.program, before)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("make", [tiny, transformer])
def test_the_gated_program_is_proven_to_be_the_cut(
    make: Callable[[], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make()
    step = TrainableGates(epochs=1, batch_size=16)
    check = step.run(before, context(before)).checks["gates"]
    assert check.passed
    assert check.max_abs_err is not None
    assert check.max_abs_err < ERROR
    assert check.detail.startswith("float64")
    assert step.run(before, context(before, verify=False)).checks == {}
    # Gates that do nothing: what was trained is not what is left, and the run says so.
    monkeypatch.setattr(Mask, "forward", lambda self, gates: torch.ones_like(gates[self.index]))
    result = run(before, "trainable-gates{epochs=0}", bright())
    assert not result.passed
    assert not result.checks["gates"].passed
    assert result.checks["surgery"].passed


def test_no_epochs_choose_by_magnitude() -> None:
    before = tiny()
    result = TrainableGates(epochs=0, round_to="1").run(before, context(before))
    assert equal(result.program, before)
    assert result.metrics["trainable-gates.chosen_macs"] <= 0.5
    assert any(kept.what == "gates" and "by themselves" in kept.why for kept in result.kept)


def wide() -> nn.Module:
    """Return a network in which no channel holds 1 % of the MACs or of the parameters."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 140), nn.ReLU()),
        nn.Linear(140, 10),
    )


@pytest.mark.parametrize("target", ["macs=0.8", "macs=0.5", "params=0.3", "macs=0.4,params=0.5"])
def test_the_choice_is_within_one_percent_of_the_target(target: str) -> None:
    before = capture_as(wide(), torch.randn(2, 1, 8, 8), "fx")
    step = TrainableGates(epochs=1, batch_size=16, target=target)
    result = step.run(before, context(before))
    dense = analyze(before).cost.total()
    limits = parse_target(target).limits(dense)
    groups, plan = result.facts
    assert isinstance(plan, Plan)
    assert isinstance(groups, DependencyGroups)
    cost = groups.cost.total(plan.keep(before, groups))
    shares = [cost.macs / limits.macs, cost.params / limits.params]
    assert 0.99 <= max(shares) <= 1
    assert not any(kept.what == "target" for kept in result.kept)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"target": "macs=0.9", "granularity": "heads"}, "85.0% of the MACs, 87.5% of the param"),
        ({"target": "params=0.95", "granularity": "heads"}, "85.0% of the MACs, 87.5% of the par"),
        ({"target": "latency=0.95", "granularity": "heads"}, ".*, 87.2% of the latency: more"),
        ({"target": "macs=0.8", "round_to": "23"}, "round_to=23 has"),
    ],
)
def test_a_choice_that_is_further_from_the_target_says_so(
    options: dict[str, Any], reached: str
) -> None:
    before = transformer()
    groups = analyze(before)
    modelled = Products.sum_of([(2e-6, groups.cost.products("macs"))], 0.016)
    cost = groups.cost.with_measured("latency", modelled)
    facts = {DependencyGroups: dataclasses.replace(groups, cost=cost)}
    result = TrainableGates(epochs=0, **options).run(before, context(before, facts=facts))
    (why,) = [kept.why for kept in result.kept if kept.what == "target"]
    assert re.search(reached, why)
    assert "more than 1 % below, for what goes goes in larger steps" in why


@pytest.mark.parametrize("shape", ["one", "triangle", "sech2", "gaussian", "tanh"])
def test_every_gradient_shape_reaches_the_target(shape: Any) -> None:
    before = tiny()
    step = TrainableGates(
        epochs=4, batch_size=8, shape=shape, round_to="1", target="macs=0.5,params=0.5"
    )
    metrics = step.run(before, context(before)).metrics
    assert metrics["trainable-gates.own_macs"] < 0.8
    assert metrics["trainable-gates.chosen_macs"] <= 0.5
    assert metrics["trainable-gates.chosen_params"] <= 0.5


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("make", "options", "save"),
    [
        (tiny, {}, 3),
        (tiny, {}, 9),
        (tiny, {"features": 2.0}, 9),
        # Some heads lose channels, their first among them, and some go whole.
        (transformer, {"granularity": "channels,heads", "target": "macs=0.3"}, 9),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights_and_plan(
    make: Callable[[], Program],
    options: dict[str, Any],
    save: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = make()
    step = TrainableGates(epochs=3, batch_size=16, round_to="1", checkpoint_seconds=0.0, **options)
    whole = step.run(before, context(before, seed=2))
    saved = Checkpoint.save
    count = 0

    def save_and_die(self: Checkpoint, state: Mapping[str, Any]) -> None:
        nonlocal count
        saved(self, state)
        count += 1
        if count == save * 2:
            raise _Killed

    monkeypatch.setattr(Checkpoint, "save", save_and_die)
    with pytest.raises(_Killed):
        step.run(before, context(before, seed=2, checkpoint=tmp_path))
    monkeypatch.setattr(Checkpoint, "save", saved)
    resumed = step.run(before, context(before, seed=2, checkpoint=tmp_path, resume=True))
    assert equal(whole.program, resumed.program)
    assert whole.facts[1] == resumed.facts[1]
    assert whole.metrics.keys() == resumed.metrics.keys()
    for name, value in whole.metrics.items():
        assert name.endswith("seconds") or resumed.metrics[name] == value, name


def test_bfloat16(digits: DataSource) -> None:
    before = tiny()
    step = TrainableGates(epochs=2, batch_size=16, precision="bfloat16", round_to="1")
    result = step.run(before, context(before))
    assert result.metrics["trainable-gates.chosen_macs"] <= 0.5
    assert all(t.isfinite().all() for _, t in result.program.named_tensors())


class _WithDistances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.last = nn.Parameter(torch.randn(10, 12) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.first(x.flatten(1)).relu(), self.last)


def test_a_network_without_gates_is_refused() -> None:
    before = capture(_WithDistances().eval(), torch.randn(2, 1, 8, 8))
    message = "found nothing that a gate could remove; first.weight.0. .12 channels.: aten::.* at node cdist"
    with pytest.raises(PassError, match=message):
        TrainableGates(epochs=1).run(before, context(before))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "macs=0.00001"}, TargetError, "cannot be reached"),
        ({"target": "flops=1"}, TargetError, "Expected macs=, params="),
        ({"target": "latency=0.5"}, TargetError, "put the pass measure-costs after"),
        ({"granularity": "layers"}, UsageError, "granularity 'layers' is not known"),
        ({"round_to": "even"}, UsageError, "round_to: expected auto"),
        ({"shape": "square"}, UsageError, "expected shape to be one of one, triangle, .*'square'"),
        ({"frozen": 1.0}, UsageError, "frozen from 0 to less than 1 .* found frozen=1 penalty=1"),
        ({"penalty": 0.0}, UsageError, "a positive penalty, found frozen=0.4 penalty=0"),
        ({"gate_lr": -0.1}, UsageError, "gate_lr to be positive, found -0.1"),
        ({"epochs": -1}, UsageError, "expected epochs from 0 on, found -1"),
        ({"optimizer": "sgdd"}, UsageError, "optimizer: expected one of"),
        ({"task": "tests.nowhere:regression"}, UsageError, "cannot import 'tests.nowhere'"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = tiny()
    with pytest.raises(error, match=message):
        TrainableGates(**options).run(before, context(before))


def test_data_is_needed() -> None:
    before = tiny()
    with pytest.raises(DataError, match="trainable-gates expected training data, found none"):
        TrainableGates().run(before, context(before, data=None))


def test_the_text_form_round_trips_and_stands_in_the_default_pipeline() -> None:
    step = TrainableGates(
        target="params=0.4",
        granularity="channels,heads",
        round_to="4",
        epochs=3,
        frozen=0.25,
        shape="tanh",
        gate_lr=0.01,
        penalty=2.0,
        lr=0.1,
        optimizer="adamw{betas=(0.9,0.95)}",
        schedule="cosine{warmup=1}",
        weight_decay=0.0,
        batch_size=32,
        distill=0.1,
        temperature=2.0,
        clip=1.0,
        augment="none",
        precision="float32",
        task="a.b:c",
        workers=2,
        checkpoint_seconds=5.0,
    )
    pipeline = Pipeline([step])
    assert Pipeline.parse(str(pipeline)) == pipeline
    text = default_pipeline(
        target="macs=0.4", method="trainable-gates{epochs=30}", has_data=True, epochs=10
    )
    assert text.startswith(
        'dependency-groups,trainable-gates{target="macs=0.4" epochs=30},remove-channels,clean-up'
    )
    assert "fine-tune{epochs=10}" in text


def test_the_complete_recipe_as_one_command(digits: DataSource, tmp_path: Path) -> None:
    result = gp.compile(
        gate_networks.branches(),
        torch.randn(1, 1, 8, 8),
        target="macs=0.6",
        method="trainable-gates{epochs=2 batch_size=64}",
        data=digits,
        epochs=1,
        out=tmp_path,
        export=False,
    )
    assert result.passed
    assert result.plan is not None
    assert Plan.load(tmp_path / "plan.json").slices == result.plan.slices
    assert result.report.after.macs is not None
    assert result.report.before.macs is not None
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["pass"] for line in lines] == ["trainable-gates", "trainable-gates", "fine-tune"]


def test_gates_after_a_cut_land_on_a_fraction_of_the_model_that_came_in(
    digits: DataSource, tmp_path: Path
) -> None:
    cut = 'dependency-groups,magnitude,choose-channels{target="macs=0.8"},remove-channels,clean-up'
    gates = 'dependency-groups,trainable-gates{target="macs=0.6" epochs=2 batch_size=64}'
    program = gp.capture(gate_networks.branches(), torch.randn(1, 1, 8, 8))
    result = Pipeline.parse(f"{cut},{gates},remove-channels,clean-up").run(
        program, data=digits, device="cpu", out=tmp_path
    )
    assert result.passed
    left = gp.analyze(result.program).cost.macs / gp.analyze(program).cost.macs
    assert 0.55 < left <= 0.6
    assert result.measurements["trainable-gates.chosen_macs"] == pytest.approx(left)
    assert result.measurements["trainable-gates.gates_macs"] == pytest.approx(left)
