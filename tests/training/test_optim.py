"""Optimizers and schedules by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from graphprune.errors import UsageError
from graphprune.training.optim import build_optimizer, build_schedule, check_optim


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))


class OwnSGD(torch.optim.SGD):
    """A class that is found by where it lives."""


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("SGD", torch.optim.SGD),
        ("adam-w", torch.optim.AdamW),
        ("AdamW", torch.optim.AdamW),
        ("rms_prop", torch.optim.RMSprop),
        ("adafactor", torch.optim.Adafactor),
        ("rprop", torch.optim.Rprop),
        ("torch.optim:SGD", torch.optim.SGD),
        ("tests.training.test_optim:OwnSGD", OwnSGD),
    ],
)
def test_every_spelling_finds_its_class(text: str, kind: type) -> None:
    found = build_optimizer(text, _model().named_parameters(), lr=0.1, weight_decay=0.5)
    assert isinstance(found, kind)
    assert {group["lr"] for group in found.param_groups} == {0.1}


def test_only_weights_decay() -> None:
    model = _model()
    found = build_optimizer("sgd", model.named_parameters(), lr=None, weight_decay=0.5)
    names = {p: n for n, p in model.named_parameters()}
    decay = {names[p]: g["weight_decay"] for g in found.param_groups for p in g["params"]}
    assert {n for n, value in decay.items() if value} == {"0.weight", "2.weight"}
    group = found.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.02, 0.9, True)


def test_weight_decay_in_braces_is_that_of_weights() -> None:
    found = build_optimizer(
        "adamw{weight_decay=0.3}", _model().named_parameters(), lr=None, weight_decay=0.5
    )
    assert {group["weight_decay"] for group in found.param_groups} == {0.0, 0.3}
    with pytest.raises(UsageError, match="weight_decay"):
        build_optimizer(
            "rprop{weight_decay=0.3}",
            [("w", nn.Parameter(torch.zeros(2, 2)))],
            lr=None,
            weight_decay=0.5,
        )


def test_options_reach_the_class() -> None:
    text = "adamw{betas=(0.8,0.95) amsgrad=true}"
    group = build_optimizer(
        text, _model().named_parameters(), lr=0.1, weight_decay=0.0
    ).param_groups[0]
    assert (group["betas"], group["amsgrad"]) == ((0.8, 0.95), True)


def _rates(text: str, *, epochs: int = 4, steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = build_schedule(text, optimizer, epochs=epochs, steps_per_epoch=steps)
    rates = []
    for _ in range(epochs):
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch(1.0)
    return rates


def test_own_schedules() -> None:
    assert _rates("constant") == [1.0] * 20
    assert _rates("cosine") == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    )
    warm = _rates("cosine{warmup=1 final=0.1}")
    assert warm[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert warm[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 14 / 15)))
    assert _rates("constant{warmup=0.4}")[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_schedules_of_torch_fill_in_the_length_of_the_run() -> None:
    assert _rates("step{step_size=2}")[::5] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert _rates("MultiStepLR{milestones=(1,3) gamma=0.5}")[::5] == [1.0, 0.5, 0.5, 0.25]
    assert max(_rates("one-cycle")) == pytest.approx(1.0)
    assert _rates("one-cycle")[-1] < 1e-3
    assert _rates("cosine-annealing")[::5] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    )
    assert _rates("polynomial")[::5] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert max(_rates("cyclic")) == pytest.approx(1.0)
    assert _rates("reduce-lr-on-plateau{patience=0}")[::5] == pytest.approx([1.0, 1.0, 0.1, 0.01])


@pytest.mark.parametrize(
    ("optimizer", "schedule", "message"),
    [
        ("tests.nowhere:SGD", "cosine", "optimizer 'tests.nowhere:SGD': cannot import"),
        ("torch.optim:Lion", "cosine", "'torch.optim' has no function or class 'Lion'"),
        (
            "torch.nn:Linear",
            "cosine",
            "expected a subclass of torch.optim.Optimizer, found .*Linear",
        ),
        ("lbfgs", "cosine", "optimizer: expected one of .*, found 'lbfgs'"),
        ("sgd,adam", "cosine", "optimizer: expected one name with options, found 'sgd,adam'"),
        ("adam{betas=3}", "cosine", "optimizer 'adam{betas=3}'"),
        ("optimizer", "cosine", "optimizer: expected one of .*, found 'optimizer'"),
        ("sgd", "lr-scheduler", "schedule: expected one of .*, found 'lr-scheduler'"),
        ("sgd", "_LRScheduler", "schedule: expected one of .*, found '_LRScheduler'"),
        ("sgd", "lambda", "schedule: expected one of cosine, constant, .*, found 'lambda'"),
        ("sgd", "cosine{cold=1}", "cosine takes warmup, final, found 'cold'"),
        ("sgd", "cosine{warmup=-1}", "expected warmup to be a number from 0 on, found -1"),
        ("sgd", "multi-step", "MultiStepLR needs milestones"),
        ("sgd", "step{step_size=1 speed=2}", "schedule 'step{step_size=1 speed=2}': .*speed"),
        ("adagrad", "one-cycle", "schedule 'one-cycle': .*momentum"),
    ],
)
def test_refusals(optimizer: str, schedule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_optim(optimizer, schedule)
