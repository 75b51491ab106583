"""Capture: the graph computes what the model computes, under the model's names, and leaves the model alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune import capture
from graphprune.errors import CaptureError, InputError, LoadError
from graphprune.lowering.symbolic import tensors_of
from graphprune.program import Program
from tests import models

TOLERANCE = 1e-5


def assert_same_function(
    program: Program, model: nn.Module, *, batches: tuple[int, ...] = (1, 2, 5)
) -> None:
    """Assert that program and model agree on random inputs, and that the program uses the model's names."""
    training = [m.training for m in model.modules()]
    model.eval()
    for batch in batches:
        inputs = program.batch(batch, seed=batch)
        with torch.no_grad():
            expected, found = tensors_of(model(*inputs)), tensors_of(program.module(*inputs))
        assert len(expected) == len(found) > 0
        for a, b in zip(expected, found, strict=True):
            assert a.isfinite().all()
            assert a.std() > 0
            torch.testing.assert_close(b, a, atol=TOLERANCE, rtol=TOLERANCE)
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in program.module.named_parameters():
        assert parameter is own[name]


def _randomized(model: nn.Module) -> nn.Module:
    """Move normalisation statistics away from the identity and the head away from zero."""
    return models._randomize(model)


SMALL: dict[str, Callable[[], nn.Module]] = {
    name: getattr(models, name) for name in models.__all__ if name.startswith("tiny_")
}


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name: str) -> None:
    model = SMALL[name]()
    program = capture(model, torch.randn(1, 3, 16, 16))
    assert program.dialect == "fx"
    assert program.dynamic_batch
    assert_same_function(program, model)


def test_cifar_resnet() -> None:
    model = models.resnet20()
    program = capture(model, torch.randn(1, 3, 32, 32), source="resnet20")
    assert program.source == "resnet20"
    assert_same_function(program, _randomized(model))


TORCHVISION = {
    "resnet18": (3, 64, 64),
    "densenet121": (3, 64, 64),
    "mobilenet_v3_small": (3, 64, 64),
    "shufflenet_v2_x0_5": (3, 64, 64),
    "convnext_tiny": (3, 64, 64),
    "squeezenet1_1": (3, 64, 64),
    "swin_t": (3, 64, 64),
    "swin_v2_t": (3, 64, 64),
    "googlenet": (3, 64, 64),
    "efficientnet_b0": (3, 64, 64),
    "regnet_y_400mf": (3, 64, 64),
    "lraspp_mobilenet_v3_large": (3, 64, 64),
    "r3d_18": (3, 4, 32, 32),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    from graphprune.load import load_model

    model = load_model(f"torchvision:{name}")
    assert isinstance(model, nn.Module)
    program = capture(model, torch.randn(2, *TORCHVISION[name]))
    assert program.dialect == "fx"
    assert program.dynamic_batch
    assert_same_function(program, _randomized(model), batches=(1, 3))


def test_vision_transformer() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=40
    )
    nn.init.normal_(model.heads.head.weight)
    program = capture(model)
    assert program.example_inputs[0].shape == (1, 3, 32, 32)
    assert program.dialect == "fx"
    assert "assert" not in str(program)
    assert_same_function(program, model)


class _Branch(nn.Module):
    """Branches on values, so that no symbolic tracer gets through, and exports all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not isinstance(x, Tensor):
            raise TypeError("symbolic value")
        torch._check(x.shape[1] == 3)
        y = self.conv(x)
        return {"out": y.relu_() * self.scale, "shape": y.view(x.shape[0], -1)}


def test_export_takes_over() -> None:
    model = _Branch()
    program = capture(model, torch.randn(1, 3, 8, 8))
    assert program.dialect == "export"
    assert program.dynamic_batch
    assert "guards" not in str(program)
    assert list(program.module(torch.randn(2, 3, 8, 8))) == ["out", "shape"]
    assert_same_function(program, model)


class _FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.view(2, 12))
        return y


def test_fixed_batch_is_noticed() -> None:
    model = _FixedBatch()
    program = capture(model, torch.randn(2, 3, 4))
    assert not program.dynamic_batch
    assert_same_function(program, model, batches=(2,))


class _Hopeless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x.flatten()[: int(x.abs().sum()) % 3]


def test_hopeless_module_names_every_reason() -> None:
    with pytest.raises(
        CaptureError, match=r"(?s)_Hopeless cannot be captured.*torch.fx: .*torch.export"
    ):
        capture(_Hopeless(), torch.randn(2, 3))


def test_callers_module_is_left_alone() -> None:
    model = models.tiny_transformer().train()
    model.get_submodule("norm").eval()
    flags = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    program = capture(model, torch.randn(1, 3, 16, 16))
    assert [m.training for m in model.modules()] == flags
    assert not any(m.training for m in program.module.modules())
    assert {id(m) for m in model.modules()}.isdisjoint(id(m) for m in program.module.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_optional_inputs_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 4)

        def forward(
            self, ids: Tensor, x: Tensor, mask: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            y = self.table(ids) + x
            return (y, x * 2) if mask is None else (y * mask, x)

    model = Two()
    program = capture(model, (torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 4)))
    assert_same_function(program, model)


def test_shared_modules_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    program = capture(model, torch.randn(1, 4))
    assert len(list(program.module.parameters())) == 2
    assert not any(p.is_meta for p in model.parameters())
    assert_same_function(program, model)


def test_wrong_shape_names_the_module() -> None:
    with pytest.raises(
        InputError, match=r"(?s)1x4x16x16: module stem.0 \(Conv2d\) failed on 1x4x16x16.*--input"
    ):
        capture(models.tiny_residual(), torch.randn(1, 4, 16, 16))


def test_wrong_size_before_a_linear() -> None:
    with pytest.raises(InputError, match=r"module fc \(Linear\)"):
        capture(models.tiny_inception(), torch.randn(1, 3, 20, 20))


@pytest.mark.parametrize("inputs", [(), (torch.zeros(1, 3), torch.zeros(1, 3))])
def test_wrong_number_of_inputs(inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(InputError, match="input"):
        capture(nn.Linear(3, 2), inputs)


def test_missing_inputs() -> None:
    with pytest.raises(
        InputError, match="Linear does not state the shape of its input: give one with --input"
    ):
        capture(nn.Linear(3, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = models.tiny_residual()
    model.get_parameter("fc.weight").data[0, 0] = value
    with pytest.raises(LoadError, match=r"NaN or infinite: fc.weight"):
        capture(model, torch.randn(1, 3, 16, 16))


def test_statistics_that_are_not_numbers_but_masks_may_be_infinite() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    capture(model, torch.randn(2, 3))
    model.get_buffer("0.running_mean")[1] = float("nan")
    with pytest.raises(LoadError, match=r"0.running_mean"):
        capture(model, torch.randn(2, 3))


def test_the_helper_fails_on_another_function() -> None:
    model = models.tiny_residual()
    program = capture(model, torch.randn(1, 3, 16, 16)).clone()
    program.module.get_parameter("fc.bias").data += 1e-3
    with pytest.raises(AssertionError):
        assert_same_function(program, model)
