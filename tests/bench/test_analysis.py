"""The comparison with Torch-Pruning: both sides run, failures are rows, the table says what was measured."""

from __future__ import annotations

import signal
import sys
import time

import pytest
from torch import Tensor, nn

from graphprune.bench import analysis as bench_analysis
from graphprune.bench.analysis import (
    MODELS,
    Comparison,
    Side,
    at_full_size,
    compare,
    geometric_mean,
    to_markdown,
)
from graphprune.errors import UsageError
from graphprune.zoo import ZooModel, select, torchvision_models
from graphprune.zoo.peer import processor_time

TINY = ZooModel(
    name="squeezenet1_1", kind="classification", shape=(3, 64, 64), options={"num_classes": 10}
)


def test_the_models_exist_and_have_their_full_size() -> None:
    models = {m.name: at_full_size(m) for m in select(torchvision_models(), MODELS)}
    assert len(models) == len(MODELS) >= 25
    assert models["vit_b_16"].shape == (3, 224, 224)
    assert models["vit_b_16"].options == {}
    assert models["inception_v3"].shape == (3, 299, 299)
    assert models["r3d_18"].shape == (3, 16, 112, 112)


def test_both_sides_cut_the_same_ratio() -> None:
    pytest.importorskip("torch_pruning")
    models = select(torchvision_models(), ["resnet18"])
    row = compare(models[0], repeats=1)
    assert row.ours.failure is None
    assert row.theirs.failure is None
    assert row.ours.params == row.theirs.params
    assert row.ratio is not None
    assert row.ratio > 0


def test_without_torch_pruning_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[bench\]'"):
        compare(TINY)


class _Widened(nn.Module):
    """Gives one class too few."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], 9)


@pytest.mark.parametrize(
    ("outcome", "failure"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("hangs", "TimeoutError: took longer than 0.5 s"),
        ("does nothing", "nothing was cut"),
        ("changes the output", r"the cut model gives shapes [(1, 9)], expected [(1, 10)]"),
    ],
)
def test_the_failure_of_a_side_is_its_result(
    monkeypatch: pytest.MonkeyPatch, outcome: str, failure: str
) -> None:
    calls = []

    def run(model: nn.Module, example: Tensor) -> nn.Module:
        calls.append(1)
        if outcome == "raises":
            _ = 1 / 0
        if outcome == "hangs":
            _busy(5)
        return _Widened() if outcome == "changes the output" else model

    def ours(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(10)).eval()

    monkeypatch.setattr(bench_analysis, "torch_pruning", lambda ratio: run)
    monkeypatch.setattr(bench_analysis, "_graphprune", ours)
    row = compare(TINY, repeats=3, limit_s=0.5)
    assert row.theirs.failure == failure
    assert len(calls) == 1
    assert row.theirs.median is None
    assert row.ratio is None
    assert row.ours.failure is None
    assert len(row.ours.seconds) == 3


def test_the_geometric_mean() -> None:
    assert geometric_mean([1.0, 100.0]) == pytest.approx(10.0)


def test_the_table() -> None:
    rows = [
        _row("a", Side(seconds=(0.1, 0.5, 0.2), params=26), Side(seconds=(2.0, 2.0), params=26)),
        _row("b", Side(seconds=(1.0,), params=30), Side(seconds=(1.5,), params=31)),
        _row("c", Side(seconds=(0.01,), params=25), Side(failure="TimeoutError: too long")),
    ]
    assert (
        to_markdown(
            rows, command="tools/bench_analysis", machine="M, torch 2", ratio=0.5, repeats=3
        )
        == GOLDEN
    )


def _row(model: str, ours: Side, theirs: Side) -> Comparison:
    return Comparison(model=model, input="3x8x8", params=100, ours=ours, theirs=theirs)


GOLDEN = """\
# Benchmarks

## Capture, analysis and cut against Torch-Pruning 1.6.1

    tools/bench_analysis

M, torch 2; one thread; 0.5 of every group's channels by L2 magnitude; medians of 3 runs
each, in turns, in one process, from a fresh copy of the model. Both sides get the same example input
(Torch-Pruning runs the model on it, graphprune looks at shapes alone) and give a model that runs, which is
checked outside the clock. The proof that a cut is exact, which only graphprune makes, is not timed.

Over the 2 models where both succeed, graphprune is **3.9 times** faster in the geometric mean;
at the least 1.5 times (b); slower on 0.

| model | input | graphprune s | Torch-Pruning s | ratio | parameters left: graphprune | Torch-Pruning |
|---|---|--:|--:|--:|--:|--:|
| a | 3x8x8 | 0.200 | 2.000 | 10.0 | 26.0% | 26.0% |
| b | 3x8x8 | 1.000 | 1.500 | 1.5 | 30.0% | 31.0% |
| c | 3x8x8 | 0.010 | failed |  | 25.0% |  |

Failures:

- c, Torch-Pruning: `TimeoutError: too long`
"""


def _busy(seconds: float) -> None:
    """Use up processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_limit_ends_with_its_block() -> None:
    before = signal.getsignal(signal.SIGPROF)
    with processor_time(0.05):
        pass
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
