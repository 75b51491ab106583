from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphprune.calibration import Layer, collect, layers, unfold
from graphprune.program import Program
from tests.exactness import capture_as

# Sums of float32 products against sums of float64 ones, relative to the largest moment.
_RTOL = 2e-6
_LAYERS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("linear", nn.Linear(5, 7), (5,)),
    ("tokens", nn.Linear(5, 7, bias=False), (4, 5)),
    ("conv1d", nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 11)),
    ("conv2d", nn.Conv2d(3, 4, 3), (3, 8, 9)),
    ("pointwise", nn.Conv2d(3, 4, 1, bias=False), (3, 8, 9)),
    ("strided", nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 9, 8)),
    ("dilated", nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=2), (3, 9, 8)),
    ("grouped", nn.Conv2d(6, 4, 3, groups=2, padding=1), (6, 7, 6)),
    ("depthwise", nn.Conv2d(5, 10, 3, groups=5, padding=1, bias=False), (5, 6, 7)),
    ("same", nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 6, 7)),
    ("reflect", nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (3, 6, 7)),
    ("circular", nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (3, 7)),
    ("large kernel", nn.Conv2d(2, 3, 5, padding=2), (2, 4, 3)),
    ("conv3d", nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0)), (2, 4, 5, 3)),
    ("conv3d unit", nn.Conv3d(2, 3, (2, 3, 1), padding=(0, 1, 0)), (2, 4, 5, 3)),
]


def _sequential(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU())


def _only(program: Program) -> Layer:
    (layer,) = layers(program)
    return layer


def _input_of(program: Program, layer: Layer, *x: Tensor) -> Tensor:
    """Return what flows into the layer, in float64: torch.export writes an unusual padding as a node of its own."""
    interpreter = fx.Interpreter(program.map_floating(Tensor.double).module, False)
    interpreter.run(*(one.double() for one in x))
    found: Tensor = next(v for n, v in interpreter.env.items() if n.name == layer.input)
    return found


def _weight(program: Program, layer: Layer) -> Tensor:
    return dict(program.module.named_parameters())[layer.weight].detach().double()


def _samples(program: Program, layer: Layer, *x: Tensor, constant: bool = True) -> Tensor:
    kernel = _weight(program, layer).shape[2:]
    rows = unfold(layer, _input_of(program, layer, *x), kernel)
    return F.pad(rows, (0, 1), value=1.0) if constant and layer.bias is not None else rows


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize(("layer", "shape"), [c[1:] for c in _LAYERS], ids=[c[0] for c in _LAYERS])
def test_weight_times_samples_is_what_the_layer_computes(
    layer: nn.Module, shape: tuple[int, ...], dialect: str
) -> None:
    program = capture_as(_sequential(layer).eval(), torch.randn(3, *shape), dialect)
    found = _only(program)
    x = torch.randn(3, *shape)
    weight = _weight(program, found)
    rows = _samples(program, found, x, constant=False)
    computed = torch.cat(list(rows @ weight.flatten(1).unflatten(0, (found.groups, -1)).mT), dim=1)
    if found.bias is not None:
        computed = computed + dict(program.module.named_parameters())[found.bias].detach()
    expected = layer(x).double().detach()
    if found.kind == "conv":
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(
        computed, expected.reshape(-1, expected.shape[-1]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize(("layer", "shape"), [c[1:] for c in _LAYERS], ids=[c[0] for c in _LAYERS])
def test_the_gram_is_the_mean_of_the_samples_products(
    layer: nn.Module, shape: tuple[int, ...], dialect: str
) -> None:
    program = capture_as(_sequential(layer).eval(), torch.randn(3, *shape), dialect)
    found = _only(program)
    x = torch.randn(10, *shape) + 0.5
    moments = collect(program, x.split(4))[found.node]
    rows = _samples(program, found, x)
    expected = rows.mT @ rows / rows.shape[1]
    assert moments.has_constant == (found.bias is not None)
    assert moments.count == rows.shape[1]
    _assert_near(moments.gram, expected)


def _assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=_RTOL * float(expected.abs().max()))
