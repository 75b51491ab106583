"""Structured OBS: updates are least-squares refits, orders are greedy, and the walk sees what has been refitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.program import Program
from graphprune.second_order import weights as single_weights
from graphprune.second_order.calibration import Moments, collect
from graphprune.second_order.channels import refit, removal_order
from graphprune.second_order.layers import Layer
from graphprune.second_order.readers import Reader, UnitGroup, columns_of, unit_groups
from graphprune.second_order.side_by_side import walk
from graphprune.second_order.weights import output_error
from graphprune.units import find_units


def _moments(
    node: str, samples: Tensor, *, cross: Tensor | None = None, bias: bool = False
) -> Moments:
    layer = Layer(node=node, weight=f"{node}.weight", bias=None, kind="linear", input="x")
    if bias:
        samples = torch.cat([samples, torch.ones(len(samples), 1, dtype=samples.dtype)], 1)
        if cross is not None:
            cross = torch.cat([cross, torch.ones(len(cross), 1, dtype=cross.dtype)], 1)
    gram = samples.T @ samples / len(samples)
    return Moments(
        layer=layer,
        gram=gram[None],
        count=len(samples),
        cross=None if cross is None else (cross.T @ samples / len(samples))[None],
        has_constant=bias,
    )


def _group(readers: Sequence[Reader], size: int) -> UnitGroup:
    return UnitGroup(name="g", units=tuple(range(size)), width=1, readers=tuple(readers))


def _reader(node: str, columns: Sequence[Sequence[int]]) -> Reader:
    layer = Layer(node=node, weight=f"{node}.weight", bias=None, kind="linear", input="x")
    return Reader(layer=layer, columns=((torch.arange(len(columns)), torch.tensor(columns)),))


def _samples(count: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) @ mix


def _least_squares(weight: Tensor, samples: Tensor, alive: Tensor) -> Tensor:
    """Return the weights over the columns that are alive that come closest to ``weight @ y``."""
    solution = torch.linalg.lstsq(samples[:, alive], samples @ weight.T).solution
    result = torch.zeros_like(weight)
    result[:, alive] = solution.T
    return result


def test_the_update_is_the_least_squares_refit() -> None:
    samples, weight = _samples(200, 12), torch.randn(5, 12, dtype=torch.float64)
    columns = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    group = _group([_reader("a", columns)], 4)
    removal = removal_order(
        group, {"a": weight}, {"a": _moments("a", samples)}, damping=0.0, keep_weights=(1, 2, 3)
    )
    for count in (1, 2, 3):
        alive = torch.ones(12, dtype=torch.bool)
        alive[columns_of(group.readers[0], removal.order[:count])] = False
        expected = _least_squares(weight, samples, alive)
        torch.testing.assert_close(removal.weights[count]["a"], expected, rtol=1e-8, atol=1e-9)
        energy = (samples @ weight.T).square().sum()
        error = (samples @ (weight - expected).T).square().sum() / energy
        assert float(removal.errors[count]) == pytest.approx(float(error), rel=1e-8)


def test_whole_columns_are_single_weights_removed_together() -> None:
    # The other implementation, `weights`, works row by row and knows nothing of units.
    samples, weight = _samples(200, 12), torch.randn(5, 12, dtype=torch.float64)
    columns = [[0, 5, 7], [1, 2, 9], [3, 4, 6], [8, 10, 11]]
    group, moments = _group([_reader("a", columns)], 4), _moments("a", samples)
    gram = samples.T @ samples / len(samples)
    removal = removal_order(
        group, {"a": weight}, {"a": moments}, damping=0.0, keep_weights=(1, 2, 3)
    )
    energy = output_error(weight, gram)
    for count in (1, 2, 3):
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask[:, columns_of(group.readers[0], removal.order[:count])] = False
        single = single_weights.refit(weight, gram, mask)
        torch.testing.assert_close(removal.weights[count]["a"], single, rtol=1e-8, atol=1e-9)
        error = output_error(single - weight, gram) / energy
        assert float(removal.errors[count]) == pytest.approx(error, rel=1e-8)


def test_one_column_costs_what_its_weights_cost() -> None:
    samples, weight = _samples(200, 6), torch.randn(5, 6, dtype=torch.float64)
    group = _group([_reader("a", [[i] for i in range(6)])], 6)
    gram = samples.T @ samples / len(samples)
    removal = removal_order(
        group, {"a": weight}, {"a": _moments("a", samples)}, damping=0.0, keep_weights=(1,)
    )
    sensitivity = weight.square() / torch.linalg.inv(gram).diagonal()  # of single weights
    costs = sensitivity.sum(0) / output_error(weight, gram)
    assert int(removal.order[0]) == int(costs.argmin())
    assert float(removal.errors[1]) == pytest.approx(float(costs.min()), rel=1e-8)


def test_the_cheapest_unit_goes_first() -> None:
    samples, weight = _samples(300, 8, seed=3), torch.randn(6, 8, dtype=torch.float64)
    columns = [[i] for i in range(8)]
    removal = removal_order(
        _group([_reader("a", columns)], 8),
        {"a": weight},
        {"a": _moments("a", samples)},
        damping=0.0,
    )
    errors = []
    for unit in range(8):
        alive = torch.ones(8, dtype=torch.bool)
        alive[unit] = False
        left = weight - _least_squares(weight, samples, alive)
        errors.append(float((samples @ left.T).square().sum()))
    assert removal.order[0] == int(np.argmin(errors))
    assert len(removal.order) == 7
    assert bool((removal.errors.diff() >= 0).all())


def test_readers_share_the_decision() -> None:
    """Unit 0 is cheap for one layer and dear for the other; unit 1 is cheap for both."""
    samples = _samples(100, 3, seed=1)
    samples = torch.linalg.qr(samples).Q * 10  # columns that cannot stand in for one another
    a = torch.tensor([[0.1, 0.2, 5.0]], dtype=torch.float64)
    b = torch.tensor([[9.0, 0.2, 5.0]], dtype=torch.float64)
    group = _group([_reader("a", [[0], [1], [2]]), _reader("b", [[0], [1], [2]])], 3)
    moments = {n: _moments(n, samples) for n in "ab"}
    assert removal_order(group, {"a": a, "b": b}, moments).order[0] == 1
    alone = _group([_reader("a", [[0], [1], [2]])], 3)
    assert removal_order(alone, {"a": a}, moments).order[0] == 0


def test_dead_and_duplicate_inputs_cost_nothing() -> None:
    samples = _samples(100, 4, seed=2)
    samples[:, 1] = 0.0
    samples[:, 3] = samples[:, 2]
    weight = torch.randn(5, 4, dtype=torch.float64)
    removal = removal_order(
        _group([_reader("a", [[0], [1], [2], [3]])], 4),
        {"a": weight},
        {"a": _moments("a", samples)},
        damping=1e-9,
        keep_weights=(2,),
    )
    assert set(removal.order[:2]) < {1, 2, 3}
    assert float(removal.errors[2]) < 1e-6
    torch.testing.assert_close(
        samples @ removal.weights[2]["a"].T, samples @ weight.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bias", [False, True])
def test_refit_is_least_squares_towards_the_dense_output(bias: bool) -> None:
    dense = _samples(400, 6)
    now = dense + 0.1 * _samples(400, 6, seed=5)
    weight, shift = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    alive = torch.tensor([True, False, True, True, False, True])
    moments = _moments("a", now, cross=dense, bias=bias)
    found, moved = refit(weight, shift if bias else None, moments, alive, damping=0.0)
    goal = dense @ weight.T + (shift if bias else 0.0)
    inputs = now[:, alive]
    if bias:
        inputs = torch.cat([inputs, torch.ones(len(now), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(inputs, goal).solution.T
    torch.testing.assert_close(found[:, alive], expected[:, :4], rtol=1e-6, atol=1e-8)
    assert not found[:, ~alive].any()
    if bias:
        assert moved is not None
        torch.testing.assert_close(moved, expected[:, 4], rtol=1e-6, atol=1e-8)
    else:
        assert moved is None


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.right = nn.Conv2d(6, 5, 1, stride=2)
        self.head = nn.Linear(9 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        out: Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1).flatten(1))
        return out


def _program(model: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    return gp.capture((model or _Net()).eval(), torch.randn(1, 3, 8, 8))


def test_units_are_found_in_every_reader() -> None:
    program = _program()
    groups = gp.analyze(program)
    found, kept = unit_groups(program, groups, find_units(groups, np.ones(groups.num_channels)))
    by_name = {g.name: g for g in found}
    first = by_name["first.weight[0]"]
    assert [r.layer.node for r in first.readers] == ["left", "right"]
    assert columns_of(first.readers[0], [1]).tolist() == list(range(9, 18))
    assert columns_of(first.readers[1], [1]).tolist() == [1]
    right = by_name["right.weight[0]"]  # after the concatenation with `left` and the flattening
    assert columns_of(right.readers[0], [0]).tolist() == list(range(4 * 16, 5 * 16))
    assert not kept


def test_units_that_a_normalisation_mixes_stay() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 12)
            self.norm = nn.LayerNorm(12)
            self.second = nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.norm(self.first(x)))
            return out

    program = _program(Mixed())
    groups = gp.analyze(program)
    found, kept = unit_groups(program, groups, find_units(groups, np.ones(groups.num_channels)))
    assert not found
    assert "norm" in kept[0].why


class _Grouped(nn.Module):
    """A convolution of four groups between two others; a channel goes from every group at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_a_group_of_a_convolution_is_a_layer_of_its_own() -> None:
    program = _program(_Grouped())
    groups = gp.analyze(program)
    found, kept = unit_groups(program, groups, find_units(groups, np.ones(groups.num_channels)))
    assert not kept
    (group,) = (g for g in found if g.readers[0].layer.node == "grouped")
    assert len(group) == 3
    assert columns_of(group.readers[0], [1]).tolist() == list(range(9, 18))

    batches = [(torch.randn(6, 3, 8, 8),)]
    weight = program.module.get_parameter("grouped.weight").detach().flatten(1).double()
    (moments,) = walk(program, program.clone(), batches, ["grouped"])
    whole = removal_order(
        group, {"grouped": weight}, {"grouped": moments}, damping=0.0, keep_weights=(1, 2)
    )
    for count in (1, 2):
        alive = torch.ones(28, dtype=torch.bool)  # with the constant that the bias belongs to
        alive[columns_of(group.readers[0], whole.order[:count])] = False
        rows = torch.cat([weight, weight.new_zeros(8, 1)], 1).unflatten(0, (4, 2))
        fitted = torch.zeros_like(rows)
        for own, gram, result in zip(rows, moments.gram, fitted, strict=True):
            result[:, alive] = torch.linalg.solve(gram[alive][:, alive], gram[alive] @ own.T).T
        found_weight = whole.weights[count]["grouped"]
        expected = fitted[:, :, :-1].flatten(0, 1)
        torch.testing.assert_close(found_weight, expected, rtol=1e-6, atol=1e-7)
        lost, all_of_it = (float(((w @ moments.gram) * w).sum()) for w in (rows - fitted, rows))
        assert float(whole.errors[count]) == pytest.approx(lost / all_of_it, rel=1e-6)


def test_the_refit_of_a_grouped_convolution_is_that_of_each_group() -> None:
    program = _program(_Grouped())
    pruned = program.clone()
    with torch.no_grad():
        pruned.module.get_parameter("first.weight")[::3] = 0.0
    (moments,) = walk(pruned, program, [(torch.randn(6, 3, 8, 8),)], ["grouped"])
    dense = program.module.get_parameter("grouped.weight").detach().flatten(1).double()
    bias = program.module.get_parameter("grouped.bias").detach().double()
    alive = torch.ones(27, dtype=torch.bool)
    alive[:9] = False
    weight, shift = refit(dense, bias, moments, alive)
    assert shift is not None
    assert moments.cross is not None
    for i in range(4):
        rows = slice(2 * i, 2 * i + 2)
        one = dataclasses.replace(
            moments, gram=moments.gram[i : i + 1], cross=moments.cross[i : i + 1]
        )
        expected, constant = refit(dense[rows], bias[rows], one, alive)
        torch.testing.assert_close(weight[rows], expected)
        torch.testing.assert_close(shift[rows], constant)
        assert not weight[rows, :9].any()


def test_the_walk_agrees_with_collect() -> None:
    program = _program()
    batches = [(torch.randn(5, 3, 8, 8),), (torch.randn(2, 3, 8, 8),)]
    nodes = ["left", "right", "head"]
    expected = collect(program, batches, nodes)
    for moments in walk(program, program.clone(), batches, nodes):
        gram = expected[moments.layer.node].gram
        torch.testing.assert_close(moments.gram, gram, rtol=1e-5, atol=1e-6)
        assert moments.cross is not None
        torch.testing.assert_close(moments.cross, gram, rtol=1e-5, atol=1e-6)


def test_the_walk_sees_new_weights() -> None:
    program = _program()
    reference = program.clone()
    batches = [(torch.randn(5, 3, 8, 8),)]
    for moments in walk(program, reference, batches, ["left", "head"]):
        if moments.layer.node == "left":
            with torch.no_grad():
                program.module.get_parameter("left.weight").mul_(2.0)
                program.module.get_parameter("left.bias").mul_(2.0)
        else:
            own = 4 * 16  # what `left` feeds into the head
            gram, cross = moments.gram[0], moments.cross
            assert cross is not None
            torch.testing.assert_close(gram[:own, :own], 2 * cross[0][:own, :own])
            torch.testing.assert_close(gram[own:, own:], cross[0][own:, own:])
