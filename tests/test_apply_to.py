"""The cut in the user's own class: equal outputs where its attributes can hold it, a reason where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import graphprune as gp
from graphprune.apply_to import apply_plan_to
from graphprune.budget import choose
from graphprune.cut import cut_program
from graphprune.errors import ApplyError
from graphprune.groups import analyze
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.target import Target
from tests import models
from tests.exactness import capture_as, random_scores


def compiled(
    model: nn.Module, example: Tensor, *, ratio: float = 0.4
) -> tuple[Program, Program, Plan]:
    """Return the program of a model, its cut, and the plan."""
    program = gp.capture(model, example)
    groups = analyze(program)
    keep = choose(groups, random_scores(groups, 0), Target(ratio=ratio)).keep
    plan = Plan.of(program, groups, keep)
    return program, cut_program(program, groups, keep).program, plan


class PartsOnly(nn.Module):
    """Sizes are said by modules and shapes alone; one linear is tied, one buffer is cut along."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.rand(8))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3)) + self.offset
        out: Tensor = self.last(self.second(self.first(x)))
        return out


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.conv(x).view(-1, 8 * 16))
        return out


class Halved(PartsOnly):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out if self.first.in_features == 8 else out / 2


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (torchvision.models.resnet18, 32),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32),
    "tiny_dense": (models.tiny_dense, 16),
    "tiny_mobile": (models.tiny_mobile, 16),
    "modules only": (PartsOnly, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_own_class_computes_what_the_cut_program_does(name: str) -> None:
    make, size = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    program, cut, plan = compiled(model, torch.randn(1, 3, size, size))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    smaller = apply_plan_to(model, program, cut, plan)
    assert type(smaller) is type(model)
    inputs = torch.randn(4, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(smaller(inputs), cut.module(inputs), rtol=1e-4, atol=1e-5)
    assert set(smaller.state_dict()) == set(before)
    assert sum(p.numel() for p in smaller.parameters()) == sum(
        p.numel() for p in cut.module.parameters()
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    smaller.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())


def test_tied_parameters_stay_tied() -> None:
    model = PartsOnly().eval()
    smaller = apply_plan_to(model, *compiled(model, torch.randn(1, 3, 6, 6)))
    first = smaller.get_parameter("first.weight")
    assert smaller.get_parameter("second.weight") is first
    assert first.shape == (5, 5)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (
            Literal,
            (3, 4, 4),
            r"Literal cannot hold the cut: the cut rewrote 1 sizes that its forward says in numbers "
            r"\(view: \(conv, -1, 128\) -> \(conv, -1, 80\)\); it fails with",
        ),
        (models.tiny_transformer, (3, 16, 16), "cannot hold the cut|has no module"),
    ],
)
def test_class_that_says_sizes_in_numbers_is_refused(
    make: Callable[[], nn.Module], shape: tuple[int, ...], message: str
) -> None:
    model = make().eval()
    program, cut, plan = compiled(model, torch.randn(1, *shape))
    with pytest.raises(ApplyError, match=message) as caught:
        apply_plan_to(model, program, cut, plan)
    assert "Use result.program.module" in str(caught.value)


def test_class_that_runs_but_computes_something_else_is_refused() -> None:
    model = Halved().eval()
    program, cut, plan = compiled(model, torch.randn(1, 3, 6, 6))
    with pytest.raises(
        ApplyError, match="Halved runs with the cut tensors but gives other outputs than the cut"
    ):
        apply_plan_to(model, program, cut, plan)


def test_padding_shortcut_says_which_literals_stand_in_the_way() -> None:
    model = models.resnet20().eval()
    program, cut, plan = compiled(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(
        ApplyError, match=r"CifarResNet cannot hold the cut: the cut rewrote 2 sizes .*pad: "
    ):
        apply_plan_to(model, program, cut, plan)


class _Constants(nn.Module):
    """Three channels are one number, and are read by a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1, bias=False)
        with torch.no_grad():
            self.bn.weight[:3] = 0.0
            self.bn.bias[:3] = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return self.read(x)

    def read(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x)
        return result


class _NoPlace(_Constants):
    """Reads them with a weight alone: a bias has no name in it."""

    def read(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.head.weight)


class _Viewed(_Constants):
    """Has a use for the bias, and says a size in numbers."""

    def read(self, x: Tensor) -> Tensor:
        return super().read(x.view(-1, 8, 7, 7))


FOLDED = (
    "dependency-groups,fold-constants,dependency-groups,magnitude,"
    'choose-channels{target="macs=0.7"},remove-channels'
)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_a_layer_that_was_given_a_bias_has_it_in_the_own_class(dialect: str) -> None:
    model, x = _Constants().eval(), torch.randn(2, 3, 9, 9)
    result = gp.compile(capture_as(model, x, dialect), passes=FOLDED)
    smaller = result.apply_to(model)
    assert smaller.get_parameter("head.bias").shape == (5,)
    assert len(smaller.get_parameter("bn.weight")) < 8
    assert torch.equal(smaller(x), result.program.module(x))
    assert model.head.bias is None


def test_a_class_without_a_place_for_a_bias_says_so() -> None:
    model = _NoPlace().eval()
    result = gp.compile(model, torch.randn(2, 3, 9, 9), passes=FOLDED)
    with pytest.raises(ApplyError, match=r"gives other outputs .* no use for .* \(head\.bias\)"):
        result.apply_to(model)


def test_a_size_in_numbers_is_named_before_what_was_added() -> None:
    model = _Viewed().eval()
    result = gp.compile(model, torch.randn(2, 3, 9, 9), passes=FOLDED)
    with pytest.raises(ApplyError, match="cannot hold the cut: the cut rewrote 1 sizes that its"):
        result.apply_to(model)
