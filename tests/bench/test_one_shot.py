"""The comparison of one-shot methods: rows are measured, tables show them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphprune.bench.one_shot import Row, Start, methods, run_row, to_markdown
from graphprune.data import load_data
from graphprune.demo import train_digits
from graphprune.errors import UsageError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def start() -> Start:
    model = train_digits(epochs=2)
    inner = tuple(f"stage{stage}.{block}.conv1" for stage in (1, 2) for block in range(2))
    return Start(
        model=model, example=torch.randn(1, 1, 8, 8), data=load_data("digits"), inner=inner
    )


@pytest.mark.parametrize(
    "method", ["obs", "obs{batch_size=32}", "magnitude", "magnitude{relative=false}"]
)
def test_our_rows_reach_the_target(start: Start, method: str) -> None:
    row = run_row(start, method, 0.7, 128)
    assert row.macs is not None
    assert row.accuracy is not None
    assert 0.69 <= row.macs <= 0.7
    assert 0.3 < row.accuracy <= 1.0
    assert row.seconds > 0


@pytest.mark.parametrize(
    "method", ["tp-magnitude", "tp-magnitude-uniform", "tp-taylor", "tp-hessian", "tp-obdc"]
)
def test_rows_of_torch_pruning_reach_the_target(start: Start, method: str) -> None:
    pytest.importorskip("torch_pruning")
    row = run_row(start, method, 0.8, 128)
    assert row.macs is not None
    assert row.accuracy is not None
    assert 0.7 < row.macs <= 0.8
    assert 0 < row.accuracy <= 1.0


def test_what_a_peer_raises_is_a_row(start: Start) -> None:
    pytest.importorskip("torch_pruning")
    row = run_row(dataclasses.replace(start, inner=("stage1.0.conv1",)), "tp-magnitude", 0.1, 128)
    assert (row.macs, row.accuracy) == (None, None)
    assert row.error == "no ratio up to 0.95 reaches 0.1 of the MACs"


def test_an_unknown_row_is_refused(start: Start) -> None:
    with pytest.raises(UsageError, match="expected one of obs, .* found 'best'"):
        run_row(start, "best", 0.5, 128)


def test_the_table_has_a_line_for_each_method_and_a_column_for_each_target() -> None:
    rows = [
        Row(method="obs", target=0.7, samples=1024, macs=0.7, accuracy=0.93, seconds=300.0),
        Row(method="obs", target=0.5, samples=1024, macs=0.5, accuracy=0.9, seconds=250.0),
        Row(method="tp-fpgm", target=0.7, samples=4096, macs=None, accuracy=None, seconds=30.0),
        Row(method="tp-fpgm", target=0.5, samples=4096, macs=0.49, accuracy=0.8, seconds=20.0),
    ]
    lines = to_markdown(rows, dense=0.9339).splitlines()
    assert lines[0] == "Dense: 93.39%."
    assert lines[2] == "| method | images | 0.7 of MACs | 0.5 of MACs | seconds, each |"
    assert lines[4] == "| obs | 1024 | 93.00% | 90.00% | 250 to 300 |"
    assert lines[5] == "| tp-fpgm | 4096 | fails | 80.00% at 0.490 | 20 to 30 |"


def test_there_is_a_row_for_each_criterion_of_ours() -> None:
    assert methods()[0] == "obs"
    assert {"magnitude", "geometric-median", "lamp", "wanda", "fisher"} < set(methods())
    assert "trainable-gates" not in methods()
