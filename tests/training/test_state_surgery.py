"""Optimizer state through surgery: training goes on exactly as a masked one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from graphprune.errors import PlanError, TrainingError
from graphprune.training import carry_optimizer, slice_tensors
from graphprune.training.optim import build_optimizer, build_schedule

SLICES: dict[str, dict[int, tuple[int, ...]]] = {
    "conv1.weight": {0: (0, 2, 3)},
    "conv1.bias": {0: (0, 2, 3)},
    "conv2.weight": {0: (1, 4), 1: (0, 2, 3)},
    "conv2.bias": {0: (1, 4)},
    "fc.weight": {1: (1, 4)},
}
EXACT = 1e-12
"""Sums in float64 over fewer terms, the others being zeros."""


class Net(nn.Module):
    def __init__(self, first: int = 5, second: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 3)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.fc = nn.Linear(second, 4)

    def forward(self, x: Tensor, masks: tuple[Tensor | float, ...] = (1.0, 1.0)) -> Tensor:
        x = torch.tanh(self.conv1(x)) * masks[0]
        x = torch.tanh(self.conv2(x)) * masks[1]
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def masks() -> tuple[Tensor, Tensor]:
    """Return what is zero for the channels that go, at their consumers."""
    first, second = torch.zeros(1, 5, 1, 1), torch.zeros(1, 6, 1, 1)
    first[:, list(SLICES["conv1.bias"][0])] = 1.0
    second[:, list(SLICES["conv2.bias"][0])] = 1.0
    return first.double(), second.double()


def cut(net: Net) -> Net:
    smaller = Net(3, 2).double()
    smaller.load_state_dict(slice_tensors(net.state_dict(), SLICES))
    return smaller


def step(net: Net, optimizer: Optimizer, number: int, *, masked: bool = False) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 1, 7, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(net(x, masks()) if masked else net(x), y).backward()
    optimizer.step()


def train_both(text: str) -> tuple[Net, Net]:
    """Train, cut, and go on twice: with the cut network, and with the whole one under a mask."""
    whole = Net().double()
    optimizer = build_optimizer(text, whole.named_parameters(), lr=0.05, weight_decay=1e-2)
    for number in range(3):
        step(whole, optimizer, number)
    masked = Net().double()
    masked.load_state_dict(whole.state_dict())
    twin = build_optimizer(text, masked.named_parameters(), lr=0.05, weight_decay=1e-2)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    smaller = cut(whole)
    carry_optimizer(optimizer, whole, smaller, SLICES)
    for number in range(3, 8):
        step(smaller, optimizer, number)
        step(masked, twin, number, masked=True)
    return smaller, masked


@pytest.mark.parametrize(
    "text",
    [
        "sgd",
        "sgd{momentum=0.0 nesterov=false}",
        "adam",
        "adamw{amsgrad=true}",
        "rmsprop{momentum=0.9 centered=true}",
        "adagrad",
    ],
)
def test_training_goes_on_as_a_masked_one(text: str) -> None:
    smaller, masked = train_both(text)
    expected = slice_tensors(dict(masked.named_parameters()), SLICES)
    for name, parameter in smaller.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=EXACT, atol=EXACT)


def test_forgetting_the_state_would_be_noticed() -> None:
    whole = Net().double()
    optimizer = build_optimizer("sgd", whole.named_parameters(), lr=0.05, weight_decay=0.0)
    for number in range(3):
        step(whole, optimizer, number)
    kept, fresh = cut(whole), cut(whole)
    carry_optimizer(optimizer, whole, kept, SLICES)
    step(kept, optimizer, 3)
    step(fresh, build_optimizer("sgd", fresh.named_parameters(), lr=0.05, weight_decay=0.0), 3)
    assert not torch.allclose(kept.fc.weight, fresh.fc.weight, rtol=1e-6)


def test_groups_schedules_and_foreign_parameters_stay() -> None:
    whole, extra = Net(), nn.Parameter(torch.ones(3))
    options = {"conv1.weight": {"lr": 0.5}}
    named = [*whole.named_parameters(), ("gate", extra)]
    optimizer = build_optimizer(
        "adam", named, lr=0.1, weight_decay=0.1, options_of=lambda name, _: options.get(name)
    )
    schedule = build_schedule("step{step_size=1 gamma=0.5}", optimizer, epochs=2, steps_per_epoch=1)
    (whole(torch.randn(2, 1, 7, 7)).sum() + extra.sum()).backward()
    optimizer.step()
    smaller = Net(3, 2)
    carry_optimizer(optimizer, whole, smaller, SLICES)
    assert optimizer.param_groups[0]["params"][0] is smaller.conv1.weight
    assert any(extra is p for group in optimizer.param_groups for p in group["params"])
    assert extra in optimizer.state
    assert whole.fc.weight not in optimizer.state
    assert optimizer.state[smaller.conv2.weight]["exp_avg"].shape == (2, 3, 3, 3)
    schedule.after_epoch(0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05, 0.05]


def test_a_parameter_that_is_gone_leaves_its_group() -> None:
    before = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    after = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9)
    before(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    carry_optimizer(optimizer, before, after, {})
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert len(optimizer.state) == 2


def test_factored_state_is_cut_where_it_has_the_dimension() -> None:
    before, after = nn.Linear(6, 4, bias=False), nn.Linear(3, 4, bias=False)
    optimizer = torch.optim.Adafactor(before.parameters(), lr=0.1)
    before(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    carry_optimizer(optimizer, before, after, {"weight": {1: (0, 2, 5)}})
    state = optimizer.state[after.weight]
    assert state["row_var"].shape == (4, 1)
    assert state["col_var"].shape == (1, 3)


def test_refusals() -> None:
    before, after = Net(), Net(3, 2)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(PlanError, match=r"conv1.weight has shape \[5, 1, 3, 3\].*give the slices"):
        carry_optimizer(optimizer, before, after, {})
    for parameter in before.parameters():
        optimizer.state[parameter]["odd"] = torch.zeros(7)
    with pytest.raises(TrainingError, match="the state of SGD for conv1.weight, odd has shape"):
        carry_optimizer(optimizer, before, after, SLICES)


def test_a_tied_parameter_stays_under_its_other_name() -> None:
    first, last = nn.Linear(3, 3, bias=False), nn.Linear(2, 2, bias=False)
    before = nn.ModuleDict({"head": first, "embedding": first})
    after = nn.ModuleDict({"embedding": last, "head": last})
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9)
    first(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    carry_optimizer(optimizer, before, after, {"head.weight": {0: (0, 2), 1: (1, 2)}})
    assert optimizer.param_groups[0]["params"] == [last.weight]
    assert optimizer.state[last.weight]["momentum_buffer"].shape == (2, 2)


def test_a_new_parameter_joins_the_group_of_its_layer() -> None:
    before = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    after = copy.deepcopy(before)
    after[1].bias = nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [p], "lr": lr}
        for p, lr in zip(before.parameters(), (1.0, 2.0, 3.0), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    carry_optimizer(optimizer, before, after, {})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 2]
    assert optimizer.param_groups[2]["params"][1] is after[1].bias
    assert optimizer.param_groups[2]["lr"] == 3.0
