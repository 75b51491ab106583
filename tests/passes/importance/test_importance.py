"""Importance passes: what they measure, that they repeat, and what they need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune import registry
from graphprune.contract import Context, Facts, Pass
from graphprune.data import DataSource, load_data
from graphprune.defaults import default_pipeline
from graphprune.errors import DataError, UsageError
from graphprune.flow import unavoidable_nodes
from graphprune.groups import DependencyGroups, Place, analyze
from graphprune.program import Program
from graphprune.scores import Scores, along, divisors, sum_over_places
from tests.models import tiny_inception, tiny_mobile, tiny_residual, tiny_transformer
from tests.strategies import randomize


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture
def program() -> Program:
    model = Digits()
    randomize(model)
    return gp.capture(model.eval(), torch.randn(1, 1, 8, 8))


@pytest.fixture
def groups(program: Program) -> DependencyGroups:
    return analyze(program)


@pytest.fixture(scope="module")
def data() -> DataSource:
    return load_data("digits")


def score(text: str, program: Program, data: DataSource | None = None, *, seed: int = 0) -> Scores:
    (step,) = gp.Pipeline.parse(text).passes
    facts: dict[type[Facts], Facts] = {DependencyGroups: analyze(program)}
    found = step.run(program, Context(facts=facts, dense=program, data=data, seed=seed))
    assert isinstance(found, Scores)
    assert found.method == text
    return found


def at(scores: Scores, groups: DependencyGroups, name: str) -> np.ndarray:
    return np.asarray(scores.values[groups.channels_of(Place(name, 0))])


METHODS = (
    "magnitude",
    "bn-scale",
    "activation",
    "taylor",
    "wanda",
    "fisher",
    "lamp",
    "geometric-median",
    "random",
)


def test_every_method_that_scores_is_tested_here() -> None:
    scoring = {name for name in registry.methods() if not registry.load(name).chooses}
    assert scoring == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_finite_repeat_and_change_nothing(
    name: str, program: Program, groups: DependencyGroups, data: DataSource
) -> None:
    text, values = str(program), {n: t.clone() for n, t in program.named_tensors()}
    first, second = (score(name, program, data, seed=3) for _ in range(2))
    assert np.array_equal(first.values, second.values)
    assert first.values.shape == (groups.num_channels,)
    assert np.isfinite(first.values).all()
    assert (first.values >= 0).all()
    assert at(first, groups, "conv1.weight").std() > 0
    assert str(program) == text
    for n, tensor in program.named_tensors():
        assert torch.equal(tensor, values[n])
        assert tensor.grad is None


@pytest.mark.parametrize("norm", [1, 2])
def test_magnitude_sums_rows_and_columns(
    norm: int, program: Program, groups: DependencyGroups
) -> None:
    option = "" if norm == 2 else "norm=1 "
    scores = score(f"magnitude{{{option}relative=false}}", program)
    power = torch.abs if norm == 1 else torch.square
    parameters = dict(program.module.named_parameters())
    rows = power(parameters["conv1.weight"]).sum((1, 2, 3))
    columns = power(parameters["conv2.weight"]).sum((0, 2, 3))
    expected = (rows + columns).detach().numpy()
    assert np.allclose(at(scores, groups, "conv1.weight"), expected, rtol=1e-5)


def energy(program: Program, name: str, dim: int) -> np.ndarray:
    weight = program.module.get_parameter(name).detach().double().square()
    return np.asarray(weight.sum([d for d in range(weight.dim()) if d != dim]))


def test_magnitude_of_a_chain_is_the_share_of_what_reads(
    program: Program, groups: DependencyGroups
) -> None:
    scores = at(score("magnitude", program), groups, "conv1.weight")
    columns = energy(program, "conv2.weight", 1)
    assert np.allclose(scores, columns / columns.sum(), rtol=1e-5)
    # A layer that is scaled, as one before a batch norm may be, says the same.
    with torch.no_grad():
        scaled = program.clone()
        for name in ("conv1.weight", "conv2.weight"):
            scaled.module.get_parameter(name).mul_(100.0)
    assert np.allclose(at(score("magnitude", scaled), groups, "conv1.weight"), scores, rtol=1e-5)


class Beside(nn.Module):
    """Layers that everything goes through, two behind a shortcut, and a size that goes around the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).view(x.shape[0], -1)
        x = x + self.outer(torch.relu(self.inner(x)))
        logits: Tensor = self.head(x)
        return logits


class BesideDigits(Beside):
    """The same for images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def test_magnitude_compares_layers_beside_a_shortcut_as_they_are() -> None:
    program = gp.capture(Beside().eval(), torch.randn(2, 6))
    groups = analyze(program)
    assert unavoidable_nodes(program, groups.labels) >= {"stem", "add", "head"}
    assert not unavoidable_nodes(program, groups.labels) & {"inner", "outer", "getattr_1"}
    scores = score("magnitude", program)
    mean = (energy(program, "inner.weight", 0).sum() + energy(program, "outer.weight", 0).sum()) / 2
    inner = (energy(program, "inner.weight", 0) + energy(program, "outer.weight", 1)) / mean
    assert np.allclose(at(scores, groups, "inner.weight"), inner, rtol=1e-5)
    head = energy(program, "head.weight", 1)
    stem = (energy(program, "inner.weight", 1) + energy(program, "outer.weight", 0)) / mean
    assert np.allclose(
        at(scores, groups, "stem.weight"), stem + head / head.sum(), rtol=1e-5
    )  # not the stem's own rows: the other layers read its channels


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        logits: Tensor = self.head(weights @ self.value(x))
        return logits


def test_magnitude_takes_rows_where_no_layer_reads() -> None:
    program = gp.capture(Attention().eval(), torch.randn(2, 7, 6))
    groups = analyze(program)
    scores = at(score("magnitude", program), groups, "query.weight")
    assert (scores > 0).all()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (name, make)
        for name in ("magnitude", "geometric-median", "bn-scale")
        for make in (tiny_residual, tiny_inception, tiny_mobile, tiny_transformer)
        if (name, make) != ("bn-scale", tiny_transformer)  # it has no batch norms
    ],
)
def test_both_dialects_score_the_same(name: str, make: Callable[[], nn.Module]) -> None:
    model, images = make().eval(), torch.randn(2, 3, 16, 16)
    traced, exported = gp.capture(model, images), torch.export.export(model, (images,))
    assert traced.dialect == "fx"
    rows: dict[str, np.ndarray] = {}
    others: dict[str, np.ndarray] = {}
    for found, program in ((rows, traced), (others, gp.capture(exported, images))):
        groups, scores = analyze(program), score(name, program)
        found |= {str(p): scores.values[groups.channels_of(p)] for p in groups.places}
    shared = rows.keys() & others.keys()
    assert len(shared) > 5
    for place in shared:
        assert np.allclose(rows[place], others[place], rtol=1e-6), place


def test_batch_norm_scale_is_the_scale(program: Program, groups: DependencyGroups) -> None:
    scores = score("bn-scale{relative=false}", program)
    scale = program.module.get_parameter("bn1.weight").abs().detach().numpy()
    assert np.allclose(at(scores, groups, "conv1.weight"), scale, rtol=1e-6)
    assert at(scores, groups, "fc.weight").min() > 1e5
    shares = at(score("bn-scale", program), groups, "conv1.weight")
    assert np.allclose(shares, scale / scale.sum(), rtol=1e-6)


def test_batch_norm_scale_reads_the_export_dialect(program: Program) -> None:
    model = Digits()
    randomize(model)
    exported = gp.capture(torch.export.export(model.eval(), (torch.randn(2, 1, 8, 8),)))
    scores = score("bn-scale{relative=false}", exported)
    scale = model.bn2.weight.abs().detach().numpy()
    assert np.allclose(at(scores, analyze(exported), "conv2.weight"), scale, rtol=1e-6)


def test_batch_norm_scale_needs_batch_norms() -> None:
    program = gp.capture(tiny_transformer(), torch.randn(1, 3, 16, 16), source="tiny")
    with pytest.raises(
        UsageError, match="bn-scale needs batch normalisations with a scale, and tiny has none"
    ):
        score("bn-scale", program)


def test_activation_is_the_mean_of_what_consumers_read(
    program: Program, groups: DependencyGroups, data: DataSource
) -> None:
    scores = score("activation{relative=false}", program, data)
    loader = data.train(64, seed=0, limit=512)
    means = []
    with torch.inference_mode():
        for inputs, _ in loader:
            modules = dict(program.module.named_modules())
            y = F.relu(modules["bn1"](modules["conv1"](inputs)))
            means.append(y.abs().mean((0, 2, 3)))
    expected = torch.stack(means).double().mean(0).numpy()
    assert np.allclose(at(scores, groups, "conv1.weight"), expected, rtol=1e-4)
    shares = at(score("activation", program, data), groups, "conv1.weight")
    assert np.allclose(shares, expected / expected.sum(), rtol=1e-4)


def test_dead_channel_scores_nothing(
    program: Program, groups: DependencyGroups, data: DataSource
) -> None:
    with torch.no_grad():
        program.module.get_parameter("bn1.weight")[2] = 0
        program.module.get_parameter("bn1.bias")[2] = -1
    for name in ("activation", "bn-scale"):
        values = at(score(name, program, data), groups, "conv1.weight")
        assert values[2] == 0
        assert np.delete(values, 2).min() > 0
    taylor = at(score("taylor", program, data), groups, "conv1.weight")
    assert taylor.argmin() == 2


def test_taylor_predicts_the_change_of_the_loss(
    program: Program, groups: DependencyGroups, data: DataSource
) -> None:
    scores = score("taylor{num_samples=64}", program, data)
    weight = program.module.get_parameter("fc.weight")
    clone = program.clone().module.requires_grad_(True)
    inputs, labels = next(iter(data.train(64, seed=0, limit=64)))
    F.cross_entropy(clone(inputs), labels).backward()
    products = {
        name: (p * p.grad).detach() for name, p in clone.named_parameters() if p.grad is not None
    }
    expected = sum(
        along(products[place.name], place.dim).__abs__()
        for place in next(g for g in groups if g.name == "conv2.weight[0]").places
        if place.name in products
    )
    assert np.allclose(at(scores, groups, "conv2.weight"), expected, rtol=1e-4, atol=1e-9)
    assert weight.grad is None


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_gradients_are_of_the_tasks_loss(name: str) -> None:
    program = gp.capture(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 1)).eval(),
        torch.randn(1, 1, 8, 8),
    )
    data = load_data("tests.training.networks:regression_data")
    task = "tests.training.networks:regression"
    scores = score(f"{name}{{num_samples=32 task={task}}}", program, data)
    assert np.isfinite(scores.values).all()
    assert np.ptp(scores.values) > 0
    with pytest.raises(
        DataError, match=r"one integer label per sample, found outputs .* targets float32"
    ):
        score(f"{name}{{num_samples=32}}", program, data)


def test_a_method_is_told_the_task() -> None:
    text = default_pipeline(method="taylor{num_samples=8}", has_data=True, task="a.b:c")
    assert "taylor{num_samples=8 task=a.b:c},choose-channels" in text
    # magnitude has no use for it; the norms that are settled after the cut read samples as the task does
    text = default_pipeline(method="magnitude", has_data=True, task="a.b:c")
    assert ",magnitude,choose-channels" in text
    assert "reestimate-batch-norm{task=a.b:c}" in text
    assert "task=a.b:c" in default_pipeline(method="trainable-gates", has_data=True, task="a.b:c")


def test_random_follows_the_seed(program: Program) -> None:
    one, two = (score("random", program, seed=s).values for s in (1, 2))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("name", ["activation", "taylor"])
def test_data_is_asked_for(name: str, program: Program) -> None:
    with pytest.raises(DataError, match=f"{name} expected .*training data, found none"):
        score(name, program)


@pytest.mark.parametrize("name", METHODS)
def test_analysis_is_required(name: str) -> None:
    kind: type[Pass] = registry.load(name)
    assert kind.requires == (DependencyGroups,)


def test_sum_over_places_adds_up(program: Program, groups: DependencyGroups) -> None:
    values = sum_over_places(
        program, groups, lambda place, tensor: np.ones(tensor.shape[place.dim])
    )
    (group,) = (g for g in groups if g.name == "conv1.weight[0]")
    assert (values[group.channels] == len(group.places)).all()
    nothing = sum_over_places(program, groups, lambda place, tensor: None)
    assert not nothing.any()


def test_wanda_weighs_columns_with_what_they_read(
    program: Program, groups: DependencyGroups, data: DataSource
) -> None:
    scores = score("wanda{num_samples=128 relative=false}", program, data)
    modules = dict(program.module.named_modules())
    images = torch.cat([inputs for inputs, _ in data.train(64, seed=0, limit=128)])
    with torch.inference_mode():
        read = F.relu(modules["bn1"](modules["conv1"](images)))
    patches = F.unfold(read, 3, padding=1).double().transpose(0, 1).flatten(1)
    rms = patches.square().mean(1).sqrt().view(6, 9)
    weight = program.module.get_parameter("conv2.weight").detach().double()
    expected = (weight.abs().sum(0).flatten(1) * rms).sum(1)
    assert np.allclose(at(scores, groups, "conv1.weight"), expected.numpy(), rtol=1e-4)
    shares = at(score("wanda{num_samples=128}", program, data), groups, "conv1.weight")
    assert np.allclose(shares, (expected / expected.sum()).numpy(), rtol=1e-4)


def test_fisher_squares_before_it_averages(
    program: Program, groups: DependencyGroups, data: DataSource
) -> None:
    scores = score("fisher{num_samples=8}", program, data)
    clone = program.clone()
    expected = np.zeros(6)
    for inputs, label in data.train(1, seed=0, limit=8):
        clone.module.zero_grad()
        F.cross_entropy(clone.module(inputs), label).backward()
        products = {
            n: p.detach() * p.grad for n, p in clone.module.named_parameters() if p.grad is not None
        }
        change = products["conv1.weight"].sum((1, 2, 3)) + products["conv1.bias"]
        change = change + products["bn1.weight"] + products["bn1.bias"]
        change = change + products["conv2.weight"].sum((0, 2, 3))
        expected += change.double().numpy() ** 2 / 16
    assert np.allclose(at(scores, groups, "conv1.weight"), expected, rtol=1e-4)


def test_lamp_compares_with_what_is_left(program: Program, groups: DependencyGroups) -> None:
    squares = at(score("magnitude{relative=false}", program), groups, "conv1.weight")
    values = at(score("lamp", program), groups, "conv1.weight")
    expected = [s / squares[squares >= s].sum() for s in squares]
    assert np.allclose(values, expected, rtol=1e-6)
    assert values.max() == 1.0


def test_the_filter_in_the_middle_goes_first() -> None:
    first = nn.Conv2d(1, 4, 3, bias=False)
    with torch.no_grad():
        for row, value in enumerate((-2.0, 0.1, 1.0, 4.0)):
            first.weight[row] = value
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 2, 1))
    program = gp.capture(model.eval(), torch.randn(1, 1, 8, 8))
    groups = analyze(program)
    values = at(score("geometric-median{relative=false}", program), groups, "0.weight")
    distances = [3 * sum(abs(a - b) for b in (-2.0, 0.1, 1.0, 4.0)) for a in (-2.0, 0.1, 1.0, 4.0)]
    assert np.allclose(values, distances, rtol=1e-6)
    assert int(np.argmin(values)) in (1, 2)
    shares = at(score("geometric-median", program), groups, "0.weight")
    assert np.allclose(shares, np.array(distances) / sum(distances), rtol=1e-6)


def test_layers_compare_by_shares_or_by_the_mean_of_their_kind() -> None:
    sums = {"stem": 10.0, "inner": 1.0, "outer": 3.0, "dead": 0.0}
    found = divisors(sums, {"stem", "dead"})
    assert found == {"stem": 10.0, "inner": 2.0, "outer": 2.0, "dead": pytest.approx(0.0)}
    assert found["dead"] > 0
    assert divisors({"inner": 0.0}, ())["inner"] > 0


@pytest.mark.parametrize("name", ["wanda", "activation"])
def test_what_reads_beside_a_shortcut_is_compared_as_it_is(name: str) -> None:
    program = gp.capture(BesideDigits().eval(), torch.randn(2, 1, 8, 8))
    groups, data = analyze(program), load_data("digits")
    plain = at(score(f"{name}{{relative=false}}", program, data), groups, "inner.weight")
    found = at(score(name, program, data), groups, "inner.weight")
    assert np.allclose(found / found.sum(), plain / plain.sum(), rtol=1e-4)
    # Two layers are of this kind, `inner` and `outer`; the channels of `inner` are what `outer` reads.
    stem = at(score(name, program, data), groups, "stem.weight").sum() - 1  # what `head` reads is 1
    assert np.allclose((stem + found.sum()) / 2, 1, rtol=1e-4)
