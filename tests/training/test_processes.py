"""Two processes learn what one learns from the same batches."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphprune.errors import UsageError
from graphprune.program import Dialect
from graphprune.training import Recipe, Trainer
from graphprune.training.processes import resolve_precision
from tests.training.networks import children, data, program

RECIPE = Recipe(
    epochs=2, batch_size=32, lr=0.05, average=0.5, precision="float32", checkpoint_seconds=0.0
)

TOLERANCE = 1e-5
"""Sums over the batch are taken in another order; six steps of float32 add up to less."""


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


DIALECTS: tuple[Dialect, ...] = ("fx", "export")


def _train(rank: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        OMP_NUM_THREADS="1",
    )
    parted = replace(RECIPE, batch_size=6, mixup=1.0)
    with pytest.raises(UsageError, match="mixup= expected an even number of samples in each of 2"):
        Trainer(program=program(), recipe=parted, data=data()).fit()
    # The second run of each goes on from the end of the first: nothing is left to do.
    for dialect, resume in itertools.product(DIALECTS, (False, True)):
        trained = program(dialect, dropout=0.0)
        outcome = Trainer(
            program=trained,
            recipe=RECIPE,
            data=data(),
            checkpoint=folder / dialect,
            resume=resume,
        ).fit()
        tensors = {name: t.detach() for name, t in trained.named_tensors()}
        path = folder / f"{dialect}-{resume}-{rank}.pt"
        torch.save({"tensors": tensors, "last": outcome.last}, path)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    port, context = _free_port(), children()
    pair = [context.Process(target=_train, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for child in pair:
        child.start()
    for child in pair:
        child.join(200)
        assert child.exitcode == 0
    for dialect, resume in itertools.product(DIALECTS, (False, True)):
        one = program(dialect, dropout=0.0)
        expected = Trainer(program=one, recipe=RECIPE, data=data()).fit()
        found = [
            torch.load(tmp_path / f"{dialect}-{resume}-{rank}.pt", weights_only=True)
            for rank in (0, 1)
        ]
        for name, tensor in one.named_tensors():
            a, b = (part["tensors"][name] for part in found)
            assert torch.equal(a, b), name
            torch.testing.assert_close(a, tensor.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        for part in found:
            for key in ("loss", "train_accuracy", "test_loss", "test_accuracy"):
                assert part["last"][key] == pytest.approx(expected.last[key], abs=TOLERANCE)


@pytest.mark.slow
def test_torchrun_compiles_once(tmp_path: Path) -> None:
    steps = (
        'dependency-groups,magnitude,choose-channels{target="params=0.5"},remove-channels,'
        "fine-tune{epochs=2 precision=float32}"
    )
    module = ["-m", "graphprune"]
    arguments = [
        *("compile", "tests.passes.training.test_fine_tune:make", "--data", "digits"),
        *("--passes", steps, "--no-export", "--device", "cpu", "--json", "--out"),
    ]
    folder = str(Path(sys.executable).parent)
    launcher = [shutil.which("torchrun", path=folder) or "torchrun"]
    launcher += ["--standalone", "--nproc-per-node", "2"]
    printed, losses = [], []
    for prefix, out in (([sys.executable], "one"), (launcher, "two")):
        done = subprocess.run(
            [*prefix, *module, *arguments, str(tmp_path / out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(json.loads(done.stdout))
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert not (tmp_path / out / "checkpoints").exists()
    assert printed[0]["after"]["params"] == printed[1]["after"]["params"]
    # The network has dropout, whose random numbers differ from process to process.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("float32", "cpu") == "float32"
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    for has_amx, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda has=has_amx: has)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
        assert resolve_precision("auto", "cpu") == expected
    for major, expected in ((7, "float32"), (8, "bfloat16"), (9, "bfloat16")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, m=major: (m, 0))
        assert resolve_precision("auto", "cuda:1") == expected
