"""A teacher says what the dense program says, compiled or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.training import distill
from graphprune.training.distill import MANY_LOOKS, Teacher
from graphprune.training.task import classification

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def teacher(*, looks: int) -> Teacher:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)
    )
    return Teacher(
        gp.capture(model.eval(), torch.randn(1, 3, 8, 8)),
        classification(),
        temperature=4.0,
        device=torch.device("cpu"),
        memory_format=torch.channels_last,
        looks=looks,
    )


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)


@needs_compiler
def test_a_compiled_teacher_says_the_same() -> None:
    plain, compiled = teacher(looks=MANY_LOOKS - 1), teacher(looks=MANY_LOOKS)
    assert not isinstance(plain.module, distill._Compiled)
    assert isinstance(compiled.module, distill._Compiled)
    torch.testing.assert_close(compiled.look((images(),)), plain.look((images(),)))
    assert compiled.module.run is not compiled.module.module


@needs_compiler
def test_a_teacher_that_cannot_be_compiled_is_asked_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/bin/false"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = teacher(looks=0), teacher(looks=MANY_LOOKS)
    torch.testing.assert_close(compiled.look((images(),)), plain.look((images(),)))
    assert isinstance(compiled.module, distill._Compiled)
    assert compiled.module.run is compiled.module.module


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not isinstance(teacher(looks=MANY_LOOKS).module, distill._Compiled)
