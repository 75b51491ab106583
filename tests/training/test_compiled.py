"""A compiled module computes what it computed before, and trains on where it was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import graphprune as gp
from graphprune.gates.insertion import insert_gates
from graphprune.groups import analyze
from graphprune.scores import Scores
from graphprune.training import Recipe, Trainer
from graphprune.training.compiled import MANY_STEPS, Compiled, compiled
from graphprune.training.forms import training_form
from tests.models import tiny_residual
from tests.training.networks import Stop, StopAfter, data, program

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)
    )


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)


def gradients(module: nn.Module) -> list[Tensor]:
    module(images()).square().sum().backward()
    return [p.grad for p in module.parameters() if p.grad is not None]


@needs_compiler
def test_it_computes_the_same_forwards_and_backwards() -> None:
    plain, module = network(), network()
    fast = compiled(module, device=CPU, steps=MANY_STEPS)
    assert isinstance(fast, Compiled)
    for a, b in zip(gradients(plain), gradients(fast), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(plain[1].running_var, module[1].running_var)  # type: ignore[index]
    assert fast.run is not module


@needs_compiler
@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_frozen: bool
) -> None:
    torch.compiler.reset()  # or what another test has compiled serves here, too
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, module = network(), network()
    if is_frozen:
        plain.eval().requires_grad_(False)
        module.eval().requires_grad_(False)
    fast = compiled(module, device=CPU, steps=MANY_STEPS, is_frozen=is_frozen)
    assert isinstance(fast, Compiled)
    with inductor_config.patch({"cpp.cxx": (None, "/bin/false")}):
        assert torch.equal(plain(images()), fast(images()))
    assert fast.run is module


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_step_is_one_graph(gated: bool, exported: bool, precision: torch.dtype) -> None:
    model, example = tiny_residual(), torch.randn(4, 3, 16, 16)
    source = gp.capture(
        torch.export.export(model.eval(), (example,)) if exported else model, example
    )
    groups = analyze(source)
    if gated:
        scores = Scores(values=np.ones(groups.num_channels), method="ones")
        source = insert_gates(source, groups, scores).program
    form = training_form(source).to(memory_format=torch.channels_last)
    torch.compiler.reset()
    # An operator that cannot be traced ends a graph; with fullgraph it raises.
    whole = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        outputs = whole(example.to(memory_format=torch.channels_last))
    outputs.float().square().sum().backward()
    assert all(p.grad is not None for p in form.parameters())


def test_short_runs_are_not_compiled() -> None:
    module = network()
    assert compiled(module, device=CPU, steps=MANY_STEPS - 1) is module


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    module = network()
    assert compiled(module, device=CPU, steps=MANY_STEPS) is module


@needs_compiler
def test_a_compiled_run_goes_on_as_if_it_had_not_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("graphprune.training.compiled.MANY_STEPS", 10)
    recipe = Recipe(
        epochs=2,
        batch_size=16,
        lr=0.05,
        distill=0.5,
        mixup=1.0,
        precision="float32",
        checkpoint_seconds=0.0,
    )

    def train(folder: str, *, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
        trained = program()
        Trainer(
            program=trained,
            recipe=recipe,
            data=data(),
            teacher=program(seed=3),
            hooks=[StopAfter(stop)],
            checkpoint=tmp_path / folder,
            resume=resume,
        ).fit()
        return dict(trained.named_tensors())

    whole = train("whole")
    with pytest.raises(Stop):
        train("broken", stop=5)
    rest = train("broken", resume=True)
    for name, tensor in whole.items():
        assert torch.equal(tensor, rest[name]), name
