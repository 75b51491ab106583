"""Batch norms of training forms do what torch's do, in value, gradient and running statistics."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.capture import capture
from graphprune.training import batch_norm as ours
from graphprune.training.forms import training_form


def images(channels: int, *, batch: int = 6, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, side, side, generator=generator) * 2 + 3
    return x.to(memory_format=torch.channels_last)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an element whenever our own kernel is called."""
    uses: list[int] = []
    apply = ours._Wide.apply

    def counting(*args: Any) -> Any:
        uses.append(len(args))
        return apply(*args)

    monkeypatch.setattr(ours._Wide, "apply", counting)
    return uses


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [6, 7])
@pytest.mark.parametrize("channels", [2, 3, 11, 12, 16, 22, 39, 45, 260])
def test_values_and_gradients_are_those_of_torch(
    channels: int, batch: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    uses = counted(monkeypatch)
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias)
    twin = copy.deepcopy(layer)
    x, other = (images(channels, batch=batch, side=7).requires_grad_() for _ in range(2))
    grad = images(channels + 100, batch=batch, side=7)[:, :channels]
    wanted = layer(x)
    wanted.backward(grad)
    found = ours.TrainedBatchNorm(twin, ours.batch_norm)(other)
    found.backward(grad)
    few = 20 if threads == 1 else 256
    has_pairs = (
        batch % 2 == 0
    )  # seven images of 7 x 7: an odd number of pixels, which nothing groups
    assert bool(uses) == (channels % 16 != 0 and has_pairs and channels < few)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(twin.bias.grad, layer.bias.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())
    assert found.stride() == wanted.stride()


@pytest.mark.parametrize("channels", [3, 12, 22])
def test_bfloat16_keeps_its_precision(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    uses = counted(monkeypatch)
    layer = nn.BatchNorm2d(channels)
    exact = copy.deepcopy(layer).double()
    x = images(channels).bfloat16().requires_grad_()
    grad = images(channels + 100)[:, :channels].bfloat16()
    other = x.detach().double().requires_grad_()
    wanted = exact(other)
    wanted.backward(grad.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.TrainedBatchNorm(layer, ours.batch_norm)(x)
    found.backward(grad)
    assert uses
    assert x.grad is not None
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-2, atol=2e-2)
    # Sums over all pixels are of float32, as the running statistics are.
    close = partial(torch.testing.assert_close, check_dtype=False)
    close(layer.weight.grad, exact.weight.grad, rtol=1e-4, atol=1e-2)
    close(layer.running_var, exact.running_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_a_form_trains_with_it_in_both_dialects(
    dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11), nn.ReLU()).eval()
    twin = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
    exported = torch.export.export(model, (images(3),))
    program = capture(model if dialect == "fx" else exported, images(3))
    program.module.to(memory_format=torch.channels_last)
    uses = counted(monkeypatch)
    form = training_form(program).train()
    x = images(3)
    found, wanted = form(x), twin(x)
    found.square().mean().backward()
    wanted.square().mean().backward()
    assert uses
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    named = dict(program.named_tensors())
    for name, buffer in twin.named_buffers():
        if "running" in name:
            torch.testing.assert_close(named[name], buffer, rtol=1e-5, atol=1e-5)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_channels_without_variance_are_as_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = counted(monkeypatch)
    layer = nn.BatchNorm2d(11)
    twin = copy.deepcopy(layer)
    x = images(11)
    x[:, 3] = 0.0
    x[:, 4, :, ::2] = 2.5
    x[:, 4, :, 1::2] = -1.0
    x, other = (x.clone().requires_grad_() for _ in range(2))
    wanted = layer(x)
    found = ours.TrainedBatchNorm(twin, ours.batch_norm)(other)
    wanted.square().sum().backward()
    found.square().sum().backward()
    assert uses
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())


def test_an_activation_may_write_into_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = counted(monkeypatch)
    layer = nn.BatchNorm2d(11)
    twin = copy.deepcopy(layer)
    x, other = (images(11).requires_grad_() for _ in range(2))
    wanted = layer(x).relu()
    found = ours.TrainedBatchNorm(twin, ours.batch_norm)(other).relu_()
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert uses
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-4, atol=1e-4)


def test_other_layouts_types_and_layers_go_to_torch() -> None:
    for x, layer in (
        (images(11).contiguous(), nn.BatchNorm2d(11)),
        (images(11).double(), nn.BatchNorm2d(11).double()),
        (images(11), nn.BatchNorm2d(11, affine=False)),
        (images(11).flatten(2), nn.BatchNorm1d(11)),
    ):
        wanted = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        torch.testing.assert_close(ours.TrainedBatchNorm(layer, ours.batch_norm)(x), wanted)
