"""Calibration: second moments of what flows into each linear and convolution layer, from one pass over data.

A layer computes ``z = W y`` for every sample ``y`` of its input: a row of a linear layer's input, or a sliding-window
patch of a convolution's. All that layer-wise second-order pruning needs of the data is, per convolution group,

    gram  = (1/n) sum_j y_j y_j^T                 cross = (1/n) sum_j ydense_j y_j^T

where ``y`` ends in a constant 1 for a layer with a bias. Batches are streamed once: a sum over a chunk of patches is
taken in the precision of the activations (float32; float64 for a program of doubles), and chunks are added up in
float64. Nothing else is kept, and the graph runs no further than the last layer that is asked for.

Source: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", section
3.3: one matrix Psi per layer serves every output unit, and each patch of a convolution is one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.errors import DataError, PassError
from graphprune.program import Program

__all__ = ["Layer", "Moments", "collect", "layers", "unfold"]

_CHUNK = 1 << 22
"""Elements of a chunk of patches: 16 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear or convolution node whose weight is a parameter."""

    node: str
    """Name of the graph node."""
    weight: str
    """Name of the weight, as in `Program.named_tensors`; a weight that several nodes use makes several layers."""
    bias: str | None
    """Name of the bias."""
    kind: Literal["linear", "conv"]
    input: str
    """Name of the node whose output the layer reads."""
    groups: int = 1
    """Convolution groups; 1 for linear."""
    stride: tuple[int, ...] = ()
    """Per spatial dimension, as are the next two; empty for linear."""
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    """Elements before and after."""
    padding_mode: str = "constant"
    """As `torch.nn.functional.pad` has it."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments of the inputs of one layer.

    Shapes:
        gram: ``[groups, f, f]``; f is the number of weights per output unit, one more with the bias constant.
        cross: ``[groups, f of the reference, f]``; rows are the reference's inputs, columns this program's.
    """

    layer: Layer
    gram: Tensor
    """Mean of ``y y^T``; with a bias, the last row and column belong to the constant 1."""
    count: int
    """How many samples (rows, patches) the mean is over."""
    cross: Tensor | None = None
    """Mean of ``ydense y^T``, where a reference was given."""
    has_constant: bool = False
    """Whether the last row and column belong to the constant 1."""


def layers(program: Program) -> tuple[Layer, ...]:
    """Return the linear and convolution layers of a program, in graph order.

    These are calls of `nn.Linear` and `nn.Conv1d` to `nn.Conv3d`, and of the functions and ATen operators of the same
    meaning whose weight is read straight from a parameter. Transposed convolutions are not among them, nor are modules
    with a forward of their own (weight standardisation).
    """
    names = {id(tensor): name for name, tensor in program.module.named_parameters()}
    found = []
    for node in program.module.graph.nodes:
        layer = None
        if node.op == "call_module":
            layer = _of_module(node, program.module.get_submodule(str(node.target)), names)
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            layer = _of_function(node, program.module, names)
        if layer is not None:
            found.append(layer)
    return tuple(found)


def unfold(layer: Layer, x: Tensor, kernel_size: Sequence[int] = ()) -> Tensor:
    """Return the input of a layer as samples: rows whose product with ``weight.flatten(1)`` is the layer's output.

    Args:
        layer: Where `x` flows in.
        x: The layer's input, batched.
        kernel_size: Spatial shape of the weight; empty for linear.

    Shapes:
        x: ``[..., features]`` for linear, ``[batch, channels, *space]`` for a convolution.
        result: ``[groups, samples, features]``; linear: every leading dimension counts samples; convolution: a sample
            is a patch, samples go by image and place, features by channel of the group and place in the kernel.
    """
    if layer.kind == "linear":
        return x.reshape(1, -1, x.shape[-1])
    windows = _windows(layer, _padded(layer, x), kernel_size)
    space = len(kernel_size)
    batch, channels = windows.shape[:2]
    grouped = windows.reshape(batch, layer.groups, channels // layer.groups, *windows.shape[2:])
    places = range(3, 3 + space)
    kernel = range(3 + space, 3 + 2 * space)
    return grouped.permute(1, 0, *places, 2, *kernel).reshape(
        layer.groups, batch * math.prod(windows.shape[2 : 2 + space]), -1
    )


@torch.no_grad()
def collect(
    program: Program,
    batches: Iterable[Any],
    nodes: Sequence[str] | None = None,
    *,
    reference: Program | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    max_patches: int | None = None,
) -> dict[str, Moments]:
    """Run batches through a program and return the second moments of its layers' inputs, by node.

    Memory holds one batch's activations, one chunk of patches, and the moments. Neither program changes.

    Args:
        program: Runs in evaluation mode, as far as the last layer that is asked for.
        batches: One tensor each, or a tuple with one tensor per graph input.
        nodes: Layers to look at; None: all.
        reference: The program whose inputs to the same layers `Moments.cross` compares with; it may be wider.
        device: Where to compute; the moments come back to the CPU.
        dtype: Of the moments.
        bias: Add the constant 1 to the samples of layers with a bias.
        max_patches: Look at this many samples of a batch at most, drawn at random with a fixed seed; they stand for the
            whole batch.

    Raises:
        PassError: A node is not a layer, of the program or of the reference.
        DataError: There are no batches, or a layer's input is not finite.
    """
    chosen = _chosen(program, nodes, "the program")
    recorder = _Recorder(program, chosen, device)
    dense = None
    if reference is not None:
        dense = _Recorder(reference, _chosen(reference, list(chosen), "the reference"), device)
    if max_patches is not None and max_patches < 1:
        raise PassError(f"expected max_patches of at least 1, found {max_patches}")
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, _Sum] = {}
    num_batches = 0
    with _evaluating(program.module), _evaluating((reference or program).module):
        for batch in batches:
            num_batches += 1
            inputs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            seen: dict[str, Tensor] = {}
            if dense is not None:
                dense.record(inputs, seen.__setitem__)

            def add(node: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
                total = sums.get(node)
                if total is None:
                    total = sums[node] = _Sum(
                        chosen[node],
                        recorder.kernels[node],
                        dense.chosen[node] if dense else None,
                        dense.kernels[node] if dense else (),
                        constant=bias and chosen[node].bias is not None,
                    )
                total.add(x, seen.pop(node, None), max_patches, generator)

            recorder.record(inputs, add)
    if not num_batches and chosen:
        raise DataError("calibration expected at least one batch of samples, found none")
    return {node: sums[node].moments(dtype) for node in chosen}


# -- finding layers ---------------------------------------------------------------------------------------------


_MODULES: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Linear, nn.Linear.forward),
    (nn.Conv1d, nn.Conv1d.forward),
    (nn.Conv2d, nn.Conv2d.forward),
    (nn.Conv3d, nn.Conv3d.forward),
)

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.ops.aten.linear.default: ("input", "weight", "bias"),
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    torch.ops.aten.conv1d.default: _CONV,
    torch.ops.aten.conv2d.default: _CONV,
    torch.ops.aten.conv3d.default: _CONV,
    torch.ops.aten.conv1d.padding: _CONV,
    torch.ops.aten.conv2d.padding: _CONV,
    torch.ops.aten.conv3d.padding: _CONV,
    torch.ops.aten.convolution.default: (
        *_CONV[:6],
        "transposed",
        "output_padding",
        "groups",
    ),
}
"""Function -> the names of its arguments."""


def _of_module(node: fx.Node, module: nn.Module, names: Mapping[int, str]) -> Layer | None:
    kind = next(
        (k for k, forward in _MODULES if isinstance(module, k) and type(module).forward is forward),
        None,
    )
    source = node.args[0] if node.args else node.kwargs.get("input")
    weight = module._parameters.get("weight")
    if kind is None or weight is None or not isinstance(source, fx.Node):
        return None
    bias = module._parameters.get("bias")
    bias_name = None if bias is None else names[id(bias)]
    if isinstance(module, nn.Linear):
        return Layer(
            node=node.name,
            weight=names[id(weight)],
            bias=bias_name,
            kind="linear",
            input=source.name,
        )
    given: dict[str, Any] = {
        n: getattr(module, n) for n in ("stride", "padding", "dilation", "groups")
    }
    mode = str(module.padding_mode)
    return _convolution(node, source, weight, names[id(weight)], bias_name, given, mode)


def _of_function(node: fx.Node, root: nn.Module, names: Mapping[int, str]) -> Layer | None:
    given = {**dict(zip(_FUNCTIONS[node.target], node.args, strict=False)), **node.kwargs}
    source, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    found = _parameter(root, weight)
    if found is None or not isinstance(source, fx.Node) or given.get("transposed"):
        return None
    offset = _parameter(root, bias)
    if bias is not None and offset is None:
        return None
    bias_name = None if offset is None else names[id(offset)]
    name = names[id(found)]
    if "stride" not in _FUNCTIONS[node.target]:
        return Layer(node=node.name, weight=name, bias=bias_name, kind="linear", input=source.name)
    if any(isinstance(leaf, fx.Node) for leaf in _leaves(given)):
        return None  # geometry that the graph computes
    return _convolution(node, source, found, name, bias_name, given, "zeros")


def _leaves(given: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("stride", "padding", "dilation", "groups"):
        value = given.get(name)
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _parameter(root: nn.Module, value: Any) -> nn.Parameter | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = root
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, nn.Parameter) else None


def _convolution(
    node: fx.Node,
    source: fx.Node,
    weight: Tensor,
    name: str,
    bias: str | None,
    given: Mapping[str, Any],
    mode: str,
) -> Layer:
    kernel = weight.shape[2:]

    def each(key: str, default: int) -> tuple[int, ...]:
        value = given.get(key, default)
        sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return sizes * len(kernel) if len(sizes) == 1 else sizes

    dilation = each("dilation", 1)
    padding = given.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    elif padding == "valid":
        sides = ((0, 0),) * len(kernel)
    else:
        sides = tuple((p, p) for p in each("padding", 0))
    return Layer(
        node=node.name,
        weight=name,
        bias=bias,
        kind="conv",
        input=source.name,
        groups=given.get("groups", 1),
        stride=each("stride", 1),
        dilation=dilation,
        padding=sides,
        padding_mode="constant" if mode == "zeros" else mode,
    )


def _chosen(program: Program, nodes: Sequence[str] | None, what: str) -> dict[str, Layer]:
    """Return layers by node, in graph order."""
    known = {layer.node: layer for layer in layers(program)}
    if nodes is None:
        return known
    if missing := [node for node in nodes if node not in known]:
        raise PassError(
            f"calibration expected linear or convolution nodes of {what}, found {', '.join(missing[:3])}; "
            f"known: {', '.join(list(known)[:8])}{', ...' if len(known) > 8 else ''}"
        )
    return {node: layer for node, layer in known.items() if node in set(nodes)}


# -- running ----------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs a program as far as the last chosen layer, and hands out what flows into the chosen ones."""

    def __init__(
        self, program: Program, chosen: Mapping[str, Layer], device: str | torch.device
    ) -> None:
        self.chosen = dict(chosen)
        weights = dict(program.module.named_parameters())
        self.kernels = {n: tuple(weights[c.weight].shape[2:]) for n, c in chosen.items()}
        self.device = torch.device(device)
        home = next(iter(weights.values()), torch.empty(0)).device
        module = program.module if home == self.device else program.clone().module.to(self.device)
        short, sources = _shortened(module, self.chosen)
        super().__init__(short)
        self.sources = sources
        self.hand_out: Callable[[str, Tensor], None] | None = None

    def record(self, inputs: tuple[Any, ...], hand_out: Callable[[str, Tensor], None]) -> None:
        """Run one batch; `hand_out` gets node and input of every chosen layer."""
        self.hand_out = hand_out
        self.run(*(x.to(self.device) if isinstance(x, Tensor) else x for x in inputs))
        self.hand_out = None

    def run_node(self, n: fx.Node) -> Any:
        node = self.sources.get(n)
        if node is None:
            return super().run_node(n)
        layer = self.chosen[node]
        source = n.args[0] if n.args else n.kwargs["input"]
        assert isinstance(source, fx.Node) and self.hand_out is not None
        x: Tensor = self.env[source]
        if layer.kind == "conv" and x.dim() == 1 + len(layer.stride):
            x = x.unsqueeze(0)
        self.hand_out(node, x)
        # The last layer's own output is not wanted.
        return None if node == next(reversed(self.chosen)) else super().run_node(n)


def _shortened(
    module: fx.GraphModule, chosen: Mapping[str, Layer]
) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """Return a module that shares every tensor with `module` and ends at the last chosen node, and those nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    last = next(reversed(chosen), None)
    for node in module.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.name == last:
            break
    graph.output(None)
    marked = {copy: node.name for node, copy in copies.items() if node.name in chosen}
    return fx.GraphModule(module, graph), marked


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode meanwhile; a graph from torch.export refuses the usual switch."""
    trained = [m for m in module.modules() if m.training]
    for one in trained:
        one.training = False
    try:
        yield
    finally:
        for one in trained:
            one.training = True


# -- adding up --------------------------------------------------------------------------------------------------


class _Sum:
    """Adds up the moments of one layer."""

    def __init__(
        self,
        layer: Layer,
        kernel: tuple[int, ...],
        dense: Layer | None,
        dense_kernel: tuple[int, ...],
        *,
        constant: bool,
    ) -> None:
        self.layer, self.kernel = layer, kernel
        self.dense, self.dense_kernel = dense, dense_kernel
        self.constant = constant
        self.count = 0
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(
        self, x: Tensor, dense: Tensor | None, limit: int | None, generator: torch.Generator
    ) -> None:
        """Add one batch."""
        pieces = _split(self.layer, x, self.kernel)
        dense_pieces: Iterable[Tensor | None] = [None] * len(pieces)
        if dense is not None:
            if len(dense) != len(x):
                raise PassError(
                    f"layer {self.layer.node}: the reference has an input of shape {tuple(dense.shape)}, the program "
                    f"one of {tuple(x.shape)}; expected as many samples"
                )
            dense_pieces = _split_like(self.layer, dense, pieces)
        total = used = 0
        gram = cross = None
        drawn = None
        if limit is not None:
            samples = sum(self._unfolded(p[:1]).shape[1] * len(p) for p in pieces)
            if samples > limit:
                drawn = torch.randperm(samples, generator=generator)[:limit].sort().values
        for piece, other in zip(pieces, dense_pieces, strict=True):
            rows = self._unfolded(piece)
            chosen = None
            if drawn is not None:
                inside = (drawn >= total) & (drawn < total + rows.shape[1])
                chosen = (drawn[inside] - total).to(rows.device)
            total += rows.shape[1]
            rows = _with_constant(rows if chosen is None else rows[:, chosen], self.constant)
            used += rows.shape[1]
            product = (rows.mT @ rows).double()
            gram = product if gram is None else gram + product
            if other is not None:
                assert self.dense is not None
                matched = _float(unfold(self.dense, other, self.dense_kernel))
                matched = matched if chosen is None else matched[:, chosen]
                product = (_with_constant(matched, self.constant).mT @ rows).double()
                cross = product if cross is None else cross + product
        scale = total / max(1, used)
        self.count += total
        if gram is not None:
            self.gram = gram * scale if self.gram is None else self.gram + gram * scale
        if cross is not None:
            self.cross = cross * scale if self.cross is None else self.cross + cross * scale

    def _unfolded(self, x: Tensor) -> Tensor:
        return _float(unfold(self.layer, x, self.kernel))

    def moments(self, dtype: torch.dtype) -> Moments:
        """Return the means."""
        assert self.gram is not None
        if not bool(self.gram.isfinite().all()):
            raise DataError(
                f"calibration found values that are not finite flowing into layer {self.layer.node}; "
                "look at the data and its normalisation"
            )
        n = max(1, self.count)
        return Moments(
            layer=self.layer,
            gram=(self.gram / n).to("cpu", dtype),
            count=self.count,
            cross=None if self.cross is None else (self.cross / n).to("cpu", dtype),
            has_constant=self.constant,
        )


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _with_constant(rows: Tensor, constant: bool) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0) if constant else rows


def _split(layer: Layer, x: Tensor, kernel: tuple[int, ...]) -> Sequence[Tensor]:
    """Cut a batch into pieces whose patches fit into a chunk; a piece holds at least one sample."""
    if layer.kind == "linear":
        return _rows(x).split(max(1, _CHUNK // x.shape[-1]))
    places = 1
    for size, (before, after), k, d, s in zip(
        x.shape[2:], layer.padding, kernel, layer.dilation, layer.stride, strict=True
    ):
        places *= (size + before + after - d * (k - 1) - 1) // s + 1
    per_image = places * x.shape[1] * math.prod(kernel)
    return x.split(max(1, _CHUNK // max(1, per_image)))


def _split_like(layer: Layer, x: Tensor, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    return (_rows(x) if layer.kind == "linear" else x).split([len(p) for p in pieces])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _padded(layer: Layer, x: Tensor) -> Tensor:
    sides = [side for pair in reversed(layer.padding) for side in pair]
    return F.pad(x, sides, mode=layer.padding_mode) if any(sides) else x


def _windows(layer: Layer, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return ``[batch, channels, *places, *kernel]``, a view."""
    for dim, (size, stride, dilation) in enumerate(
        zip(kernel, layer.stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x
