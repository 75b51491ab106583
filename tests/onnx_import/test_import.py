"""ONNX in: files are read, agree with ONNX Runtime, and are cut exactly; what cannot be read says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import GraphpruneError, InputError, LoadError
from graphprune.groups import analyze
from graphprune.onnx_export import export_onnx
from graphprune.program import Program
from graphprune.runtime import open_session, parity
from graphprune.target import parse_target
from tests.exactness import assert_cut_is_exact, choose_or_none
from tests.models import tiny_mobile, tiny_residual, tiny_transformer
from tests.patterns import PATTERNS
from tests.strategies import randomize

RATIO = parse_target("ratio=0.4")


def weight(name: str, *shape: int, scale: float = 0.3) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).normal(0, scale, shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def integers(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    shape: Sequence[int | str],
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> Path:
    values = [onnx.ValueInfoProto(name=o) for o in outputs]
    graph = helper.make_graph(
        list(nodes), "net", [helper.make_tensor_value_info("x", kind, shape)], values, list(weights)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def assert_imported(path: Path, *, dynamic: bool = True) -> Program:
    program = gp.capture(str(path))
    assert program.dynamic_batch == dynamic
    check = parity(program, open_session(path, "cpu"))
    assert check.passed, check.detail
    return program


def cut(program: Program, *, seed: int = 0) -> Program:
    groups = analyze(program)
    choice = choose_or_none(groups, seed, RATIO)
    assert choice is not None
    assert not choice.keep.all()
    return assert_cut_is_exact(program, groups, choice.keep)


class Shuffle(nn.Module):
    """Split, shuffle, upsample, pad and a gate: what hand-written files are full of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Hardsigmoid())
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        kept, moved = x.chunk(2, 1)
        x = torch.cat([kept, self.branch(moved)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = x * self.gate(x)
        x = F.silu(self.norm(self.up(x)))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=False)
        out: Tensor = self.head(F.pad(x, (1, 2, 0, 1)))
        return out


EXPORTED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "residual": lambda: (tiny_residual(), torch.randn(1, 3, 16, 16)),
    "depthwise": lambda: (tiny_mobile(), torch.randn(1, 3, 16, 16)),
    "transformer": lambda: (tiny_transformer(), torch.randn(1, 3, 16, 16)),
    "shuffle": lambda: (Shuffle(), torch.randn(1, 3, 16, 16)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_graphprune_exported_is_read_again_and_cut(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = EXPORTED[name]()
    randomize(model)
    path = tmp_path / "model.onnx"
    export_onnx(gp.capture(model.eval(), example), path)
    program = assert_imported(path)
    cut(program)


def test_initializers_keep_their_names_and_layout(tmp_path: Path) -> None:
    path = write(
        tmp_path / "net.onnx",
        [
            helper.make_node("Gemm", ["x", "first/w", "a.bias"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "b", "c"], ["y"]),
        ],
        [weight("first/w", 7, 5), weight("a.bias", 7), weight("b", 7, 3), weight("c", 3)],
        ["batch", 5],
    )
    program = assert_imported(path)
    shapes = {name: tuple(p.shape) for name, p in program.module.named_parameters()}
    assert shapes == {"first_w": (7, 5), "a.bias": (7,), "b": (7, 3), "c": (3,)}
    after = dict(cut(program).named_tensors())
    assert after["b"].shape[0] == after["first_w"].shape[0] < 7


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"transB": 1}, ((7, 5), (7,))),
        ({"transB": 0}, ((5, 7), (7,))),
        ({"transB": 1, "alpha": 0.5, "beta": 2.0}, ((7, 5), (7,))),
        ({"transB": 0, "alpha": 2.0}, ((5, 7), (1, 7))),
        ({"transB": 1, "beta": 0.0}, ((7, 5), (7,))),
    ],
)
def test_gemm(options: dict[str, Any], shapes: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "net.onnx",
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], **options),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("MatMul", ["t", "v"], ["y"]),
        ],
        [weight("w", *shapes[0]), weight("b", *shapes[1]), weight("v", 7, 4)],
        [None, 5],  # type: ignore[list-item]
    )
    smaller = dict(cut(assert_imported(path)).named_tensors())
    assert smaller["v"].shape[0] < 7


CONV = [weight("w", 12, 3, 3, 3), weight("b", 12)]
ONE_NODE: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto], int]] = {
    "Clip with limits as inputs": (
        [helper.make_node("Clip", ["c", "low", "high"], ["d"])],
        [
            numpy_helper.from_array(np.array(0, np.float32), "low"),
            numpy_helper.from_array(np.array(6, np.float32), "high"),
        ],
        17,
    ),
    "Clip with limits as attributes": (
        [helper.make_node("Clip", ["c"], ["d"], min=0.0, max=6.0)],
        [],
        10,
    ),
    "grouped convolution": (
        [
            helper.make_node(
                "Conv", ["c", "g"], ["d"], group=4, pads=[1, 1, 1, 1], kernel_shape=[3, 3]
            )
        ],
        [weight("g", 12, 3, 3, 3)],
        17,
    ),
    "depthwise with SAME_UPPER": (
        [helper.make_node("Conv", ["c", "g"], ["d"], group=12, auto_pad="SAME_UPPER", strides=[2, 2])],
        [weight("g", 12, 1, 3, 3)],
        17,
    ),
    "uneven border": (
        [helper.make_node("Conv", ["c", "g"], ["d"], pads=[0, 1, 2, 0])],
        [weight("g", 12, 12, 3, 3)],
        17,
    ),
    "max pool with an uneven border": (
        [helper.make_node("MaxPool", ["c"], ["d"], kernel_shape=[3, 2], pads=[1, 0, 0, 1])],
        [],
        17,
    ),
    "average pool without the border": (
        [helper.make_node("AveragePool", ["c"], ["d"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        [],
        17,
    ),
    "batch norm": (
        [helper.make_node("BatchNormalization", ["c", "s", "o", "m", "v"], ["d"])],
        [
            weight("s", 12),
            weight("o", 12),
            weight("m", 12),
            numpy_helper.from_array(np.linspace(0.5, 2, 12, dtype=np.float32), "v"),
        ],
        17,
    ),
    "instance norm": (
        [helper.make_node("InstanceNormalization", ["c", "s", "o"], ["d"])],
        [weight("s", 12), weight("o", 12)],
        17,
    ),
    "PRelu": (
        [helper.make_node("PRelu", ["c", "s"], ["d"])],
        [weight("s", 12, 1, 1)],
        17,
    ),
    "activations": (
        [
            helper.make_node("LeakyRelu", ["c"], ["c1"], alpha=0.2),
            helper.make_node("Elu", ["c1"], ["c2"], alpha=0.7),
            helper.make_node("Selu", ["c2"], ["c3"]),
            helper.make_node("HardSigmoid", ["c3"], ["c4"]),
            helper.make_node("HardSwish", ["c4"], ["c5"]),
            helper.make_node("Softplus", ["c5"], ["c6"]),
            helper.make_node("Mul", ["c6", "c"], ["d"]),
        ],
        [],
        17,
    ),
    "depth to space": (
        [helper.make_node("DepthToSpace", ["c"], ["d"], blocksize=2, mode="DCR")],
        [],
        17,
    ),
    "split, shuffle and concat": (
        [
            helper.make_node("Split", ["c", "parts"], ["c1", "c2"], axis=1),
            helper.make_node("Relu", ["c1"], ["c3"]),
            helper.make_node("Concat", ["c2", "c3"], ["c4"], axis=1),
            helper.make_node("Shape", ["c4"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
            helper.make_node("Concat", ["n", "rest"], ["t"], axis=0),
            helper.make_node("Reshape", ["c4", "t"], ["c5"]),
            helper.make_node("Transpose", ["c5"], ["c6"], perm=[0, 2, 1, 3, 4]),
            helper.make_node("Reshape", ["c6", "back"], ["d"]),
        ],
        [
            integers("parts", 6, 6),
            integers("zero", 0),
            integers("rest", 2, 6, 8, 8),
            integers("back", 0, 12, 8, 8),
        ],
        17,
    ),
    "slice with a negative start": (
        [helper.make_node("Slice", ["c", "from", "to", "axes"], ["d"])],
        [integers("from", -9), integers("to", 2**31 - 1), integers("axes", 1)],
        17,
    ),
    "gather of channels": (
        [helper.make_node("Gather", ["c", "places"], ["d"], axis=1)],
        [integers("places", 3, 4, 5, 6)],
        17,
    ),
    "squeeze and excite": (
        [
            helper.make_node("GlobalAveragePool", ["c"], ["m"]),
            helper.make_node("Conv", ["m", "w1"], ["m1"]),
            helper.make_node("Relu", ["m1"], ["m2"]),
            helper.make_node("Conv", ["m2", "w2"], ["m3"]),
            helper.make_node("Sigmoid", ["m3"], ["m4"]),
            helper.make_node("Mul", ["c", "m4"], ["d"]),
        ],
        [weight("w1", 5, 12, 1, 1), weight("w2", 12, 5, 1, 1)],
        17,
    ),
    "resize by factors": (
        [
            helper.make_node(
                "Resize", ["c", "", "f"], ["d"], mode="linear", coordinate_transformation_mode="half_pixel"
            )
        ],
        [numpy_helper.from_array(np.array([1, 1, 2, 1.5], np.float32), "f")],
        17,
    ),
    "pad of channels": (
        [helper.make_node("Pad", ["c", "widths"], ["d"])],
        [integers("widths", 0, 2, 0, 0, 0, 3, 1, 0)],
        17,
    ),
    "expand of a table": (
        [
            helper.make_node("Shape", ["c"], ["s"], start=0, end=1),
            helper.make_node("Concat", ["s", "rest"], ["t"], axis=0),
            helper.make_node("Expand", ["token", "t"], ["e"]),
            helper.make_node("Add", ["c", "e"], ["d"]),
        ],
        [integers("rest", 12, 8, 8), weight("token", 1, 12, 1, 1)],
        17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_NODE)
def test_hand_written_files(name: str, tmp_path: Path) -> None:
    nodes, weights, opset = ONE_NODE[name]
    path = write(
        tmp_path / "net.onnx",
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
            *nodes,
            helper.make_node("Conv", ["d", "last"], ["y"]),
        ],
        [*CONV, *weights, weight("last", 4, _channels(name), 1, 1)],
        ["batch", 3, 8, 8],
        opset=opset,
    )
    smaller = cut(assert_imported(path))
    assert dict(smaller.named_tensors())["w"].shape[0] < 12


def test_local_response_norm_is_read(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("LRN", ["c"], ["y"], size=3),
    ]
    assert_imported(write(tmp_path / "net.onnx", nodes, CONV, ["batch", 3, 8, 8]))


def _channels(name: str) -> int:
    found = {"depth to space": 3, "slice with a negative start": 9, "gather of channels": 4}
    return {**found, "pad of channels": 17}.get(name, 12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("count", [1, 2])
def test_recurrent_layers_agree_with_onnx_runtime(kind: str, count: int, tmp_path: Path) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    options: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    direction = "bidirectional" if count == 2 else "forward"
    nodes = [
        helper.make_node(
            kind, ["x", "w", "r", "b"], ["s", "h"], hidden_size=7, direction=direction, **options
        ),
        helper.make_node("Neg", ["s"], ["y"]),
        helper.make_node("Neg", ["h"], ["z"]),
    ]
    weights = [
        weight("w", count, gates * 7, 5),
        weight("r", count, gates * 7, 7),
        weight("b", count, 2 * gates * 7),
    ]
    path = write(tmp_path / "rnn.onnx", nodes, weights, [6, 2, 5], outputs=("y", "z"))
    program = assert_imported(path, dynamic=False)
    assert list(program.module(*program.example_inputs)) == ["y", "z"]


def test_an_embedding_gets_row_numbers_that_its_table_has(tmp_path: Path) -> None:
    path = write(
        tmp_path / "words.onnx",
        [
            helper.make_node("Gather", ["table", "x"], ["e"]),
            helper.make_node("ReduceMean", ["e"], ["m"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"]),
        ],
        [weight("table", 9, 6), weight("w", 6, 8), weight("v", 8, 3)],
        ["batch", 5],
        kind=TensorProto.INT64,
    )
    program = assert_imported(path)
    assert program.example_inputs[0].max() > 0
    shapes = {n: t.shape for n, t in cut(program).named_tensors()}
    assert shapes["table"][1] == shapes["w"][0] < 6


def test_compile_checks_the_import_against_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(gp.capture(tiny_residual(), torch.randn(1, 3, 16, 16)), path)
    result = gp.compile(str(path), target="macs=0.6", out=tmp_path / "out")
    assert result.passed
    check = result.report.to_json()["checks"]["import"]
    assert check["passed"]
    assert check["provider"]
    made = result.report.checks["import"]
    assert made is not None
    assert made.detail == "batches of 1, 2, 5"
    assert_imported(tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize(
    "name",
    [
        "shuffle_index_buffer",  # GatherND
        "channels_chosen_twice_by_one_buffer",  # numbers from the end
        "attention_grouped_queries_enable_gqa",  # one axis as a number
        "attention_grouped_queries_expanded",  # a mask of infinities is no weight
        "attention_queries_viewed_beside_their_keys",  # tensors called as the exporter calls its own
        "distances_to_learned_places",  # distances, taken apart
    ],
)
def test_a_pattern_goes_out_and_comes_in_again(name: str, tmp_path: Path) -> None:
    net = PATTERNS[name].make().eval()
    randomize(net)
    export_onnx(gp.capture(net, net.example), tmp_path / "net.onnx")
    result = gp.compile(str(tmp_path / "net.onnx"), target="macs=0.7", round_to=1)
    for check in ("import", "surgery", "onnx"):
        found = result.report.checks[check]
        assert found is not None
        assert found.passed, check


def test_a_branch_with_a_known_condition_is_taken(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 8])
    yes = helper.make_graph([helper.make_node("Relu", ["h"], ["out"])], "yes", [], [value])
    no = helper.make_graph([helper.make_node("Neg", ["h"], ["out"])], "no", [], [value])
    path = write(
        tmp_path / "net.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["c"], ["r"], then_branch=yes, else_branch=no),
            helper.make_node("MatMul", ["r", "v"], ["y"]),
        ],
        [weight("w", 5, 8), weight("v", 8, 3), numpy_helper.from_array(np.array(True), "c")],
        ["batch", 5],
    )
    cut(assert_imported(path))


def _matmul(*nodes: onnx.NodeProto, shape: Sequence[int | str] = ("batch", 5)) -> Any:
    return lambda path: write(path, nodes, [weight("w", 5, 4)], shape)


def _foreign(path: Path) -> None:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5])
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")
    graph = helper.make_graph([node], "net", [shape], [output], [weight("w", 5, 4)])
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=8), path)


REFUSED: dict[str, tuple[Callable[[Path], Any], type[GraphpruneError], list[str]]] = {
    "bytes of another kind": (
        lambda path: path.write_bytes(b"\x00" * 64),
        LoadError,
        ["is not a readable ONNX file"],
    ),
    "nothing": (lambda path: path.write_bytes(b""), LoadError, ["is empty"]),
    "no graph": (lambda path: path.write_bytes(b"\x08\x0a"), LoadError, ["holds no ONNX graph"]),
    "an operator without importer": (
        _matmul(
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Det", ["h"], ["y"], name="odd"),
        ),
        LoadError,
        ["operator Det (node odd, opset 17)", "graphprune.onnx_import.operator"],
    ),
    "a foreign domain": (
        _foreign,
        LoadError,
        ["com.microsoft::FusedMatMul"],
    ),
    "an open size": (
        _matmul(helper.make_node("MatMul", ["x", "w"], ["y"]), shape=("batch", "time", 5)),
        InputError,
        ["leaves sizes of its input open: x [batch, time, 5] float32", "--input"],
    ),
    "a graph that the checker refuses": (
        lambda path: path.write_bytes(
            onnx.ModelProto(
                ir_version=8,
                graph=helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], []),
                opset_import=[helper.make_opsetid("", 17)],
            ).SerializeToString()
        ),
        LoadError,
        ["onnx's checker refused"],
    ),
    "a step that torch has not": (
        lambda path: write(
            path,
            [helper.make_node("Slice", ["x", "a", "b", "c", "d"], ["y"])],
            [integers("a", 3), integers("b", 0), integers("c", 1), integers("d", -2)],
            ["batch", 5],
        ),
        LoadError,
        ["operator Slice", "a step of -2"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    make, kind, parts = REFUSED[name]
    path = tmp_path / "model.onnx"
    make(path)
    with pytest.raises(kind) as caught:
        gp.capture(str(path))
    for part in [*parts, "model.onnx"]:
        assert part in str(caught.value)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = _matmul(helper.make_node("MatMul", ["x", "w"], ["y"]))(tmp_path / "model.onnx")
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert gp.capture(str(path)).dynamic_batch
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(LoadError, match="keeps weights in a second file"):
        gp.capture(str(path))


def test_inputs_must_fit_the_signature(tmp_path: Path) -> None:
    path = str(_matmul(helper.make_node("MatMul", ["x", "w"], ["y"]))(tmp_path / "model.onnx"))
    with pytest.raises(InputError, match=r"takes x \[batch, 5\] float32, found 1x4 float32"):
        gp.capture(path, torch.randn(1, 4))
    with pytest.raises(InputError, match="takes 1 inputs"):
        gp.capture(path, (torch.randn(1, 5), torch.randn(1)))
    with pytest.raises(LoadError, match="leave out --weights"):
        gp.capture(path, weights="w.pt")


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    path = _matmul(helper.make_node("MatMul", ["x", "w"], ["y"]), shape=(2, 5))
    assert_imported(path(tmp_path / "model.onnx"), dynamic=False)
