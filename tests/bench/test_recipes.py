"""The comparison of recipes: equal compute for every method, rows are measured, tables show them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.bench.recipes import (
    FROZEN,
    TEACHER,
    Budget,
    Key,
    Row,
    _with_new_weights,
    pipelines,
    run_row,
    to_markdown,
)
from graphprune.capture import capture
from graphprune.data import DataSource, load_data
from graphprune.demo import train_digits
from graphprune.errors import UsageError
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from tests import gate_networks
from tests.exactness import capture_as

pytest.importorskip("sklearn")

BUDGET = Budget(compute=6.0, target=0.5)


@pytest.fixture(scope="module")
def dense() -> Program:
    return capture(train_digits(epochs=2), torch.randn(1, 1, 8, 8))


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load_data("digits,holdout=0.2")


def test_gates_stand_still_for_as_long_as_it_is_counted() -> None:
    (gates,) = Pipeline.parse("trainable-gates").passes
    assert vars(gates)["frozen"] == FROZEN


def test_every_method_gets_the_same_compute() -> None:
    for method in ("trainable-gates", "magnitude", "scratch"):
        gated, left = map(int, pipelines(method, BUDGET)[2].split(" + "))
        teacher = 0.0 if method == "scratch" else TEACHER
        # Gates that stand still stand on what is left.
        dense = 1 - FROZEN + FROZEN * BUDGET.target
        spent = gated * (dense + teacher) + left * (BUDGET.target + teacher)
        assert abs(spent - BUDGET.compute) <= (BUDGET.target + teacher) / 2


@pytest.mark.parametrize("method", ["trainable-gates", "magnitude", "scratch"])
def test_rows_reach_the_target_and_learn(dense: Program, digits: DataSource, method: str) -> None:
    row = run_row(dense, digits, method, BUDGET, device="cpu")
    assert 0.45 < row.macs <= 0.5
    assert row.accuracy > max(0.5, row.cut_accuracy - 0.02)


def test_scratch_knows_nothing_of_the_weights(dense: Program, digits: DataSource) -> None:
    row = run_row(dense, digits, "scratch", BUDGET)
    assert row.cut_accuracy < 0.35


@pytest.mark.parametrize(
    ("make", "dialect", "names"),
    [
        (gate_networks.residual, "export", "fc.weight, fc.bias, stem.0.weight and others"),
        (gate_networks.transformer, "fx", "position"),
    ],
)
def test_scratch_refuses_weights_that_it_cannot_start_anew(
    make: Callable[[], nn.Module], dialect: str, names: str, digits: DataSource
) -> None:
    trained = make()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    dense = capture_as(trained, torch.randn(2, 1, 8, 8), dialect)
    message = (
        rf"in a layer that starts anew \(reset_parameters\), found {names} with .*\({dialect} dia"
    )
    with pytest.raises(UsageError, match=message):
        run_row(dense, digits, "scratch", BUDGET)


def test_norms_at_their_start_know_nothing() -> None:
    program = capture_as(gate_networks.residual(), torch.randn(2, 1, 8, 8), "fx")
    anew = _with_new_weights(program, seed=1)
    before = dict(program.module.named_parameters())
    same = {n for n, p in anew.module.named_parameters() if torch.equal(p, before[n])}
    norms = [n for n, m in program.module.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert same == {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}


def test_every_look_of_the_dense_network_counts() -> None:
    def epochs(options: str) -> str:
        return pipelines("magnitude", Budget(compute=12.0, target=0.5, options=options))[2]

    assert epochs("") == "0 + 14"
    assert epochs("mirror=true") == "0 + 10"
    assert epochs("distill=0") == "0 + 24"


def test_an_unknown_method_is_refused(dense: Program, digits: DataSource) -> None:
    with pytest.raises(UsageError, match="expected one of .*scratch, found 'best'"):
        run_row(dense, digits, "best", BUDGET)


def test_options_go_to_the_training_after_the_cut() -> None:
    budget = Budget(compute=6.0, target=0.5, options="mixup=1.0 distill=0.9")
    cut, training, _ = pipelines("magnitude", budget)
    assert training == "fine-tune{epochs=7 mixup=1.0 distill=0.9}"
    assert "mixup" not in cut
    with pytest.raises(UsageError, match="the number of epochs is none of these options"):
        pipelines("magnitude", Budget(compute=6.0, target=0.5, options="epochs=3"))
    with pytest.raises(UsageError, match="option mixup expects"):
        pipelines("magnitude", Budget(compute=6.0, target=0.5, options="mixup=(1,2)"))


def test_a_row_that_was_interrupted_has_no_time(
    dense: Program, digits: DataSource, tmp_path: Path
) -> None:
    first = run_row(dense, digits, "random", BUDGET, device="cpu", checkpoints=tmp_path)
    again = run_row(dense, digits, "random", BUDGET, device="cpu", checkpoints=tmp_path)
    assert first.seconds is not None
    assert again.seconds is None
    assert again.accuracy == first.accuracy
    assert to_markdown([again], dense=0.9).splitlines()[-1].endswith("| interrupted |")


def test_the_table_has_the_best_of_each_target_first() -> None:
    common: dict[str, Any] = {
        "seed": 0,
        "compute": 6.0,
        "epochs": "2 + 4",
        "cut_accuracy": 0.5,
        "seconds": 9.0,
    }
    rows = [
        Row(method="random", target=0.5, macs=0.499, accuracy=0.8, **common),
        Row(method="obs", target=0.5, macs=0.498, accuracy=0.9, **common),
        Row(method="obs", target=0.7, macs=0.699, accuracy=0.92, **common),
    ]
    lines = to_markdown(rows, dense=0.9339).splitlines()
    assert lines[0] == "Dense: 93.39%."
    assert [line.split(" | ")[1] for line in lines[4:]] == ["obs", "obs", "random"]
    assert lines[4] == "| 0.699 | obs | 2 + 4 | 50.00% | 92.00% | 0 | 9 |"


def test_the_tool_measures_once_and_writes_a_table(tmp_path: Path) -> None:
    log = tmp_path / "rows.jsonl"
    command = [sys.executable, str(Path(__file__).parents[2] / "tools" / "bench_recipes")]
    command += "--model graphprune.demo:DigitsNet --input 1x1x8x8 --data digits,holdout=0.2".split()
    command += "--methods magnitude --targets 0.5 --compute 1 --threads 1 --json".split()
    command.append(str(log))
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("Dense: ")
    assert "| magnitude | 0 + 1 |" in first.stdout
    assert "magnitude at 0." in first.stderr
    assert "magnitude at" not in again.stderr
    (line,) = log.read_text(encoding="utf-8").splitlines()
    (state,) = log.with_suffix("").iterdir()
    row = Row(**json.loads(line))
    assert state.name == row.key.folder()
    named = row.data, row.model, row.weights, row.gates
    assert named == ("digits,holdout=0.2", "graphprune.demo:DigitsNet", "", None)
    command[command.index("digits,holdout=0.2")] = "digits,holdout=0.3"
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "magnitude at" in other.stderr
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2


def test_a_row_is_known_by_all_that_it_was_asked_for() -> None:
    def key(method: str = "trainable-gates", **changed: Any) -> Key:
        names = {"data": "cifar10:/data", "model": "tests.models:resnet56", "weights": "a/b.pt"}
        shares = {"gates": changed.pop("gates", 0.2), "options": changed.pop("options", "")}
        budget = Budget(compute=36.0, target=0.5, **shares)
        return Key.of(method, budget, **{"seed": 0, **names, **changed})

    keys = [
        key(),
        *(key(gates=0.5), key(data="cifar10:/data,holdout=0.1"), key(model="a:b"), key(seed=1)),
        *(key(weights="c.pt"), key(options="lr=0.05"), key("obs"), key(options="mixup=1.0 " * 20)),
    ]
    assert len(set(keys)) == len({k.folder() for k in keys}) == len(keys)
    assert all(re.fullmatch(r"[\w.=+-]{1,109}", k.folder()) for k in keys)
    assert keys[0].folder().startswith("trainable-gates-0.5-0-36-gates=0.2-")
    assert key("obs", gates=0.5) == key("obs")


def test_rows_from_before_names_were_recorded_are_read() -> None:
    text = (
        '{"method": "obs", "target": 0.5, "seed": 0, "compute": 5.0, "epochs": "0 + 6", "macs": 0.5, '
        '"cut_accuracy": 0.9, "accuracy": 0.92, "seconds": 9.0, "options": "lr=0.05"}'
    )
    row = Row(**json.loads(text))
    assert (row.gates, row.data, row.model, row.weights) == (None, "", "", "")
    assert row.key == Key(method="obs", target=0.5, seed=0, compute=5.0, options="lr=0.05")


def test_residual_blocks_go_where_the_granularity_says_so(digits: DataSource) -> None:
    budget = Budget(compute=1.0, target=0.6, granularity="channels,blocks")
    cut, _, _ = pipelines("magnitude", budget)
    assert 'choose-blocks{target="macs=0.6" share=0.5},remove-blocks' in cut
    residual = capture(gate_networks.residual(), torch.randn(2, 1, 8, 8))
    row = run_row(residual, digits, "magnitude", budget)
    assert row.granularity == "channels,blocks"
    assert row.macs <= 0.6
    assert Row(**json.loads(json.dumps(row.to_json()))) == row
    plain = Budget(compute=1.0, target=0.6)
    keys = [Key.of("magnitude", b, seed=0, data="", model="", weights="") for b in (budget, plain)]
    assert keys[0].folder() != keys[1].folder()
    assert "magnitude, channels,blocks" in to_markdown([row], dense=0.5)
