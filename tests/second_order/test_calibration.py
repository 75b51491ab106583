from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphprune import capture
from graphprune.errors import DataError, PassError
from graphprune.program import Program
from graphprune.second_order.calibration import Layer, collect, layers, unfold
from graphprune.second_order.shifted import ShiftedProducts
from tests.exactness import capture_as
from tests.models import resnet20, tiny_mobile

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
    with torch.no_grad():
        interpreter.run(*(one.double() for one in x))
    found: Tensor = next(v for n, v in interpreter.env.items() if n.name == layer.input)
    return found


def _weight(program: Program, layer: Layer) -> Tensor:
    return dict(program.module.named_parameters())[layer.weight].detach().double()


def _samples(program: Program, layer: Layer, *x: Tensor, constant: bool = True) -> Tensor:
    rows = unfold(layer, _input_of(program, layer, *x))
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


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 4), (5, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_products_of_shifted_images_are_those_of_patches(
    kernel: tuple[int, int], dilation: int, padding: int
) -> None:
    torch.manual_seed(0)
    sides = ((padding, padding), (padding, 0))
    layer = Layer(
        node="n",
        weight="w",
        bias=None,
        kind="conv",
        input="x",
        kernel_size=kernel,
        stride=(1, 1),
        dilation=(dilation, dilation),
        padding=sides,
    )
    x, y = torch.randn(4, 3, 10, 8).double(), torch.randn(4, 2, 10, 8).double()
    own = ShiftedProducts(kernel, (dilation, dilation), sides)
    both = ShiftedProducts(kernel, (dilation, dilation), sides)
    for part in (slice(0, 3), slice(3, 4)):
        own.add(x[part])
        both.add(y[part], x[part])
    rows, others = unfold(layer, x)[0], unfold(layer, y)[0]
    torch.testing.assert_close(own.total(), rows.T @ rows)
    torch.testing.assert_close(both.total(), others.T @ rows)


def test_shifted_products_of_an_image_smaller_than_the_kernel() -> None:
    sides = ((2, 2), (2, 2))
    layer = Layer(
        node="n",
        weight="w",
        bias=None,
        kind="conv",
        input="x",
        kernel_size=(5, 5),
        stride=(1, 1),
        dilation=(1, 1),
        padding=sides,
    )
    x = torch.randn(3, 2, 1, 2).double()
    products = ShiftedProducts((5, 5), (1, 1), sides)
    products.add(x)
    rows = unfold(layer, x)[0]
    torch.testing.assert_close(products.total(), rows.T @ rows)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_every_layer_of_a_network_at_once(dialect: str) -> None:
    program = capture_as(tiny_mobile().eval(), torch.randn(2, 3, 16, 16), dialect)
    x = torch.randn(12, 3, 16, 16)
    moments = collect(program, x.split(5))
    assert list(moments) == [layer.node for layer in layers(program)]
    for layer in layers(program):
        rows = _samples(program, layer, x)
        _assert_near(moments[layer.node].gram, rows.mT @ rows / rows.shape[1])


def test_cross_moments_compare_with_the_reference() -> None:
    dense = capture(resnet20().eval(), torch.randn(2, 3, 32, 32))
    pruned = dense.clone()
    with torch.no_grad():
        for layer in layers(pruned)[:4]:
            weight = dict(pruned.module.named_parameters())[layer.weight]
            weight.mul_(torch.rand_like(weight) > 0.5)
    x = torch.randn(6, 3, 32, 32)
    chosen = [layer for layer in layers(dense) if layer.node in _SOME]
    assert len(chosen) == len(_SOME)
    moments = collect(pruned, x.split(4), list(_SOME), reference=dense)
    for layer in chosen:
        rows = _samples(pruned, layer, x)
        others = _samples(dense, layer, x)
        cross = moments[layer.node].cross
        assert cross is not None
        _assert_near(cross, others.mT @ rows / rows.shape[1])
    assert not torch.allclose(others, rows)


_SOME = ("layer1_0_conv1", "layer2_0_conv1", "layer3_2_conv2", "linear")
"""A convolution of stride 1 and one of stride 2, one of few places, and a linear layer."""


def test_a_reference_may_be_wider() -> None:
    def net(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1)
        )

    wide, narrow = net(8).eval(), net(5).eval()
    x = torch.randn(4, 3, 9, 9)
    programs = capture(wide, x), capture(narrow, x)
    node = layers(programs[1])[1].node
    cross = collect(programs[1], [x], [node], reference=programs[0])[node].cross
    assert cross is not None
    others, rows = (_samples(p, layers(p)[1], x) for p in programs)
    _assert_near(cross, others.mT @ rows / rows.shape[1])


def test_a_few_patches_stand_for_all() -> None:
    program = capture(_sequential(nn.Conv2d(3, 4, 3, padding=1)).eval(), torch.randn(2, 3, 16, 16))
    x = torch.randn(32, 3, 16, 16)
    node = layers(program)[0].node
    every = collect(program, x.split(8))[node]
    few = collect(program, x.split(8), max_patches=500)[node]
    again = collect(program, x.split(8), max_patches=500)[node]
    enough = collect(program, x.split(8), max_patches=8 * 256)[node]
    assert few.count == every.count == 32 * 256
    assert torch.equal(few.gram, again.gram)
    assert 0 < float((few.gram - every.gram).abs().max()) < 0.15
    assert float(few.gram[0, -1, -1]) == 1.0
    _assert_near(enough.gram, every.gram)


def test_the_constant_is_an_option() -> None:
    program = capture(_sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4))
    x = torch.randn(9, 4)
    node = layers(program)[0].node
    moments = collect(program, [x], bias=False, dtype=torch.float32)[node]
    assert not moments.has_constant
    assert moments.gram.dtype == torch.float32
    torch.testing.assert_close(moments.gram[0], x.T @ x / 9)


def test_tied_weights_make_a_layer_each() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            again: Tensor = self.second(self.first(self.first(x)).relu())
            return again

    program = capture(Tied().eval(), torch.randn(2, 4))
    assert [layer.weight for layer in layers(program)] == ["first.weight"] * 3
    assert [layer.bias for layer in layers(program)] == ["first.bias"] * 2 + [None]


def test_what_is_not_a_layer() -> None:
    class Odd(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Odd(3, 4, 1), nn.ConvTranspose2d(4, 2, 3), nn.Conv2d(2, 2, 1)).eval()
    program = capture(model, torch.randn(2, 3, 5, 5))
    assert [layer.weight for layer in layers(program)] == ["2.weight"]


def test_nothing_runs_beyond_the_last_layer_and_nothing_changes() -> None:
    class Trap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 4)  # does not fit other batches

    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), Trap())
    program = capture(model.eval(), torch.randn(4, 3))
    before = {name: tensor.clone() for name, tensor in program.named_tensors()}
    text = str(program)
    for module in program.module.modules():
        module.training = True
    first, second = (layer.node for layer in layers(program))
    assert list(collect(program, [torch.randn(7, 3)], [second, first])) == [first, second]
    assert all(module.training for module in program.module.modules())
    assert str(program) == text
    assert all(torch.equal(before[name], tensor) for name, tensor in program.named_tensors())


def test_errors() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 5), nn.ReLU()).eval(), torch.randn(4, 3))
    (layer,) = layers(program)
    with pytest.raises(
        PassError,
        match=r"expected linear or convolution nodes of the program, found nowhere; known",
    ):
        collect(program, [], ["nowhere"])
    with pytest.raises(DataError, match="at least one batch of samples, found none"):
        collect(program, [])
    with pytest.raises(DataError, match=f"not finite flowing into layer {layer.node}"):
        collect(program, [torch.full((2, 3), torch.nan)])
    with pytest.raises(DataError, match=f"batch without samples at layer {layer.node}"):
        collect(program, [torch.randn(0, 3)])
    with pytest.raises(PassError, match="max_patches of at least 1, found 0"):
        collect(program, [torch.randn(2, 3)], max_patches=0)
    other = capture(nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU()).eval(), torch.randn(4, 3, 7))
    assert layers(other)[0].node == layer.node
    with pytest.raises(PassError, match=r"the reference has an input of shape"):
        collect(other, [torch.randn(4, 3, 7)], reference=_strided())


def _strided() -> Program:
    model = nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU()).eval()
    program = capture(model, torch.randn(4, 3, 7))
    graph = program.module.graph
    source = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_after(source):
        half = graph.call_method("narrow", (source, 2, 0, 3))
    source.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)
    program.module.recompile()
    return program


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_the_cpu() -> None:
    program = capture(resnet20().eval(), torch.randn(2, 3, 32, 32))
    x = torch.randn(16, 3, 32, 32)
    here, there = collect(program, [x]), collect(program, [x], device="cuda")
    for node, moments in here.items():
        scale = float(moments.gram.abs().max())
        torch.testing.assert_close(there[node].gram, moments.gram, rtol=0, atol=1e-4 * scale)
    assert all(not tensor.is_cuda for _, tensor in program.named_tensors())
