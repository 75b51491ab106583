"""Loading: every MODEL form, weights, safe unpickling, and every refusal."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.export import Dim

from graphprune import capture
from graphprune.errors import ForbiddenClassError, LoadError
from graphprune.load import load_model, load_weights, read_weights
from tests import models
from tests.models import tiny_residual

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _torch_only() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(980, 4)).eval()


class _Evil:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _module(text: str, **options: Any) -> nn.Module:
    model = load_model(text, **options)
    assert isinstance(model, nn.Module)
    return model


def test_pickled_module(tmp_path: Path) -> None:
    model, path = _torch_only(), tmp_path / "model.pt"
    torch.save(model, path)
    assert torch.equal(_module(str(path))(X), model(X))


def test_legacy_pickle(tmp_path: Path) -> None:
    model, path = _torch_only(), tmp_path / "model.pth"
    torch.save(model, path, _use_new_zipfile_serialization=False)
    assert torch.equal(_module(str(path))(X), model(X))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "convnext_tiny", "swin_t", "densenet121"]
)
def test_pickled_torchvision_model_needs_no_trust(tmp_path: Path, name: str) -> None:
    from torchvision import models as zoo

    path = tmp_path / "model.pt"
    torch.save(zoo.get_model(name, weights=None), path)
    assert type(_module(str(path))).__module__.startswith("torchvision.models")


def test_pickled_timm_model_needs_no_trust(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    path = tmp_path / "model.pt"
    torch.save(timm.create_model("test_vit"), path)
    assert type(_module(str(path))).__module__.startswith("timm.models")


@pytest.mark.parametrize("is_legacy", [True, False])
def test_forbidden_class_is_never_run(tmp_path: Path, is_legacy: bool) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    torch.save(
        [_torch_only(), _Evil(f"touch {mark}")], path, _use_new_zipfile_serialization=not is_legacy
    )
    with pytest.raises(
        ForbiddenClassError,
        match=r"names posix.system.*Nothing of it was run.*--trust posix.system",
    ):
        load_model(str(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub\nload",
        "torch.storage\n_load_from_bytes",
        "torch.nn\nfunctional.torch.os.system",
        "builtins\neval",
    ],
)
def test_ways_around_the_allow_list(tmp_path: Path, name: str) -> None:
    import zipfile

    path = tmp_path / "evil.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    module, attribute = name.split("\n")
    strings = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, attribute))
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(
                file, b"\x80\x04" + strings + b"\x93." if file.endswith("data.pkl") else content
            )
    with pytest.raises(ForbiddenClassError, match=f"names {module}"):
        load_model(str(path))


def test_own_class_needs_trust(tmp_path: Path) -> None:
    model, path = tiny_residual(), tmp_path / "model.pt"
    torch.save(model, path)
    with pytest.raises(ForbiddenClassError, match=r"--trust tests.models._Residual"):
        capture(str(path), X)
    for options in ({"trust": ("tests.models._Residual",)}, {"trust_all": True}):
        program = capture(str(path), X, **options)
        torch.testing.assert_close(program.module(X), model(X))
        assert program.source == str(path)


def test_graph_module_needs_trust_because_its_code_runs(tmp_path: Path) -> None:
    model, path = fx.symbolic_trace(_torch_only()), tmp_path / "model.pt"
    torch.save(model, path)
    with pytest.raises(ForbiddenClassError, match="reduce_graph_module"):
        load_model(str(path))
    program = capture(str(path), X, trust_all=True)
    torch.testing.assert_close(program.module(X), model(X))


def test_class_of_a_script_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(), path)
    import zipfile

    with zipfile.ZipFile(path) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(
                file, b"\x80\x02c__main__\nNet\n." if file.endswith("data.pkl") else content
            )
    with pytest.raises(LoadError, match=r"class Net that was defined in a script \(__main__\)"):
        load_model(str(path), trust_all=True)


@pytest.mark.parametrize("is_traced", [True, False])
def test_scripted_module(tmp_path: Path, is_traced: bool) -> None:
    model, path = _torch_only(), tmp_path / "model.pt"
    (torch.jit.trace(model, X) if is_traced else torch.jit.script(model)).save(str(path))
    program = capture(str(path), X)
    assert program.dynamic_batch
    assert set(dict(program.module.named_parameters())) == set(dict(model.named_parameters()))
    torch.testing.assert_close(program.module(X), model(X))


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_exported_program(tmp_path: Path, is_dynamic: bool) -> None:
    model, path = tiny_residual(), tmp_path / "model.pt2"
    shapes = ({0: Dim("batch")},) if is_dynamic else None
    torch.export.save(torch.export.export(model, (X,), dynamic_shapes=shapes), path)
    program = capture(str(path))
    assert program.dialect == "export"
    assert program.dynamic_batch is is_dynamic
    assert set(dict(program.module.named_parameters())) == set(dict(model.named_parameters()))
    torch.testing.assert_close(program.module(X), model(X))


def test_torchvision_names() -> None:
    first, second = _module("torchvision:squeezenet1_1"), _module("torchvision:squeezenet1_1")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert type(_module("torchvision:deeplabv3_resnet50")).__name__ == "DeepLabV3"
    with pytest.raises(LoadError, match="torchvision has no model 'resnet5': did you mean resnet5"):
        load_model("torchvision:resnet5")


def test_timm_names() -> None:
    pytest.importorskip("timm")
    assert capture("timm:test_resnet").example_inputs[0].shape == (1, 3, 160, 160)
    with pytest.raises(LoadError, match="timm has no model 'resnet5x'"):
        load_model("timm:resnet5x")


def test_factory_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_net_of_test_load.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(3, 2)\nx = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("my_net_of_test_load:make"), nn.Linear)
    with pytest.raises(LoadError, match="has no attribute 'mak': did you mean make"):
        load_model("my_net_of_test_load:mak")
    with pytest.raises(LoadError, match="is a int, expected a torch.nn.Module"):
        load_model("my_net_of_test_load:x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise KeyError('boom')", "importing .* failed: KeyError"),
        ("def f(): 1 / 0", "the call failed: ZeroDivisionError"),
    ],
)
def test_factory_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    name = f"broken_net_{len(content)}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=message):
        load_model(f"{name}:f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent.pt", "absent.pt does not exist"),
        ("resnet50", "is not a model and no such file exists; expected a file"),
        ("absent_package.sub:f", "there is no module 'absent_package'"),
    ],
)
def test_texts_that_name_nothing(text: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(text)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".pth"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    with pytest.raises(LoadError, match="is empty"):
        load_model(str(path))
    path.write_bytes(b"this is a text and not a model\n" * 40)
    with pytest.raises(LoadError, match="not a readable"):
        load_model(str(path))
    torch.save(_torch_only(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(LoadError, match="not a readable"):
        load_model(str(path))


def _export_elsewhere(text: str, path: Path) -> None:
    """Export what `make` of a text gives, in a process of its own: what is registered there is not here."""
    export = "torch.export.export(make(), (torch.randn(1, 3, 8, 8),))"
    _python(f"import torch\n{text}\ntorch.export.save({export}, {str(path)!r})")


def _python(text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_operator_of_an_unknown_library(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    _export_elsewhere(
        """
@torch.library.custom_op("elsewhere::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

twice.register_fake(torch.empty_like)

class make(torch.nn.Module):
    def forward(self, x):
        return twice(x)
""",
        path,
    )
    with pytest.raises(
        LoadError, match="calls the operator elsewhere::twice, .* import the module"
    ):
        load_model(str(path))


def test_an_operator_of_torchvision_is_registered(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    _export_elsewhere(
        """
import torchvision

class make(torch.nn.Module):
    def forward(self, x):
        boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        return torchvision.ops.roi_align(x, boxes, (2, 2))
""",
        path,
    )
    _python(f"from graphprune.load import load_model; load_model({str(path)!r})")


def test_folder_and_other_objects(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(LoadError, match="is a folder"):
        load_model(str(tmp_path / "folder.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(LoadError, match="holds a list, expected a torch.nn.Module"):
        load_model(str(tmp_path / "list.pt"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(LoadError, match="not a readable"):
        load_model(str(tmp_path / "plain.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_given_as_a_model(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    _save(tiny_residual().state_dict(), path)
    with pytest.raises(
        LoadError, match="weights without the code of a model.*package.module:factory --weights"
    ):
        load_model(str(path))


def _save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights(tmp_path: Path, suffix: str) -> None:
    donor, path = tiny_residual(), tmp_path / f"weights{suffix}"
    donor.get_parameter("fc.bias").data.fill_(3.0)
    _save(donor.state_dict(), path)
    model = tiny_residual()
    before = model.get_parameter("fc.bias").clone()
    program = capture(model, X, weights=path)
    assert torch.equal(program.module(X), donor(X))
    assert torch.equal(model.get_parameter("fc.bias"), before)
    assert torch.equal(capture("tests.models:tiny_residual", X, weights=path).module(X), donor(X))


def test_wrapped_weights(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in tiny_residual().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    assert set(read_weights(tmp_path / "w.pt")) == set(tiny_residual().state_dict())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = tiny_residual().state_dict()
    del state["fc.bias"]
    state["extra"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(10, 3)
    _save(state, tmp_path / "w.pt")
    message = (
        r"do not fit _Residual: 1 missing: fc.bias; 1 unexpected: extra; "
        r"1 of another shape: fc.weight \(model 10x20, file 10x3\)"
    )
    with pytest.raises(LoadError, match=message):
        load_weights(tiny_residual(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(LoadError, match="does not exist"):
        read_weights(path)
    path.write_bytes(b"garbage that is no state dict")
    with pytest.raises(LoadError, match="cannot be read as a state dict"):
        read_weights(path)


def test_weights_file_that_holds_a_module_is_not_run(tmp_path: Path) -> None:
    torch.save(models.tiny_dense(), tmp_path / "w.pt")
    with pytest.raises(LoadError, match="cannot be read as a state dict"):
        read_weights(tmp_path / "w.pt")
