from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import TensorDataset

from graphprune.contract import Context
from graphprune.data import DataSource
from graphprune.errors import DataError
from graphprune.passes.training.reestimate_batch_norm import ReestimateBatchNorm
from graphprune.program import Program

# Torch accumulates in float32, the pass in float64.
_RTOL = 1e-5


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn1 = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(5, 7)
        self.bn2 = nn.BatchNorm1d(7, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.relu(self.bn1(self.conv(x)))).mean((2, 3))
        out: Tensor = self.bn2(self.linear(y))
        return out


def _data(num_samples: int = 64) -> DataSource:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(num_samples, 3, 6, 6, generator=generator) * 3 + 1
    dataset = TensorDataset(images, torch.zeros(num_samples, dtype=torch.int64))
    return DataSource(name="test", input_shape=(3, 6, 6), num_classes=2, split=lambda _: dataset)


def _program(module: nn.Module, dialect: str = "fx", *, decomposed: bool = False) -> Program:
    module.eval()
    inputs = (torch.randn(2, 3, 6, 6),)
    if dialect == "fx":
        graph = fx.symbolic_trace(module)
        return Program(
            module=graph, example_inputs=inputs, dialect="fx", dynamic_batch=True, source="test"
        )
    exported = torch.export.export(module, inputs, dynamic_shapes=({0: torch.export.Dim("batch")},))
    if decomposed:
        exported = exported.run_decompositions()
    graph = exported.module(check_guards=False)
    return Program(
        module=graph, example_inputs=inputs, dialect="export", dynamic_batch=True, source="test"
    )


def _context(program: Program, data: DataSource | None, seed: int = 0) -> Context:
    return Context(facts={}, dense=program, data=data, seed=seed)


def _expected(
    module: nn.Module, data: DataSource, batch_size: int, seed: int = 0
) -> dict[str, Tensor]:
    """Let torch re-estimate with momentum=None, which averages over equal batches."""
    model = copy.deepcopy(module).eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for inputs, _ in data.train(batch_size, seed=seed):
            model(inputs)
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


@pytest.mark.parametrize(
    ("dialect", "decomposed"),
    [("fx", False), ("export", False), ("export", True)],
    ids=["fx", "export", "core"],
)
def test_it_agrees_with_torchs_cumulative_average(dialect: str, decomposed: bool) -> None:
    module = _Net()
    expected = _expected(module, _data(), 16)
    program = _program(module, dialect, decomposed=decomposed)
    result = ReestimateBatchNorm(batch_size=16).run(program, _context(program, _data()))
    assert result.modified
    assert result.metrics == {"batch_norms": 2.0, "samples": 64.0}
    found = dict(result.program.module.named_buffers())
    assert len(expected) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=_RTOL, atol=_RTOL)


def test_the_program_that_comes_in_stays_as_it_is() -> None:
    program = _program(_Net())
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    result = ReestimateBatchNorm(batch_size=16).run(program, _context(program, _data()))
    assert result.program.module is not program.module
    assert str(result.program) == str(program)
    for name, tensor in program.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(layer.training for layer in result.program.module.modules())


def test_a_second_run_changes_nothing() -> None:
    program = _program(_Net())
    first = ReestimateBatchNorm(batch_size=16).run(program, _context(program, _data()))
    second = ReestimateBatchNorm(batch_size=16).run(first.program, _context(program, _data()))
    assert not second.modified
    assert second.program is first.program


def test_the_seed_chooses_the_samples() -> None:
    program = _program(_Net())

    def mean(seed: int) -> Tensor:
        options = ReestimateBatchNorm(num_samples=24, batch_size=8)
        result = options.run(program, _context(program, _data(), seed))
        return result.program.module.get_buffer("bn1.running_mean")

    assert torch.equal(mean(0), mean(0))
    assert not torch.equal(mean(0), mean(1))


def test_batches_count_by_their_samples() -> None:
    program = _program(nn.Sequential(nn.BatchNorm2d(3)))
    # 64 samples in batches of 21: the last batch has one sample, which still counts for nothing.
    result = ReestimateBatchNorm(batch_size=21).run(program, _context(program, _data()))
    assert result.metrics["samples"] == 63.0
    result = ReestimateBatchNorm(batch_size=40).run(program, _context(program, _data()))
    images = torch.cat([inputs for inputs, _ in _data().train(64)])
    mean = result.program.module.get_buffer("0.running_mean")
    torch.testing.assert_close(mean, images.mean((0, 2, 3)), rtol=_RTOL, atol=_RTOL)


def test_a_shared_batch_norm_averages_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.bn(self.bn(x) + 1)
            return out

    module = Twice()
    program = _program(module)
    result = ReestimateBatchNorm(batch_size=16).run(program, _context(program, _data()))
    expected = _expected(module, _data(), 16)
    found = dict(result.program.module.named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=_RTOL, atol=_RTOL)


def test_functional_batch_norm_with_buffers() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(
                x, self.get_buffer("mean"), self.get_buffer("var"), eps=1e-3
            )

    program = _program(Functional())
    result = ReestimateBatchNorm(batch_size=64).run(program, _context(program, _data()))
    images = torch.cat([inputs for inputs, _ in _data().train(64)])
    mean = result.program.module.get_buffer("mean")
    torch.testing.assert_close(mean, images.mean((0, 2, 3)), rtol=_RTOL, atol=_RTOL)


def test_without_batch_norm_nothing_is_needed_and_nothing_is_done() -> None:
    program = _program(nn.Conv2d(3, 2, 1))
    result = ReestimateBatchNorm().run(program, _context(program, None))
    assert not result.modified
    assert result.program is program


def test_without_running_statistics_there_is_nothing_to_estimate() -> None:
    program = _program(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    assert not ReestimateBatchNorm().run(program, _context(program, None)).modified


def test_what_it_refuses() -> None:
    program = _program(_Net())
    with pytest.raises(
        DataError, match=r"expected training data, found none; give data= or --data"
    ):
        ReestimateBatchNorm().run(program, _context(program, None))
    with pytest.raises(
        DataError, match=r"at least 2 samples in a batch, found num_samples=1024 batch_size=1"
    ):
        ReestimateBatchNorm(batch_size=1).run(program, _context(program, _data()))
