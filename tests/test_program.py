"""Program: stable text, clones, batches and evolution."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune import capture
from tests import models
from tests.exactness import capture_as

GOLDEN = """\
program tiny (fx, dynamic batch) inputs [float32[1, 3, 4, 4]]
  %x = input
  %conv = conv(%x) : Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1), bias=False)
  %scale = attribute scale : float32[5, 1, 1]
  %mul = operator.mul(%conv, %scale)
  %relu = torch.nn.functional.relu(%mul, inplace=True)
  %getitem = operator.getitem(%relu, (None:None:None, None:None:None, 0))
  %mean = .mean(%getitem, dim=-1)
  return (%mean, %relu)"""


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, bias=False)
        self.scale = nn.Parameter(torch.rand(5, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.relu(self.conv(x) * self.scale, inplace=True)
        return y[:, :, 0].mean(dim=-1), y


def test_text_is_stable() -> None:
    program = capture(_Tiny(), torch.zeros(1, 3, 4, 4), source="tiny")
    assert str(program) == GOLDEN
    assert str(program.clone()) == GOLDEN
    assert str(capture(_Tiny(), torch.ones(1, 3, 4, 4), source="tiny")) == GOLDEN


def test_history_is_printed() -> None:
    program = capture(_Tiny(), torch.zeros(1, 3, 4, 4), source="tiny")
    later = program.evolve(program.module, step="remove-channels")
    assert later.history == ("remove-channels",)
    assert str(later) == GOLDEN + "\n  after remove-channels"
    assert program.history == ()


def test_clone_shares_nothing() -> None:
    program = capture(models.tiny_residual(), torch.randn(1, 3, 16, 16))
    clone = program.clone()
    own = {t.data_ptr() for _, t in program.named_tensors() if t.numel()}
    assert own.isdisjoint(t.data_ptr() for _, t in clone.named_tensors() if t.numel())
    (x,) = program.batch(3)
    assert torch.equal(clone.module(x), program.module(x))


@pytest.mark.parametrize("dialect", ["fx", "export"])
@pytest.mark.parametrize(
    "make",
    [
        models.tiny_residual,
        models.tiny_inception,
        models.tiny_dense,
        models.tiny_mobile,
        models.tiny_transformer,
    ],
)
def test_module_comes_back_from_a_file(make: Callable[[], nn.Module], dialect: str) -> None:
    program = capture_as(make().eval(), torch.randn(2, 3, 16, 16), dialect)
    cut = gp.compile(
        program,
        passes='dependency-groups,magnitude,choose-channels{target="macs=0.6"},remove-channels',
    ).program
    (x,) = cut.batch(3)
    for each in (program, cut):
        file = io.BytesIO()
        torch.save(each.module, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert not loaded.training
        assert torch.equal(loaded(x), each.module(x))
        assert loaded.state_dict().keys() == each.module.state_dict().keys()


def test_batch() -> None:
    program = capture(nn.Linear(4, 2), torch.randn(1, 4))
    (x,) = program.batch(5, seed=1, dtype=torch.float64)
    assert (x.shape, x.dtype) == ((5, 4), torch.float64)
    assert torch.equal(x, program.batch(5, seed=1, dtype=torch.float64)[0])
    assert not torch.equal(x, program.batch(5, seed=2, dtype=torch.float64)[0])


def test_integer_inputs_repeat() -> None:
    program = capture(nn.Embedding(9, 2), torch.tensor([[1, 8]]))
    assert program.batch(3)[0].tolist() == [[1, 8], [1, 8], [1, 8]]


def test_map_floating() -> None:
    program = capture(models.tiny_dense(), torch.randn(1, 3, 16, 16))
    double = program.map_floating(torch.Tensor.double)
    assert double.example_inputs[0].dtype == torch.float64
    assert double.module(*double.batch(2, dtype=torch.float64)).dtype == torch.float64
    assert program.module(*program.batch(2)).dtype == torch.float32
