"""trainable-gates in several processes, and in processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graphprune.contract import Context, Facts
from graphprune.files import write_atomic
from graphprune.groups import DependencyGroups, analyze
from graphprune.passes.training import TrainableGates
from graphprune.plan import Plan
from graphprune.program import Program
from tests.training.networks import children, data, files, program

TOLERANCE = 1e-4
"""Sums over the batch are taken in another order; nine steps of float32 add up to less."""

STEP = TrainableGates(
    epochs=3, batch_size=32, round_to="1", precision="float32", checkpoint_seconds=0.0
)


def _learn(dense: Program, **options: Any) -> dict[str, Any]:
    """Return the trained weights, what is kept, and the numbers of the last epoch."""
    facts: dict[type[Facts], Facts] = {DependencyGroups: analyze(dense)}
    context = Context(facts=facts, dense=dense, data=data(), device="cpu", **options)
    result = STEP.run(dense, context)
    plan = next(fact for fact in result.facts if isinstance(fact, Plan))
    return {
        "tensors": {name: t.detach() for name, t in result.program.named_tensors()},
        "slices": plan.to_json()["slices"],
        "metrics": {k: v for k, v in result.metrics.items() if not k.endswith("seconds")},
    }


def _child(folder: Path, result: Path, resume: bool, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    found = _learn(program(dropout=0.0), checkpoint=folder, resume=resume)
    with write_atomic(result) as temporary:
        torch.save(found, temporary)


def test_two_processes_learn_the_same_gates(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    pair: list[Any] = []
    for rank in ("0", "1"):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
        arguments = (tmp_path / "state", tmp_path / f"{rank}.pt", False, environment)
        pair.append(children().Process(target=_child, args=arguments))
        pair[-1].start()
    expected = _learn(program(dropout=0.0))
    for child in pair:
        child.join(200)
        assert child.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in expected["tensors"].items():
        assert torch.equal(first["tensors"][name], second["tensors"][name]), name
        torch.testing.assert_close(
            first["tensors"][name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )
    assert first["slices"] == second["slices"] == expected["slices"]
    for name, value in expected["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, abs=TOLERANCE), name


def _killed_then_resumed(tmp_path: Path, moments: int) -> None:
    started = time.monotonic()
    whole = _learn(program(dropout=0.0), checkpoint=tmp_path / "whole")
    seconds = time.monotonic() - started
    generator = random.Random(11)
    kills = 0
    for number in range(moments):
        folder, result = tmp_path / f"run{number}", tmp_path / f"weights{number}.pt"
        for attempt in range(4):
            child = children().Process(target=_child, args=(folder, result, attempt > 0, {}))
            child.start()
            child.join(generator.uniform(0.0, seconds) if attempt < 3 else None)
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
            assert files(folder) <= {"state.pt", "metrics.jsonl"}
        found = torch.load(result, weights_only=True)
        assert found["slices"] == whole["slices"]
        for name, tensor in whole["tensors"].items():
            assert torch.equal(found["tensors"][name], tensor), name
    assert kills


def test_a_killed_run_ends_with_the_same_gates(tmp_path: Path) -> None:
    _killed_then_resumed(tmp_path, 1)


@pytest.mark.slow
def test_ten_killed_runs_end_with_the_same_gates(tmp_path: Path) -> None:
    _killed_then_resumed(tmp_path, 10)
