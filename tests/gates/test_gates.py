"""Gates: their function, their cost, and that a gate of 0 is the removal, in random networks of both dialects."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphprune.budget import choose
from graphprune.cost import Cost, Keep, Products
from graphprune.cut import cut_program
from graphprune.errors import TargetError
from graphprune.gates.function import LIMIT, SHAPES, GateCost, Shape, trainable_gate
from graphprune.gates.insertion import PREFIX, Gated, insert_gates
from graphprune.gates.training import Axes, Budget, GateHook
from graphprune.groups import DependencyGroups, analyze
from graphprune.program import Program
from graphprune.scores import Scores
from graphprune.target import parse_target
from graphprune.training.forms import training_form
from graphprune.units import Granularity
from tests import gate_networks
from tests.exactness import ERROR, capture_as, in_double, random_scores
from tests.models import tiny_dense, tiny_mobile, tiny_transformer
from tests.patterns import PATTERNS
from tests.strategies import Recipe, build, recipes

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
QUICK_EXPORT = settings(QUICK, max_examples=12)


def literal(w: Tensor, shape: Shape, m: float) -> Tensor:
    """Return the trainable gate function as the paper writes it: step + sawtooth * gradient shape."""
    scaled = m * w
    sawtooth = (scaled - torch.floor(scaled).detach()) / m
    return (w >= 0).to(w.dtype) + sawtooth * SHAPES[shape](w)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_is_the_limit_of_the_literal_formula(shape: Shape) -> None:
    # The paper's M is finite: value and derivative differ by at most 1/M times |g| and |g'|, which are at most one.
    m = 1e6
    w = torch.linspace(-LIMIT, LIMIT, 101, dtype=torch.float64) + 1e-4 / 3
    ours, theirs = (w.clone().requires_grad_() for _ in range(2))
    weights = torch.linspace(-2, 2, len(w), dtype=torch.float64)
    a, b = trainable_gate(ours, shape), literal(theirs, shape, m)
    assert set(a.tolist()) == {0.0, 1.0}
    assert (a - b).abs().max() <= 1.01 / m
    for value in (a, b):
        (weights * value).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= 4 / m
    assert (SHAPES[shape](w) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_is_exact_in_bfloat16(shape: Shape) -> None:
    w = torch.tensor([-0.5, -1e-3, 0.0, 1e-3, 0.5], dtype=torch.bfloat16, requires_grad=True)
    gates = trainable_gate(w, shape)
    assert gates.tolist() == [0, 0, 1, 1, 1]
    gates.sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()
    assert (w.grad > 0).all()
    # The literal formula has nothing to say there: M w has no fraction left.
    scaled = torch.tensor([0.1, 0.3], dtype=torch.bfloat16) * 1e5
    assert torch.equal(scaled, scaled.floor())


def gate(
    program: Program,
    groups: DependencyGroups,
    *,
    granularity: tuple[Granularity, ...] = ("channels",),
    shape: Shape = "one",
) -> Gated:
    scores = Scores(values=random_scores(groups, 0), method="random")
    return insert_gates(program, groups, scores, granularity=granularity, shape=shape)


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            return [t for t in tree_leaves(module(*inputs)) if isinstance(t, Tensor)]
    finally:
        torch.set_default_dtype(previous)


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        same = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, (x - y).abs().double()).max() if x.numel() else torch.zeros(())
        scale = x.abs().max() if x.numel() else torch.ones(())
        assert gap <= ERROR * max(1e-300, float(scale)), float(gap)


def assert_gates_are_the_cut(
    program: Program, groups: DependencyGroups, gated: Gated, keep: Keep
) -> None:
    """Freeze the gates at a choice and compare with the cut."""
    inputs = in_double(program).batch(3, seed=5, dtype=torch.float64)
    cut = cut_program(program, groups, keep).program
    gated.gates.freeze(torch.from_numpy(keep))
    assert_equal(outputs(cut.module, inputs), outputs(gated.program.module, inputs))


def assert_random_cut(recipe: Recipe, seed: int, text: str, dialect: str) -> None:
    program = in_double(capture_as(*build(recipe), dialect))
    groups = analyze(program)
    gated = gate(program, groups)
    inputs = program.batch(2, dtype=torch.float64)
    assert_equal(outputs(program.module, inputs), outputs(gated.program.module, inputs))
    assume(len(gated.units) > 0)
    try:
        choice = choose(gated.groups, random_scores(groups, seed), parse_target(text))
    except TargetError:
        assume(False)
    assert_gates_are_the_cut(program, groups, gated, choice.keep)


@QUICK
@given(recipe=recipes(), seed=st.integers(0, 9), target=st.sampled_from(["ratio=0.5", "macs=0.6"]))
def test_gates_of_the_fx_dialect_are_the_cut(recipe: Recipe, seed: int, target: str) -> None:
    assert_random_cut(recipe, seed, target, "fx")


@QUICK_EXPORT
@given(recipe=recipes(most=4), seed=st.integers(0, 9))
def test_gates_of_the_export_dialect_are_the_cut(recipe: Recipe, seed: int) -> None:
    assert_random_cut(recipe, seed, "ratio=0.5", "export")


NETWORKS = {
    "residual": (gate_networks.residual, (2, 1, 8, 8)),
    "concatenation": (gate_networks.branches, (2, 1, 8, 8)),
    "depthwise": (gate_networks.depthwise, (2, 1, 8, 8)),
    "transformer": (gate_networks.transformer, (2, 1, 8, 8)),
    "dense": (tiny_dense, (2, 3, 16, 16)),
    "excite": (tiny_mobile, (2, 3, 16, 16)),
    "vision transformer": (tiny_transformer, (2, 3, 16, 16)),
    "experts": (PATTERNS["experts_of_the_two_best"].make, (2, 9, 5)),
}


OVERLAPPING = {
    "grouped transformer": (
        PATTERNS["attention_of_two_sets_of_queries_to_the_same_copies"].make,
        (2, 9, 5),
    ),
    "pairs of channels": (PATTERNS["one_stream_outer_product"].make, (2, 3, 6, 5)),
}
"""Networks in which some channels go along with several others, and have no gate of their own."""


def random_removal(groups: DependencyGroups, gated: Gated, seed: int) -> np.ndarray:
    """Return which units go: some of them, in a way that surgery can carry out."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        removed = rng.random(len(gated.units)) < 0.4
        keep = groups.close(gated.units.without(removed, groups.num_channels))
        if not groups.violations(keep):
            return removed
    raise AssertionError("no choice of units can be carried out")


def train_two_steps(gated: Gated) -> None:
    """Change every weight, the running statistics and the gates, as a training does."""
    form = training_form(gated.program).train()
    optimizer = torch.optim.SGD(form.parameters(), lr=0.02)
    for step in range(2):
        inputs = gated.program.batch(8, seed=step, dtype=torch.float64)
        form(*inputs).square().mean().backward()
        assert gated.gates.weight.grad is not None
        assert gated.gates.weight.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
    for module in gated.program.module.modules():
        module.training = False


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize("name", [*NETWORKS, *OVERLAPPING])
def test_gates_at_zero_are_the_cut_before_and_after_training(name: str, dialect: str) -> None:
    make, size = {**NETWORKS, **OVERLAPPING}[name]
    program = in_double(capture_as(make(), torch.randn(size), dialect))
    text = str(program)
    groups = analyze(program)
    is_transformer = "transformer" in name
    granularity: tuple[Granularity, ...] = (
        ("channels", "heads", "query-heads") if is_transformer else ("channels",)
    )
    gated = gate(program, groups, granularity=granularity)
    assert gated.kept == ()
    assert gated.units.is_head.any() == is_transformer
    inputs = program.batch(3, dtype=torch.float64)
    assert_equal(outputs(program.module, inputs), outputs(gated.program.module, inputs))
    for seed in range(2):
        removed = random_removal(groups, gated, seed)
        keep = groups.close(gated.units.without(removed, groups.num_channels))
        with torch.no_grad():
            gated.gates.weight.copy_(torch.from_numpy(np.where(removed, -0.1, 0.1)))
        # What goes along with others has no gate of its own: it reads zeros.
        assert np.array_equal(groups.close((gated.gates() > 0).numpy()), keep)
        cut = cut_program(program, groups, keep).program
        assert_equal(outputs(cut.module, inputs), outputs(gated.program.module, inputs))
        assert str(program) == text
        if seed == 0:
            train_two_steps(gated)
            gated.to_original(program)
            assert_gates_of_program_are(program, gated)


def assert_gates_of_program_are(program: Program, gated: Gated) -> None:
    """Check that a program has the values of its gated form, under the same names."""
    mine = dict(gated.program.named_tensors())
    assert {n for n in mine if not n.startswith(PREFIX)} == {n for n, _ in program.named_tensors()}
    assert all(torch.equal(t, mine[n]) for n, t in program.named_tensors())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cost_in_gates_is_the_cost_of_the_choice(name: str) -> None:
    make, size = NETWORKS[name]
    program = capture_as(make(), torch.randn(size), "fx")
    groups = analyze(program)
    gated = gate(program, groups)
    cost = GateCost(groups.cost, ("macs", "params"))
    gates = gated.gates()
    dense = groups.cost.total()
    assert cost(gates).tolist() == pytest.approx([1.0, 1.0])
    keep = groups.close(gated.units.without(random_removal(groups, gated, 3), groups.num_channels))
    left = groups.cost.total(keep)
    chosen = torch.from_numpy(keep).double().requires_grad_()
    expected_shares = [left.macs / dense.macs, left.params / dense.params]
    assert cost(chosen).tolist() == pytest.approx(expected_shares)
    cost(gates)[0].backward()
    assert gated.gates.weight.grad is not None
    saved = groups.cost.saved("macs")
    per_unit = np.bincount(
        gated.units.owner, weights=saved[gated.units.channels], minlength=len(gated.units)
    )
    expected = torch.from_numpy(per_unit / dense.macs).to(gated.gates.weight.dtype)
    torch.testing.assert_close(gated.gates.weight.grad, expected)


def test_gates_press_towards_a_latency_that_was_measured() -> None:
    make, size = NETWORKS["residual"]
    program = capture_as(make(), torch.randn(size), "fx")
    groups = analyze(program)
    modelled = Products.sum_of([(2e-6, groups.cost.products("macs"))], 0.5)
    cost = groups.cost.with_measured("latency", modelled)
    groups = dataclasses.replace(groups, cost=cost)
    gated = gate(program, groups)
    target = parse_target("latency=0.8,params=0.7")
    budget = Budget(gated, target)
    assert budget.limits.tolist() == pytest.approx([0.7, 0.8], rel=0.01)
    assert budget(gated.gates()).tolist() == pytest.approx([1.0, 1.0])
    hook = GateHook(
        gated, target, granularity=("channels",), round_to=1, lr=None, penalty=1.0, frozen=0.4
    )
    chosen = hook.freeze()
    assert chosen.cost.latency <= 0.8 * cost.total().latency
    assert chosen.cost.params <= 0.7 * cost.params
    used = budget(torch.from_numpy(chosen.keep).double())
    assert used[1].item() == pytest.approx(chosen.cost.latency / cost.total().latency)
    state = hook.state()
    hook.load_state(state)
    assert hook.own_cost == Cost(*state["own_cost"])


class _Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)
        self.mix = nn.Parameter(torch.randn(5, 8))
        self.last = nn.Linear(5, 3)
        self.other = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.cdist(self.first(x).relu(), self.mix)
        out: Tensor = self.last(mixed) + self.other(self.second(x))
        return out


def test_what_cannot_be_gated_stays_and_says_why() -> None:
    program = capture_as(_Distances().eval(), torch.randn(2, 6), "fx")
    groups = analyze(program)
    gated = gate(program, groups)
    (kept,) = gated.kept
    assert kept.what == "first.weight[0] (8 channels)"
    assert "at node cdist sums over it, in a way that no gate can stand for" in kept.why
    names = {gated.groups[int(g)].name for g in gated.units.group}
    assert names == {"mix[0]", "second.weight[0]"}
    assert len(gated.units) == 5 + 8


def test_an_axis_never_closes() -> None:
    program = capture_as(gate_networks.residual(), torch.randn(2, 1, 8, 8), "fx")
    groups = analyze(program)
    gated = gate(program, groups)
    with torch.no_grad():
        gated.gates.weight.copy_(-0.1 - 0.001 * torch.arange(len(gated.units)))
    Axes(gated).open_one(gated.gates)
    keep = groups.close(gated.gates().detach().numpy() > 0)
    assert groups.violations(keep) == []
    assert int((gated.gates.weight >= 0).sum()) == len(np.unique(gated.units.group))
