"""Calibration: second moments of what flows into each linear and convolution layer, from one pass over data.

A layer computes ``z = W y`` for every sample ``y`` of its input (`graphprune.second_order.layers`). All that
layer-wise second-order pruning needs of the data is, per convolution group,

    gram  = (1/n) sum_j y_j y_j^T                 cross = (1/n) sum_j ydense_j y_j^T

where ``y`` ends in a constant 1 for a layer with a bias. Batches are streamed once: a sum over a chunk of patches is
taken in the precision of the activations (float32; float64 for a program of doubles), and chunks are added up in
float64. Nothing else is kept, and the graph runs no further than the last layer that is asked for.
The overlapping patches of a convolution of stride 1 are not even written down (`graphprune.second_order.shifted`).

Source: Dong, Chen and Pan 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", section
3.3: one matrix Psi per layer serves every output unit, and each patch of a convolution is one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.errors import DataError, PassError
from graphprune.program import Program
from graphprune.second_order.layers import Layer, layers, padded, patches, unfold
from graphprune.second_order.shifted import ShiftedProducts, pays_off

__all__ = ["Layer", "MomentSum", "Moments", "collect", "layers", "unfold"]

_CHUNK = 1 << 22
"""Elements of a chunk of patches: 16 MiB in float32."""


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
    if max_patches is not None and max_patches < 1:
        raise PassError(f"expected max_patches of at least 1, found {max_patches}")
    chosen = _chosen(program, nodes, "the program")
    recorder = _Recorder(program, chosen, device)
    dense = None
    if reference is not None:
        dense = _Recorder(reference, _chosen(reference, list(chosen), "the reference"), device)
    generator = torch.Generator().manual_seed(0)
    sums = {
        node: MomentSum(
            layer,
            dense.chosen[node] if dense else None,
            constant=bias and layer.bias is not None,
            limit=max_patches,
            generator=generator,
        )
        for node, layer in chosen.items()
    }
    num_batches = 0
    with _evaluating(program.module), _evaluating((reference or program).module):
        for batch in batches:
            num_batches += 1
            inputs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            seen: dict[str, Tensor] = {}
            if dense is not None:
                dense.record(inputs, seen.__setitem__)

            def add(node: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
                sums[node].add(x, seen.pop(node, None))

            recorder.record(inputs, add)
    if not num_batches and chosen:
        raise DataError("calibration expected at least one batch of samples, found none")
    return {node: total.moments(dtype) for node, total in sums.items()}


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
        self.device = torch.device(device)
        home = next((t.device for _, t in program.named_tensors()), self.device)
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
        assert isinstance(source, fx.Node)
        assert self.hand_out is not None
        x: Tensor = self.env[source]
        if layer.kind == "conv" and x.dim() == 1 + len(layer.stride):
            x = x.unsqueeze(0)
        self.hand_out(node, x)
        # The last layer's own output is not wanted.
        return None if node == next(reversed(tuple(self.chosen))) else super().run_node(n)


def _shortened(
    module: fx.GraphModule, chosen: Mapping[str, Layer]
) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """Return a module that shares every tensor with `module` and ends at the last chosen node, and those nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    last = next(reversed(tuple(chosen)), None)
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


class MomentSum:
    """Adds up the moments of one layer, without the constant, which needs the sums of the samples only."""

    def __init__(
        self,
        layer: Layer,
        dense: Layer | None,
        *,
        constant: bool,
        limit: int | None,
        generator: torch.Generator,
    ) -> None:
        self.layer, self.dense = layer, dense
        self.constant = constant
        self.limit, self.generator = limit, generator
        self.count = 0
        self.gram = _Product()
        self.cross = _Product()

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        """Add one batch."""
        x, dense = _float(x), None if dense is None else _float(dense)
        if self.layer.kind == "linear":
            x = x.reshape(-1, x.shape[-1])
            dense = None if dense is None else dense.reshape(-1, dense.shape[-1])
        if dense is not None and (len(dense), dense.shape[2:]) != (len(x), x.shape[2:]):
            raise PassError(
                f"layer {self.layer.node}: the reference has an input of shape {tuple(dense.shape)}, the program "
                f"one of {tuple(x.shape)}; expected as many samples"
            )
        places = _places(self.layer, x)
        if not len(x) * places:
            raise DataError(f"calibration found a batch without samples at layer {self.layer.node}")
        self.count += len(x) * places
        if self._is_shifted(x):
            self._add_shifted(x, dense)
        else:
            self._add_samples(x, dense, places)

    def moments(self, dtype: torch.dtype) -> Moments:
        """Return the means."""
        gram = self.gram.mean(self.count, constant=self.constant).to("cpu", dtype)
        if not bool(gram.isfinite().all()):
            raise DataError(
                f"calibration found values that are not finite flowing into layer {self.layer.node}; "
                "look at the data and its normalisation"
            )
        cross = None
        if self.dense is not None:
            cross = self.cross.mean(self.count, constant=self.constant).to("cpu", dtype)
        return Moments(
            layer=self.layer,
            gram=gram,
            count=self.count,
            cross=cross,
            has_constant=self.constant,
        )

    def _add_samples(self, x: Tensor, dense: Tensor | None, places: int) -> None:
        """Write the samples down, some at a time."""
        samples = len(x) * places
        drawn, scale = None, 1.0
        if self.limit is not None and samples > self.limit:
            drawn = torch.randperm(samples, generator=self.generator)[: self.limit].sort().values
            scale = samples / self.limit  # a few samples that stand for all count more
        step = max(1, _CHUNK // (places * math.prod(self.layer.kernel_size) * x.shape[1]))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            own = None
            if drawn is not None:
                own = drawn[(drawn >= first * places) & (drawn < (first + step) * places)]
                own = (own - first * places).to(x.device)
            rows = _samples(self.layer, x[part], own)
            self.gram.add(rows, rows, scale)
            if dense is not None:
                others = _samples(self.dense or self.layer, dense[part], own)
                self.cross.add(others, rows, scale)

    def _is_shifted(self, x: Tensor) -> bool:
        """Whether products of shifted images serve, and are worth their while."""
        layer, dense = self.layer, self.dense or self.layer
        if layer.kind == "linear" or self.limit is not None or layer.groups > 1 or x.dim() != 4:
            return False
        if {*layer.stride} != {1} or _geometry(layer) != _geometry(dense):
            return False
        sizes = [n + sum(p) for n, p in zip(x.shape[2:], layer.padding, strict=True)]
        # Only a border of zeros costs nothing.
        image = x.shape[2:] if layer.padding_mode == "constant" else sizes
        return pays_off(layer.kernel_size, layer.dilation, image, _output(layer, sizes))

    def _add_shifted(self, x: Tensor, dense: Tensor | None) -> None:
        """Add up products of shifted images."""
        layer = self.layer
        zeros = layer.padding_mode == "constant"
        sides = layer.padding if zeros else ((0, 0), (0, 0))
        arguments: Any = (layer.kernel_size, layer.dilation, sides)
        products, crossed = ShiftedProducts(*arguments), ShiftedProducts(*arguments)
        step = max(1, _CHUNK // (2 * math.prod(x.shape[1:])))
        for first in range(0, len(x), step):
            images = x[first : first + step] if zeros else padded(layer, x[first : first + step])
            products.add(images)
            if dense is not None:
                others = dense[first : first + step]
                crossed.add(others if zeros else padded(layer, others), images)
        own = _sum_of_patches(layer, x)
        self.gram.add_sums(products.total()[None], own, own)
        if dense is not None:
            self.cross.add_sums(crossed.total()[None], _sum_of_patches(layer, dense), own)


class _Product:
    """Sums over samples of ``left right^T``, of left and of right, in float64."""

    def __init__(self) -> None:
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, left: Tensor, right: Tensor, scale: float) -> None:
        """Add samples, ``[groups, samples, features]``."""
        product = (left.mT @ right).double() * scale
        own = left.sum(1, dtype=torch.float64) * scale
        other = own if left is right else right.sum(1, dtype=torch.float64) * scale
        self.add_sums(product, own, other)

    def add_sums(self, product: Tensor, left: Tensor, right: Tensor) -> None:
        """Add sums, ``[groups, features, features]`` and twice ``[groups, features]``."""
        if self.sums is None:
            self.sums = product, left, right
        else:
            self.sums = self.sums[0] + product, self.sums[1] + left, self.sums[2] + right

    def mean(self, count: int, *, constant: bool) -> Tensor:
        """Return the mean product, where asked for with the constant 1 as last row and column."""
        assert self.sums is not None
        product, left, right = (total / count for total in self.sums)
        if not constant:
            return product
        right = F.pad(right, (0, 1), value=1.0)
        return torch.cat([torch.cat([product, left[..., None]], 2), right[:, None]], 1)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _geometry(layer: Layer) -> tuple[object, ...]:
    return (
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        layer.padding,
        layer.padding_mode,
        layer.groups,
    )


def _output(layer: Layer, sizes: Sequence[int]) -> list[int]:
    """Return the output's spatial sizes for those of the padded input."""
    return [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in zip(sizes, layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ]


def _places(layer: Layer, x: Tensor) -> int:
    """Return the number of samples that one element of the batch makes."""
    return math.prod(
        _output(layer, [n + sum(p) for n, p in zip(x.shape[2:], layer.padding, strict=True)])
    )


def _samples(layer: Layer, x: Tensor, chosen: Tensor | None) -> Tensor:
    """Return all samples or the chosen ones, ``[groups, samples, features]``."""
    if chosen is None:
        return unfold(layer, x)
    if layer.kind == "linear":
        return x[chosen][None]
    found = patches(layer, padded(layer, x), layer.kernel_size)
    space = len(layer.kernel_size)
    sizes = (len(found), *found.shape[2 : 2 + space])
    image, *places = torch.unravel_index(chosen, sizes)
    index: Any = (image, slice(None), *places)
    drawn = found[index]  # [samples, channels, *kernel]
    return drawn.reshape(len(chosen), layer.groups, -1).transpose(0, 1)


def _sum_of_patches(layer: Layer, x: Tensor) -> Tensor:
    """Return the sum of the patches of a batch of images, ``[1, features]``: the patches of their sum."""
    # Two steps: a sum that converts what it adds is slow. Few images are added up in single precision.
    parts = torch.stack([part.sum(0) for part in x.split(64)])
    total = padded(layer, parts.sum(0, keepdim=True, dtype=torch.float64))
    return patches(layer, total, layer.kernel_size).sum((2, 3)).flatten(1)
