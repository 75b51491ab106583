"""Measured costs: bytes are those of the file, latency is a model of what was timed, and targets on both are met."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune import measured
from graphprune.budget import choose
from graphprune.contract import Context
from graphprune.cost import Keep, Products
from graphprune.cut import cut_program
from graphprune.errors import TargetError, UsageError
from graphprune.groups import DependencyGroups, analyze
from graphprune.onnx_export import export_onnx
from graphprune.passes.analysis import MeasureCosts
from graphprune.program import Program
from graphprune.runtime import Latency
from graphprune.target import parse_target
from tests import models
from tests.exactness import random_scores

PER_CALL = 0.2
PER_BYTE = 2e-5


def milliseconds(num_bytes: float) -> float:
    """Return the time for a file's bytes, with a step every four kilobytes."""
    return PER_CALL + PER_BYTE * 4096 * -(-num_bytes // 4096)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a file take time for its bytes; return how many were timed."""
    timed: list[int] = []

    def bench(paths: Sequence[Path], inputs: Sequence[Tensor], **_: Any) -> list[Latency]:
        timed.extend(path.stat().st_size for path in paths)
        return [
            Latency(
                path=path,
                median_ms=milliseconds(path.stat().st_size),
                p10_ms=0.0,
                p90_ms=0.0,
                runs=1,
                provider="a clock of our own",
            )
            for path in paths
        ]

    monkeypatch.setattr(measured, "bench", bench)
    monkeypatch.setattr(measured, "PROBES", (0.8, 0.5))
    return timed


def network() -> Program:
    torch.manual_seed(0)
    return gp.capture(models.tiny_residual().eval(), torch.randn(1, 3, 16, 16))


def with_costs(program: Program, **options: Any) -> DependencyGroups:
    """Return the analysis with measured costs, as a pipeline makes it."""
    context = Context(facts={DependencyGroups: analyze(program)}, dense=program)
    return MeasureCosts(**options).run(program, context)


@pytest.mark.parametrize(
    ("make", "limit"), [(models.tiny_residual, 0.4), (models.tiny_mobile, 0.6)]
)
def test_a_size_is_that_of_the_file(
    make: Callable[[], nn.Module], limit: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    program = gp.capture(make().eval(), torch.randn(1, 3, 16, 16))
    groups = with_costs(program, latency=False)
    dense = export_onnx(program, tmp_path / "dense.onnx").num_bytes
    assert groups.cost.total().size == dense
    assert groups.cost.total().latency == 0.0
    target, scores = parse_target(f"size={limit}"), random_scores(groups, 1)
    choice = measured.land(
        program, groups, target, lambda costs: choose(costs, scores, target), device="cpu"
    )
    cut = cut_program(program, groups, choice.keep).program
    written = export_onnx(cut, tmp_path / "cut.onnx").num_bytes
    assert (limit - 0.05) * dense < written <= limit * dense


def test_a_size_that_no_cut_reaches_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    program = network()
    groups = with_costs(program, latency=False)
    target, scores = parse_target("size=0.5"), random_scores(groups, 1)
    dense = groups.cost.total().size

    def num_bytes(cuts: measured.Cuts, keep: Keep) -> int:
        return dense if keep.all() else int(0.9 * dense)

    monkeypatch.setattr(measured.Cuts, "num_bytes", num_bytes)
    message = (
        r"target size=0.5 was not reached: cuts were measured at 0.900.* of the [\d,]+ bytes of "
        r"the model that came in. .*; give a target of at least size=0.90, or macs="
    )
    with pytest.raises(TargetError, match=message):
        measured.land(
            program, groups, target, lambda costs: choose(costs, scores, target), device="cpu"
        )


def test_a_model_of_latency_explains_what_it_was_fitted_to() -> None:
    program = network()
    groups = analyze(program)
    choices = measured.probes(groups)
    assert len(choices) > 4
    assert len({keep.tobytes() for keep in choices}) == len(choices)
    assert all(groups.violations(keep) == [] for keep in choices)
    made_up = [1.0 + 3e-6 * groups.cost.total(keep).macs for keep in choices]
    fit = measured.fit_latency(groups, choices, made_up)
    assert fit.error < 0.05
    products = fit.products(groups)
    for keep, milliseconds in zip(choices, made_up, strict=True):
        assert products.values(keep).sum() == pytest.approx(milliseconds, rel=0.05)
    assert min(fit.coefficients.values()) >= 0


@pytest.mark.parametrize("target", ["latency=0.6", "latency=0.8,macs=0.5"])
def test_a_latency_is_reached_as_it_is_timed(target: str, clock: list[int]) -> None:
    program = network()
    groups = with_costs(program)
    scores = random_scores(groups, 2)
    limits = parse_target(target)
    choice = measured.land(
        program, groups, limits, lambda costs: choose(costs, scores, limits), device="cpu"
    )
    with measured.exported_cuts(program, groups) as cuts:
        before, after = cuts.milliseconds([groups.cost.everything(), choice.keep], device="cpu")
    assert limits.latency is not None
    assert after / before <= limits.latency
    if limits.macs is None:
        assert after / before > limits.latency - 0.15
    assert groups.cost.total(choice.keep).macs <= (limits.macs or 1.0) * groups.cost.macs


def test_a_latency_that_no_cut_reaches_is_said(clock: list[int]) -> None:
    program = network()
    groups = with_costs(program)
    limits = parse_target("latency=0.001")
    with pytest.raises(TargetError, match="latency=0.001 cannot be reached"):
        measured.land(
            program,
            groups,
            limits,
            lambda costs: choose(costs, random_scores(costs, 0), limits),
            device="cpu",
        )


@pytest.mark.parametrize("target", ["latency=0.6", "size=0.5"])
def test_compile_takes_measured_targets(target: str, clock: list[int], tmp_path: Path) -> None:
    result = gp.compile(
        models.tiny_residual().eval(), torch.randn(1, 3, 16, 16), target=target, out=tmp_path
    )
    surgery = result.report.checks["surgery"]
    assert surgery is not None
    assert surgery.passed
    names = [record.name.partition("{")[0] for record in result.report.passes]
    assert names[:2] == ["dependency-groups", "measure-costs"]
    before, after = result.report.before, result.report.after
    assert before.params is not None
    assert after.params is not None
    assert after.params < before.params
    if target == "size=0.5":
        assert after.onnx_bytes is not None
        assert before.onnx_bytes is not None
        assert after.onnx_bytes <= 0.5 * before.onnx_bytes
    assert bool(clock) == ("latency" in target)


@pytest.mark.parametrize("target", ["latency=0.6", "size=0.5"])
def test_fractions_are_of_the_model_that_came_in(
    target: str, clock: list[int], tmp_path: Path
) -> None:
    cut = 'choose-channels{target="%s"},remove-channels,clean-up'
    text = f"dependency-groups,magnitude,{cut % 'macs=0.8'},dependency-groups,measure-costs,magnitude,{cut % target}"
    program = network()
    result = gp.Pipeline.parse(text).run(program)
    files = [
        export_onnx(p, tmp_path / f"{n}.onnx").path for n, p in enumerate((program, result.program))
    ]
    dense, left = (float(path.stat().st_size) for path in files)
    if "latency" in target:
        dense, left = (milliseconds(num_bytes) for num_bytes in (dense, left))
    fraction = float(target.partition("=")[2])
    assert (fraction - 0.15) * dense < left <= fraction * dense


def test_several_processes_do_not_time_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="choose channels by latency in one process"):
        with_costs(network())


def test_a_sum_of_sums_is_their_sum() -> None:
    groups = analyze(network())
    macs, params = groups.cost.products("macs"), groups.cost.products("params")
    total = Products.sum_of([(2.0, macs), (0.5, params)], 7.0)
    keep = measured.probes(groups)[2]
    cost = groups.cost.total(keep)
    assert total.values(keep).sum() == pytest.approx(2 * cost.macs + 0.5 * cost.params + 7)
    expected = 2 * groups.cost.saved("macs") + 0.5 * groups.cost.saved("params")
    np.testing.assert_allclose(total.marginal(groups.num_channels), expected)
    nothing = Products.sum_of([], 3.0)
    assert nothing.values(keep).tolist() == [3.0]
    assert not nothing.marginal(groups.num_channels).any()


def test_measured_costs_are_told_from_the_model(clock: list[int]) -> None:
    groups = with_costs(network())
    assert set(groups.cost.measured) == {"size", "latency"}
    bare = dataclasses.replace(groups.cost, measured={})
    assert bare.total() == dataclasses.replace(groups.cost.total(), size=0, latency=0.0)
