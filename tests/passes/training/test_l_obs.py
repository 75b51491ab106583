"""L-OBS as a pass: counts, values, options, refusals; the mathematics is in tests/second_order/."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import graphprune as gp
from graphprune import registry
from graphprune.capture import capture
from graphprune.contract import Context, TrainingResult
from graphprune.data import DataSource
from graphprune.errors import DataError, PassError, UsageError
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from graphprune.report.text import render_text
from graphprune.second_order.chain import chain_of
from graphprune.second_order.layers import layers
from graphprune.second_order.layerwise import Amount, prune_layers
from tests.exactness import capture_as
from tests.models import resnet20
from tests.training.networks import data as bright


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.fc1 = nn.Linear(12, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv2(self.pool(torch.relu(self.conv1(x))))).flatten(1)
        out: Tensor = self.fc2(torch.relu(self.fc1(y)))
        return out


_SIZES = {"conv1": 216, "conv2": 432, "fc1": 240, "fc2": 100}


def _data(num_samples: int = 300) -> DataSource:
    generator = torch.Generator().manual_seed(7)
    smooth = torch.randn(num_samples, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(smooth, size=(8, 8), mode="bilinear") + 0.3
    dataset = TensorDataset(images, torch.zeros(num_samples, dtype=torch.int64))
    return DataSource(name="test", input_shape=(3, 8, 8), num_classes=5, split=lambda _: dataset)


def _program(dialect: str = "fx") -> Program:
    torch.manual_seed(0)
    return capture_as(_Net().eval(), torch.randn(2, 3, 8, 8), dialect)


def _run(program: Program, **options: object) -> TrainingResult:
    context = Context(facts={}, dense=program, data=_data())
    step = registry.load("l-obs")(**options)
    step.check(context)
    result = step.run(program, context)
    assert isinstance(result, TrainingResult)
    return result


def _kept(program: Program) -> dict[str, int]:
    tensors = dict(program.module.named_parameters())
    names = dict.fromkeys(layer.weight for layer in layers(program))
    return {name.removesuffix(".weight"): int(tensors[name].count_nonzero()) for name in names}


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("update", ["static", "exact", "refit"])
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_the_share_is_kept_and_counted(dialect: str, update: str, inputs: str) -> None:
    program = _program(dialect)
    before = {name: tensor.clone() for name, tensor in program.named_tensors()}
    result = _run(program, keep=0.25, update=update, inputs=inputs)
    assert result.modified
    assert _kept(result.program) == {name: size // 4 for name, size in _SIZES.items()}
    assert result.metrics["l-obs/kept"] == sum(_SIZES.values()) // 4
    assert result.metrics["l-obs/kept_share"] == 0.25
    assert result.metrics["l-obs/conv2.weight/kept"] == 108
    assert all(torch.equal(before[name], tensor) for name, tensor in program.named_tensors())
    assert str(result.program) == str(program)
    again = _run(program, keep=0.25, update=update, inputs=inputs)
    assert again.metrics == result.metrics


def test_exact_changes_the_output_least_and_the_bound_holds() -> None:
    program = _program()
    changes = {}
    for update in ("exact", "refit", "static"):
        metrics = _run(program, keep=0.4, update=update).metrics
        changes[update] = metrics["l-obs/output_change"]
        assert 0 < metrics["l-obs/output_change"] <= metrics["l-obs/bound"]
        assert 0 < metrics["l-obs/fc2.weight/error"] < 1
    assert changes["exact"] < changes["static"]
    pruned = _run(program, keep=0.4, inputs="pruned").metrics
    assert pruned["l-obs/output_change"] < changes["exact"]
    assert pruned["l-obs/output_change"] <= pruned["l-obs/bound"]


def test_the_bound_of_one_layer_is_the_change_itself() -> None:
    program = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        dict(program.module.named_parameters())["0.bias"].fill_(
            100.0
        )  # ReLU lets everything through
    metrics = _run(program, keep=0.5).metrics
    assert metrics["l-obs/bound"] == pytest.approx(metrics["l-obs/output_change"], rel=1e-4)


def test_shares_by_layer_leave_the_others_alone() -> None:
    program = _program()
    result = _run(program, keep="fc1:0.5, conv2.weight:0.1")
    assert _kept(result.program) == {**_SIZES, "fc1": 120, "conv2": 43}
    old, new = (dict(p.module.named_parameters()) for p in (program, result.program))
    assert torch.equal(old["conv1.weight"], new["conv1.weight"])
    assert not torch.equal(old["fc1.bias"], new["fc1.bias"])  # the bias makes up, too


def test_all_layers_together_keep_the_share_where_it_matters() -> None:
    program = _program()
    with torch.no_grad():
        dict(program.module.named_parameters())["fc1.weight"][5:] = 0
    kept = _kept(_run(program, keep=0.3, allocation="global").program)
    assert sum(kept.values()) == pytest.approx(0.3 * sum(_SIZES.values()), abs=2)
    assert kept["fc1"] <= 60
    assert kept["conv1"] / 216 != kept["conv2"] / 432


def test_tolerance_takes_what_costs_less() -> None:
    program = _program()
    few, many = (_run(program, tolerance=t).metrics["l-obs/kept"] for t in (0.1, 0.01))
    assert 0 < few < many < sum(_SIZES.values())
    assert not _run(program, keep="conv1:1.0", update="static").modified


def test_a_second_round_keeps_the_zeros() -> None:
    first = _run(_program(), keep=0.5).program
    second = _run(first, keep=0.2).program
    zero = {n for n, t in first.named_tensors() if (t == 0).any()}
    for name, tensor in first.named_tensors():
        if name in zero:
            assert (dict(second.named_tensors())[name][tensor == 0] == 0).all()
    assert _kept(second) == {name: round(0.2 * size) for name, size in _SIZES.items()}


def test_zeroed_channels_are_removed_and_the_text_form_reads_back() -> None:
    text = (
        'l-obs{keep="conv1:0.02,fc1:0.05" update=refit inputs=pruned damping=0.05 num_samples=200 '
        "batch_size=50},dependency-groups,remove-zeros"
    )
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(str(pipeline)) == pipeline
    program = _program()
    result = pipeline.run(program, data=_data())
    assert result.passed
    assert result.removed.channels > 0
    assert result.measurements["l-obs/kept"] == 4 + 12


def test_tied_weights_are_pruned_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(torch.relu(self.fc(x)))
            return out

    x = torch.randn(64, 12)
    program = capture(Tied().eval(), x[:2])
    for inputs in ("dense", "pruned"):
        pruned, outcomes = prune_layers(
            program, lambda: [x], {"fc.weight": Amount(keep=30)}, update="exact", inputs=inputs
        )
        assert len(outcomes) == 1
        assert outcomes[0].kept == _kept(pruned)["fc"] == 30


def test_a_network_that_is_no_chain_has_no_bound() -> None:
    program = capture(resnet20().eval(), torch.randn(2, 3, 32, 32))
    assert chain_of(program) is None
    overlapping = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, stride=1), nn.Conv2d(4, 4, 3))
    program = capture(overlapping.eval(), torch.randn(2, 3, 8, 8))
    assert chain_of(program) is None
    assert "l-obs/bound" not in _run(program, keep=0.5).metrics
    for dialect in ("fx", "export"):
        chain = chain_of(_program(dialect))
        assert chain is not None
        assert [layer.weight.split(".")[0] for layer in chain] == list(_SIZES)


def test_dead_inputs_cost_nothing() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(torch.cat([x, torch.zeros_like(x)], 1))
            return out

    x = torch.randn(64, 6)
    program = capture(Dead().eval(), x[:2])
    for update in ("exact", "static", "refit"):
        amount = {"fc.weight": Amount(keep=36)}
        pruned, (outcome,) = prune_layers(program, lambda: [x], amount, update=update)
        assert outcome.kept == 36
        assert outcome.error == pytest.approx(0.0, abs=1e-12)
        torch.testing.assert_close(pruned.module(x), program.module(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either keep= or tolerance=, found keep=None tolerance=None"),
        ({"keep": 0.5, "tolerance": 0.1}, "expected either keep= or tolerance="),
        ({"keep": 0.0}, "keep= above 0 and up to 1, found 0.0"),
        ({"keep": "fc1:2"}, "above 0 and up to 1, .* found 'fc1:2'"),
        ({"keep": "fc1"}, "found 'fc1' in 'fc1'"),
        ({"keep": "fc9:0.5"}, "names 'fc9', which is no linear .* known: conv1, conv2, fc1, fc2"),
        ({"keep": "fc1:0.5", "allocation": "global"}, "allocation=global expected one keep="),
        ({"tolerance": -1.0}, "tolerance= of 0 or more, found -1.0"),
        ({"keep": 0.5, "damping": -0.1}, "damping= of 0 or more, found -0.1"),
        ({"keep": 0.5, "num_samples": 0}, "at least one sample, found num_samples=0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _run(_program(), **options)


def test_refusals() -> None:
    program = _program()
    context = Context(facts={}, dense=program)
    with pytest.raises(DataError, match="l-obs expected training data, found none; give data="):
        registry.load("l-obs")(keep=0.5).run(program, context)  # type: ignore[call-arg]
    with pytest.raises(PassError, match="singular .* larger damping"):
        _run(program, keep=0.5, damping=0.0, num_samples=3)
    with pytest.raises(
        PassError, match="expected weights of linear or convolution layers, found no"
    ):
        prune_layers(program, list, {"no": Amount(keep=1)}, update="exact")
    assert math.isfinite(
        _run(copy.deepcopy(program), keep=0.5, num_samples=3).metrics["l-obs/kept"]
    )


def test_the_report_counts_zeros_and_zips_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval()
    text = "l-obs{keep=0.1 num_samples=64},fine-tune{epochs=1 keep_zeros=true},export-onnx"
    result = gp.compile(
        model, torch.randn(2, 1, 8, 8), passes=text, data=bright(), out=tmp_path, device="cpu"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    weights = [m.weight for m in result.program.module.modules() if isinstance(m, nn.Linear)]
    kept = sum(round(0.1 * w.numel()) for w in weights)
    assert sum(int(w.count_nonzero()) for w in weights) == kept
    biases = 96 + 10
    assert kept < report["after"]["nonzero"] <= kept + biases
    assert report["before"]["nonzero"] == report["before"]["params"] == report["after"]["params"]
    assert report["after"]["onnx_bytes"] == report["before"]["onnx_bytes"]
    assert report["after"]["onnx_zipped_bytes"] < 0.4 * report["before"]["onnx_zipped_bytes"]
    printed = render_text(result.report)
    assert "parameters other than zero" in printed
    assert "ONNX file, zipped (bytes)" in printed
