"""Example inputs: shapes, files, what models state, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphprune.errors import InputError
from graphprune.inputs import infer_inputs, parse_inputs


def test_shapes() -> None:
    first, second, third = parse_inputs(["1x3x32x32", "2x16:int64", "4:bool"])
    assert (first.shape, first.dtype) == ((1, 3, 32, 32), torch.float32)
    assert (second.shape, second.dtype) == ((2, 16), torch.int64)
    assert (third.shape, third.dtype) == ((4,), torch.bool)


def test_shapes_are_reproducible() -> None:
    assert torch.equal(parse_inputs("2x3")[0], parse_inputs(["2x3"])[0])
    assert not torch.equal(parse_inputs("2x3")[0], parse_inputs("2x3", seed=1)[0])


def test_files(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save(tensor, tmp_path / "one.pt")
    torch.save((tensor, tensor + 1), tmp_path / "two.pt")
    np.save(tmp_path / "a.npy", tensor.numpy())
    np.savez(tmp_path / "b.npz", x=tensor.numpy(), y=tensor.numpy() + 1)
    save_file({"x": tensor}, tmp_path / "c.safetensors")
    counts = {"one.pt": 1, "two.pt": 2, "a.npy": 1, "b.npz": 2, "c.safetensors": 1}
    for name, count in counts.items():
        tensors = parse_inputs(str(tmp_path / name))
        assert len(tensors) == count
        assert torch.equal(tensors[0], tensor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,32,32", "neither a shape"),
        ("1x0x3", "a size of 0"),
        ("1x3:float99", "unknown type 'float99'"),
        ("absent.npy", "does not exist"),
    ],
)
def test_refused_texts(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_inputs(text)


@pytest.mark.parametrize("name", ["a.pt", "a.npy", "a.npz", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a tensor file at all"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as tensors"):
        parse_inputs(str(path))


def test_file_without_tensors(tmp_path: Path) -> None:
    torch.save(["text"], tmp_path / "a.pt")
    with pytest.raises(InputError, match="expected a tensor or a tuple of tensors"):
        parse_inputs(str(tmp_path / "a.pt"))


def test_models_that_state_their_input() -> None:
    from torchvision import models

    inputs = infer_inputs(models.squeezenet1_1())
    assert inputs is not None
    assert inputs[0].shape == (1, 3, 224, 224)
    video = infer_inputs(models.video.r3d_18())
    assert video is not None
    assert video[0].shape == (1, 3, 16, 112, 112)


def test_timm_models_state_their_input() -> None:
    timm = pytest.importorskip("timm")
    inputs = infer_inputs(timm.create_model("test_resnet"))
    assert inputs is not None
    assert inputs[0].shape == (1, 3, 160, 160)


def test_other_models_do_not() -> None:
    assert infer_inputs(nn.Linear(2, 2)) is None
