"""Bad input through the command line: status, one line that says what is wrong, nothing on stdout, no file left behind.

The plainest cases (a file or a folder that is not there, an unknown command) stand in test_cli.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphprune.cli import main

NET = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5))


def other():
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 6, 3), nn.Flatten(), nn.Linear(96, 5))


def infinite():
    model = net()
    with torch.no_grad():
        model[2].bias[1] = float("inf")
    return model


def branching():
    class Net(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x
    return Net()


def tokens():
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))


def broken():
    raise RuntimeError("no licence")


class Raising(nn.Module):
    def forward(self, x):
        raise KeyError("its own trouble")


def raising():
    return Raising()


def empty():
    return nn.Sequential(nn.ReLU())


def no_disk():
    raise OSError("disk gone")
"""

NET_SHAPE = ("bad_net:net", "--input", "1x3x8x8")


class _Forbidden:
    """A pickle of this makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def _torch_only() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)
    )


def _truncated() -> None:
    torch.save(_torch_only(), "truncated.pt")
    content = Path("truncated.pt").read_bytes()
    Path("truncated.pt").write_bytes(content[: len(content) // 2])


def _nan_weights() -> None:
    state = {name: t.clone() for name, t in _torch_only().state_dict().items()}
    state["2.weight"][0, 0] = float("nan")
    save_file(state, "nan.safetensors")


def _plan(**changes: Any) -> Callable[[], None]:
    """Return what writes a plan of ``bad_net:net`` with some entries changed."""

    def write() -> None:
        from graphprune import capture, compile

        result = compile(
            capture("bad_net:net", torch.zeros(1, 3, 8, 8)), export=False, verify=False
        )
        assert result.plan is not None
        Path("plan.json").write_text(json.dumps({**result.plan.to_json(), **changes}))

    return write


CASES: dict[str, tuple[int, Callable[[], object] | None, list[str], list[str]]] = {
    # what: (status, what to prepare in the current folder, arguments, what the line must hold)
    "truncated model": (
        1,
        _truncated,
        ["compile", "truncated.pt", "--input", "1x3x8x8"],
        ["truncated.pt", "truncated, or of another format"],
    ),
    "truncated exported program": (
        1,
        lambda: Path("model.pt2").write_bytes(b"PK\x03\x04 and then nothing"),
        ["inspect", "model.pt2"],
        ["model.pt2", "not a readable"],
    ),
    "text instead of a model": (
        1,
        lambda: Path("notes.pt").write_text("import this\n" * 50),
        ["inspect", "notes.pt"],
        ["notes.pt is not a readable PyTorch model file"],
    ),
    "a file of another kind": (
        1,
        lambda: np.save("array.pt.npy", np.zeros(3)),
        ["inspect", "array.pt.npy"],
        ["array.pt.npy is not a readable PyTorch model file"],
    ),
    "a list instead of a model": (
        1,
        lambda: torch.save([1, 2], "list.pt"),
        ["compile", "list.pt", "--input", "1x3x8x8"],
        ["list.pt holds a list, expected a torch.nn.Module"],
    ),
    "weights instead of a model": (
        1,
        lambda: torch.save(_torch_only().state_dict(), "state.pt"),
        ["compile", "state.pt"],
        ["weights without the code of a model", "--weights state.pt"],
    ),
    "an ONNX file to compile": (
        1,
        lambda: Path("model.onnx").write_bytes(b"\x08\x0a"),
        ["compile", "model.onnx"],
        ["model.onnx"],
    ),
    "pickle that names a forbidden function": (
        1,
        lambda: torch.save([_torch_only(), _Forbidden()], "evil.pt"),
        ["compile", "evil.pt", "--input", "1x3x8x8"],
        ["posix.mkdir", "Nothing of it was run", "--trust"],
    ),
    "old pickle that names a forbidden function": (
        1,
        lambda: torch.save(_Forbidden(), "evil.pth", _use_new_zipfile_serialization=False),
        ["inspect", "evil.pth"],
        ["posix.mkdir", "Nothing of it was run"],
    ),
    "forbidden function in a file of weights": (
        1,
        lambda: torch.save({"w": _Forbidden()}, "evil.pt"),
        ["compile", *NET_SHAPE, "--weights", "evil.pt"],
        ["evil.pt cannot be read as a state dict"],
    ),
    "a whole model in the place of weights": (
        1,
        lambda: torch.save(_torch_only(), "whole.pt"),
        ["compile", *NET_SHAPE, "--weights", "whole.pt"],
        ["other objects than tensors", "in the place of MODEL", "save model.state_dict()"],
    ),
    "code in the place of a model": (
        1,
        None,
        ["compile", "bad_net.py", "--input", "1x3x8x8"],
        ["bad_net.py is code, not a model", "bad_net:FUNCTION"],
    ),
    "a forward that raises": (
        1,
        None,
        ["compile", "bad_net:raising", "--input", "1x3"],
        ["KeyError: 'its own trouble' (bad_net.py, line "],
    ),
    "a model of nothing": (
        1,
        None,
        ["compile", "bad_net:empty", "--input", "1x3"],
        ["no parameters and no multiply-accumulates"],
    ),
    "an amount where a fraction was meant": (
        1,
        None,
        ["compile", *NET_SHAPE, "--target", "macs=2"],
        ["target macs=2 (2 MACs; a fraction is at most 1) cannot be reached"],
    ),
    "resume without training": (
        2,
        None,
        ["compile", *NET_SHAPE, "--resume"],
        ["no pass of this pipeline trains", "--epochs N"],
    ),
    "data whose function raises": (
        1,
        None,
        ["compile", *NET_SHAPE, "--data", "bad_net:no_disk"],
        ["data 'bad_net:no_disk': no_disk() failed: OSError: disk gone"],
    ),
    "data whose module raises": (
        1,
        lambda: Path("no_licence.py").write_text("raise RuntimeError('expired')\n"),
        ["compile", *NET_SHAPE, "--data", "no_licence:make"],
        ["data 'no_licence:make': importing 'no_licence' failed: RuntimeError: expired"],
    ),
    "weights of another model": (
        1,
        lambda: torch.save(nn.Linear(2, 2).state_dict(), "w.pt"),
        ["compile", *NET_SHAPE, "--weights", "w.pt"],
        ["w.pt do not fit Sequential", "6 missing: 0.weight", "2 unexpected: weight, bias"],
    ),
    "weights that are NaN": (
        1,
        _nan_weights,
        ["compile", *NET_SHAPE, "--weights", "nan.safetensors"],
        ["NaN or infinite", "2.weight"],
    ),
    "weights that are infinite": (
        1,
        None,
        ["inspect", "bad_net:infinite", "--input", "1x3x8x8"],
        ["NaN or infinite", "2.bias"],
    ),
    "factory that fails": (
        1,
        None,
        ["compile", "bad_net:broken"],
        ["bad_net:broken: the call failed: RuntimeError: no licence"],
    ),
    "file in place of a module": (
        1,
        None,
        ["compile", "bad_net.py:net"],
        ["there is no module 'bad_net.py' here or installed (write bad_net:net)"],
    ),
    "numbers in place of tokens": (
        1,
        None,
        ["compile", "bad_net:tokens", "--input", "1x6"],
        ["does not accept example inputs of shape 1x6", "module 0 (Embedding)", "1x16:int64"],
    ),
    "factory that is not there": (
        1,
        None,
        ["compile", "bad_net:nett"],
        ["bad_net has no attribute 'nett'", "did you mean net"],
    ),
    "control flow on values": (
        1,
        None,
        ["compile", "bad_net:branching", "--input", "2x3"],
        ["bad_net:branching cannot be captured as a graph", "torch.export"],
    ),
    "no input shape": (
        1,
        None,
        ["compile", "bad_net:net"],
        ["does not state the shape of its input", "--input 1x3x224x224"],
    ),
    "input shape that does not fit": (
        1,
        None,
        ["compile", "bad_net:net", "--input", "1x3x9x9"],
        ["does not accept example inputs of shape 1x3x9x9", "module 4 (Linear)"],
    ),
    "input that is no shape": (
        1,
        None,
        ["compile", "bad_net:net", "--input", "1,3,8,8"],
        ["'1,3,8,8' is neither a shape such as 1x3x224x224"],
    ),
    "one input too many": (
        1,
        None,
        ["compile", *NET_SHAPE, "--input", "1x3"],
        ["takes 1 (input) inputs, found 2 example inputs"],
    ),
    "target of nothing": (
        1,
        None,
        ["compile", *NET_SHAPE, "--target", "macs=0"],
        ["macs must be more than 0"],
    ),
    "target above the dense model": (
        1,
        None,
        ["compile", *NET_SHAPE, "--target", "params=1.5"],
        ["params=1.5"],
    ),
    "target that removes everything": (
        1,
        None,
        ["compile", *NET_SHAPE, "--target", "ratio=1"],
        ["ratio must be at least 0 and less than 1"],
    ),
    "target that is no target": (
        1,
        None,
        ["compile", *NET_SHAPE, "--target", "speed=2"],
        ["'speed=2' is not understood", "macs=", "params=", "ratio="],
    ),
    "target that is out of reach": (
        1,
        None,
        ["compile", *NET_SHAPE, "--target", "params=0.01"],
        ["target params=0.01 cannot be reached", "every removable channel gone", "of 1,"],
    ),
    "unknown method": (
        2,
        None,
        ["compile", *NET_SHAPE, "--method", "wizardry"],
        ["no method is called 'wizardry'", "methods are activation, bn-scale"],
    ),
    "pass that is no method": (
        2,
        None,
        ["compile", *NET_SHAPE, "--method", "clean-up"],
        ["no method is called 'clean-up'"],
    ),
    "method that needs data": (
        1,
        None,
        ["compile", *NET_SHAPE, "--method", "taylor"],
        ["taylor", "--data"],
    ),
    "unknown granularity": (
        2,
        None,
        ["compile", *NET_SHAPE, "--granularity", "atoms"],
        ["granularity 'atoms' is not known; known: channels, widths, head-dims"],
    ),
    "rounding that is no number": (
        2,
        None,
        ["compile", *NET_SHAPE, "--round-to", "some"],
        ["'some'", "expected auto, or a number"],
    ),
    "unknown pass": (
        2,
        None,
        ["compile", *NET_SHAPE, "--passes", "dependency-group"],
        ["no pass is called 'dependency-group'", "did you mean dependency-groups"],
    ),
    "pipeline text with an unknown option": (
        2,
        None,
        ["compile", *NET_SHAPE, "--passes", "magnitude{p=2}"],
        ["pass 'magnitude' has no option 'p'; it takes norm"],
    ),
    "pipeline text with a value of another type": (
        2,
        None,
        ["compile", *NET_SHAPE, "--passes", "magnitude{norm=3}"],
        ["option norm expects 1|2, found 3"],
    ),
    "pipeline text that ends too soon": (
        2,
        None,
        ["compile", *NET_SHAPE, "--passes", 'a{b="c'],
        ["a quote that is never closed at position 4"],
    ),
    "pipeline in the wrong order": (
        1,
        None,
        ["compile", *NET_SHAPE, "--passes", "magnitude,dependency-groups"],
        ["magnitude: needs DependencyGroups, found none", "put dependency-groups before it"],
    ),
    "unknown data": (
        1,
        None,
        ["compile", *NET_SHAPE, "--data", "imagenette"],
        ["expected data as one of cifar10:DIR", "found 'imagenette'"],
    ),
    "folder without the data": (
        1,
        lambda: Path("root").mkdir(),
        ["compile", *NET_SHAPE, "--data", "cifar10:root"],
        ["cifar-10-batches-py", "missing, incomplete or damaged"],
    ),
    "data option that is unknown": (
        1,
        None,
        ["compile", *NET_SHAPE, "--data", "digits,normalise=none"],
        ["unknown option 'normalise'; known: normalize, size"],
    ),
    "data of another shape": (
        1,
        None,
        ["evaluate", *NET_SHAPE, "--data", "digits"],
        ["the model takes samples of shape 3x8x8, the data gives 1x8x8"],
    ),
    "plan of another model": (
        1,
        _plan(),
        ["apply", "plan.json", "bad_net:other", "--input", "1x3x8x8"],
        ["the plan was made for 'bad_net:net'", "'bad_net:other' has"],
    ),
    "plan that contradicts itself": (
        1,
        _plan(slices={"0.weight": {"0": [0, 1]}}),
        ["apply", "plan.json", *NET_SHAPE],
        ["the plan contradicts itself at"],
    ),
    "plan that cuts too far": (
        1,
        _plan(slices={"0.weight": {"0": [0, 99]}}),
        ["apply", "plan.json", *NET_SHAPE],
        ["keeps indices (0, 99) of 0.weight[0], which has 8"],
    ),
    "plan of a later version": (
        1,
        _plan(version=99),
        ["apply", "plan.json", *NET_SHAPE],
        ["version 99, this graphprune reads version 1"],
    ),
    "report instead of a plan": (
        1,
        lambda: Path("plan.json").write_text('{"model": "x"}'),
        ["apply", "plan.json", *NET_SHAPE],
        ["plan.json: not a plan", "Expected the plan.json that compile writes"],
    ),
    "plan that is no JSON": (
        1,
        lambda: Path("plan.json").write_text("{"),
        ["apply", "plan.json", *NET_SHAPE],
        ["cannot read the plan plan.json"],
    ),
    "output folder below a file": (
        1,
        lambda: Path("file").write_text("mine"),
        ["compile", *NET_SHAPE, "--out", "file/out"],
        ["expected an output folder that can be written", "file/out"],
    ),
    "output folder that nobody can make": (
        1,
        None,
        ["compile", *NET_SHAPE, "--out", "/proc/graphprune/out"],
        ["expected an output folder that can be written", "/proc/graphprune/out"],
    ),
    "damaged ONNX file": (
        1,
        lambda: Path("model.onnx").write_bytes(b"\x00" * 64),
        ["bench", "model.onnx"],
        ["model.onnx"],
    ),
    "weights for an ONNX file": (
        2,
        lambda: Path("model.onnx").write_bytes(b"\x00" * 64),
        ["evaluate", "model.onnx", "--data", "digits", "--weights", "w.pt"],
        ["an ONNX file has its weights and inputs"],
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that holds a module with factories."""
    (tmp_path / "bad_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.delitem(__import__("sys").modules, "bad_net", raising=False)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    expected, prepare, arguments, wanted = CASES[case]
    if prepare is not None:
        prepare()
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    folders = {path for path in here.rglob("*") if path.is_dir()}
    capsys.readouterr()

    status = main(arguments)

    out, err = capsys.readouterr()
    assert status == expected, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert "unexpected" not in err.partition(":")[2].split()[:1]
    for part in wanted:
        assert part in err
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()} == before
    assert {p for p in here.rglob("*") if p.is_dir()} == folders
    assert not (here / "executed").exists()


def test_the_forbidden_pickle_would_have_done_something(here: Path) -> None:
    torch.save(_Forbidden(), "evil.pt")
    torch.load("evil.pt", weights_only=False)
    assert (here / "executed").is_dir()


def test_what_is_said_to_be_in_reach_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", *NET_SHAPE, "--no-export", "--json", "--target"]
    assert main([*arguments, "macs=0.001"]) == 1
    said = re.search(r"the program is at macs=(\S+) \((\S+) of", capsys.readouterr().err)
    assert said is not None
    # The smallest program keeps one channel of each layer, which no multiple of two does.
    assert main([*arguments, f"macs={said[2].replace(',', '')}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["after"]["macs"] == int(said[2].replace(",", ""))
    assert report["removed"]["channels"] == 7 + 5
