"""obs: channels go without training, what stays makes up for them, and the cut is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import graphprune as gp
from graphprune.data import DataSource, evaluate, load_data
from graphprune.defaults import default_pipeline
from graphprune.demo import DigitsNet, train_digits
from graphprune.errors import DataError, PassError, TargetError, UsageError
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.plan import Plan
from graphprune.program import Program
from tests import gate_networks

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load_data("digits")


@pytest.fixture(scope="module")
def trained() -> DigitsNet:
    return train_digits(epochs=4)


@pytest.fixture(scope="module")
def program(trained: DigitsNet) -> Program:
    return gp.capture(trained, torch.randn(1, 1, 8, 8))


def _run(program: Program, text: str, data: DataSource | None) -> PipelineResult:
    steps = f"dependency-groups,{text},remove-channels,clean-up"
    return Pipeline.parse(steps).run(program, data=data, device="cpu")


def _accuracy(program: Program, data: DataSource) -> float:
    return evaluate(program.module, data.test(256))


def test_half_the_macs_cost_little_and_less_than_magnitude(
    program: Program, digits: DataSource
) -> None:
    dense = _accuracy(program, digits)
    obs = _run(program, "obs{num_samples=512 round_to=1}", digits)
    assert obs.checks["surgery"].passed
    cost = gp.analyze(obs.program).cost
    assert 0.49 < cost.macs / gp.analyze(program).cost.macs <= 0.5
    choice = 'choose-channels{target="macs=0.5" round_to=1}'
    magnitude = _run(program, f"magnitude,{choice}", digits).program
    recovered = Pipeline.parse("reestimate-batch-norm").run(magnitude, data=digits).program
    assert dense > 0.9
    assert _accuracy(obs.program, digits) > dense - 0.03
    assert _accuracy(obs.program, digits) > _accuracy(recovered, digits)
    assert 0 < obs.measurements["obs_output_error"] < 0.2


def test_labels_are_not_looked_at(program: Program, digits: DataSource) -> None:
    def unlabelled(name: str) -> Dataset[tuple[Tensor, ...]]:
        images = next(iter(digits.train(10_000, shuffle=False)))[0]
        return TensorDataset(images, torch.full((len(images),), -1))

    with_labels = _run(program, "obs{num_samples=128 probe_samples=64}", digits)
    without = _run(
        program, "obs{num_samples=128 probe_samples=64}", replace(digits, split=unlabelled)
    )
    for (name, a), (_, b) in zip(
        with_labels.program.named_tensors(), without.program.named_tensors(), strict=True
    ):
        assert torch.equal(a, b), name


def test_what_the_layers_say_alone_will_do(program: Program, digits: DataSource) -> None:
    result = _run(program, "obs{num_samples=256 probe_samples=0}", digits)
    assert result.checks["surgery"].passed
    assert _accuracy(result.program, digits) > 0.85


def test_the_export_dialect(trained: DigitsNet, digits: DataSource) -> None:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        trained, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},)
    )
    program = gp.capture(exported)
    result = _run(program, "obs{num_samples=256}", digits)
    assert result.checks["surgery"].passed
    assert _accuracy(result.program, digits) > _accuracy(program, digits) - 0.05


class _Mlp(nn.Module):
    """A residual stream under a layer norm, and a hidden layer, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        logits: Tensor = self.head(x)
        return logits


def test_hidden_units_go_and_the_normalised_stream_stays(digits: DataSource) -> None:
    torch.manual_seed(0)
    program = gp.capture(_Mlp().eval(), torch.randn(1, 1, 8, 8))
    result = _run(program, 'obs{target="macs=0.7" num_samples=256}', digits)
    assert result.checks["surgery"].passed
    hidden, stream = result.program.module.get_parameter("up.weight").shape
    assert stream == 16
    assert 0 < hidden < 48
    why = {kept.what: kept.why for kept in result.kept}
    assert "nothing can make up for it" in why["embed.weight[0] (16 channels)"]


def test_a_target_out_of_reach_names_what_is_left_alone(digits: DataSource) -> None:
    torch.manual_seed(0)
    program = gp.capture(_Mlp().eval(), torch.randn(1, 1, 8, 8))
    expected = (
        r"cannot be reached.* obs leaves alone what other methods may cut: embed.weight\[0\] "
        r"\(16 channels\), read by norm, not a layer"
    )
    with pytest.raises(TargetError, match=expected):
        _run(program, 'obs{target="macs=0.1" num_samples=64}', digits)


class _Separable(nn.Module):
    """A depthwise convolution with a multiplier between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(24, 20, 1)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        logits: Tensor = self.head(torch.relu(self.pointwise(x)).mean((2, 3)))
        return logits


def test_channels_go_through_depthwise_convolutions(digits: DataSource) -> None:
    torch.manual_seed(0)
    program = gp.capture(_Separable().eval(), torch.randn(1, 1, 8, 8))
    result = _run(program, 'obs{target="macs=0.4" num_samples=256 round_to=1}', digits)
    assert result.checks["surgery"].passed
    cut = result.program.module
    stem, grouped = (cut.get_parameter(f"{n}.weight").shape[0] for n in ("stem", "depthwise"))
    assert stem < 12
    assert grouped < 24
    assert 0.3 < gp.analyze(result.program).cost.macs / gp.analyze(program).cost.macs <= 0.4
    assert [kept.what for kept in result.kept if "stem" in kept.what] == []
    assert result.measurements["obs_output_error"] < 0.5


class _Cardinal(nn.Module):
    """A bottleneck around a convolution of four groups, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.up = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.grouped(torch.relu(self.down(x))))
        logits: Tensor = self.head(torch.relu(x + self.up(y)).mean((2, 3)))
        return logits


def test_channels_go_before_and_behind_grouped_convolutions(digits: DataSource) -> None:
    torch.manual_seed(0)
    program = gp.capture(_Cardinal().eval(), torch.randn(1, 1, 8, 8))
    result = _run(program, 'obs{target="ratio=0.5" num_samples=256 round_to=1}', digits)
    assert result.checks["surgery"].passed
    assert not [kept for kept in result.kept if "make up for" in kept.why]
    outputs, inputs = result.program.module.get_parameter("grouped.weight").shape[:2]
    assert (outputs, inputs) == (16, 4)
    choice = 'magnitude,choose-channels{target="ratio=0.5" round_to=1}'
    magnitude = _run(program, choice, digits).program

    def error(cut: Program) -> float:
        images = next(iter(digits.test(256)))[0]
        with torch.no_grad():
            dense = program.module(images)
            return float((cut.module(images) - dense).square().sum() / dense.var(0).sum())

    assert error(result.program) < error(magnitude) / 4


def test_a_ratio_takes_the_same_part_of_every_group(program: Program, digits: DataSource) -> None:
    result = _run(program, 'obs{target="ratio=0.25" num_samples=128 probe_samples=0}', digits)
    for group in gp.analyze(result.program):
        if not group.pinned:
            assert len(group) in (18, 36)


def test_the_same_seed_gives_the_same_weights(program: Program, digits: DataSource) -> None:
    first, second = (
        _run(program, "obs{num_samples=128 probe_samples=64}", digits) for _ in range(2)
    )
    pairs = zip(first.program.named_tensors(), second.program.named_tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_compile_takes_the_method_and_keeps_its_plan(
    trained: DigitsNet, digits: DataSource, tmp_path: Path
) -> None:
    result = gp.compile(
        trained,
        torch.randn(1, 1, 8, 8),
        target="macs=0.6",
        method="obs{num_samples=128 probe_samples=64}",
        data=digits,
        out=tmp_path,
        export=False,
    )
    assert result.passed
    assert result.plan is not None
    assert result.report.method is not None
    assert result.report.method.startswith("obs")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.slices == result.plan.slices
    assert result.report.after.macs is not None
    assert result.report.before.macs is not None
    assert result.report.after.macs <= 0.6 * result.report.before.macs


def test_the_pipeline_has_no_second_choice() -> None:
    text = default_pipeline(target="macs=0.4", method="obs{damping=0.01}", has_data=True)
    assert text.startswith('dependency-groups,obs{target="macs=0.4" damping=0.01},remove-channels')
    assert "reestimate" not in text  # the refit has brought outputs back to the statistics


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('obs{target="macs=0.00001"}', TargetError, "cannot be reached"),
        ("obs{num_samples=0}", UsageError, "at least one sample, found num_samples=0"),
        ("obs{damping=-1.0}", UsageError, "patches of 0 or more, found damping=-1 patches=0"),
        ("obs{patches=-1}", UsageError, "of 0 or more, found damping=0.0001 patches=-1"),
    ],
)
def test_wrong_options_are_refused(
    program: Program, digits: DataSource, text: str, error: type[Exception], message: str
) -> None:
    few = replace(digits, split=lambda name: Subset(digits.split(name), range(64)))
    with pytest.raises(error, match=message):
        _run(program, text, few)


def test_data_is_needed(program: Program) -> None:
    with pytest.raises(
        DataError, match=r"obs expected training data, found none; give data= or --data"
    ):
        _run(program, "obs", None)


def test_a_network_without_removable_channels_is_refused(digits: DataSource) -> None:
    program = gp.capture(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), torch.randn(1, 1, 8, 8)
    )
    with pytest.raises(PassError, match="found no channel that only linear and convolution layers"):
        _run(program, "obs", digits)


def test_a_target_that_is_met_already_removes_nothing() -> None:
    program = gp.capture(gate_networks.residual(), torch.randn(2, 1, 8, 8))
    text = 'dependency-groups,obs{target="macs=1.0"},remove-channels'
    result = Pipeline.parse(text).run(program, data=load_data("digits"))
    assert result.removed.channels == 0
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(result.program.module(x), program.module(x))
