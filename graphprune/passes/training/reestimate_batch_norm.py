"""Re-estimates the running statistics of batch norms from data, because a cut shifts what flows into them.

For batch norm b and batches i of n_i samples with mean m_i and unbiased variance v_i per channel,

    running_mean = sum(n_i m_i) / sum(n_i)        running_var = sum(n_i v_i) / sum(n_i)

the cumulative average that torch keeps with ``momentum=None``. Every batch norm normalises with the batch's own
statistics meanwhile, so that later ones see what earlier ones will give; everything else, dropout too, stays in
evaluation mode. Both dialects are run node by node, so no module changes its mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import DataError
from graphprune.pipeline import Context, Pass, TrainingResult
from graphprune.program import Program

__all__ = ["ReestimateBatchNorm"]


@dataclass(frozen=True, kw_only=True)
class ReestimateBatchNorm(Pass):
    """Replace every batch norm's running mean and variance by their average over training batches.

    The program that comes in stays as it is. The same data and seed give the same statistics.
    """

    name: ClassVar[str] = "reestimate-batch-norm"

    num_samples: int = 1024
    """How many training samples to use, drawn at random."""
    batch_size: int = 128
    """Samples in a batch; at least 2, because one sample has no variance."""

    def run(self, program: Program, context: Context) -> TrainingResult:
        """Estimate, and return a clone with the new statistics."""
        if not _sites(program.module):
            return TrainingResult(program=program, modified=False, metrics={"batch_norms": 0.0})
        if context.data is None:
            raise DataError(f"{self.name} expected training data, found none; give data= or --data")
        if self.num_samples < 2 or self.batch_size < 2:
            raise DataError(
                f"{self.name} needs at least 2 samples in a batch, found "
                f"num_samples={self.num_samples} batch_size={self.batch_size}"
            )
        clone = program.clone()
        home = next((t.device for _, t in clone.named_tensors()), torch.device("cpu"))
        clone.module.to(context.device)
        estimator = _Estimator(clone.module, _sites(clone.module))
        loader = context.data.train(self.batch_size, seed=context.seed, limit=self.num_samples)
        samples = 0
        with torch.no_grad(), context.progress.task("re-estimate batch norm", len(loader)) as task:
            for inputs, _ in loader:
                # A last batch of one sample has no variance; the ones before it have been counted.
                if len(inputs) > 1 or not samples:
                    estimator.weight = len(inputs)
                    estimator.run(inputs.to(context.device))
                    samples += len(inputs)
                task.advance()
            modified = estimator.write()
        clone.module.to(home)
        metrics = {"batch_norms": float(len(estimator.totals)), "samples": float(samples)}
        return TrainingResult(
            program=clone if modified else program, modified=modified, metrics=metrics
        )


@dataclass(frozen=True, kw_only=True)
class _BatchNormCall:
    """What a batch norm node computes with; every value may be a node of the graph or the thing itself."""

    input: Any
    weight: Any
    bias: Any
    mean: Any
    var: Any
    eps: float
    several_results: bool = False


@dataclass(kw_only=True)
class _Total:
    """Sums over batches, in float64, for one pair of running statistics."""

    running_mean: Tensor
    running_var: Tensor
    mean: Tensor = field(init=False)
    var: Tensor = field(init=False)
    weight: int = 0

    def __post_init__(self) -> None:
        self.mean = torch.zeros_like(self.running_mean, dtype=torch.float64)
        self.var = torch.zeros_like(self.running_var, dtype=torch.float64)

    def add(self, inputs: Tensor, weight: int) -> None:
        dims = [dim for dim in range(inputs.dim()) if dim != 1]
        if inputs.numel() // inputs.shape[1] < 2:
            raise DataError(
                "re-estimating batch norm needs more than 1 value per channel; raise batch_size"
            )
        var, mean = torch.var_mean(inputs.double(), dims, correction=1)
        self.mean += weight * mean
        self.var += weight * var
        self.weight += weight


class _Estimator(fx.Interpreter):
    """Runs a graph with batch norms in training mode, and keeps the statistics of what flows into them."""

    def __init__(self, module: fx.GraphModule, sites: dict[fx.Node, _BatchNormCall]) -> None:
        super().__init__(module)
        self.sites = sites
        self.totals: dict[int, _Total] = {}
        self.weight = 0

    def run_node(self, n: fx.Node) -> Any:
        call = self.sites.get(n)
        if call is None:
            return super().run_node(n)
        inputs, weight, bias, mean, var = (
            self.env[value] if isinstance(value, fx.Node) else value
            for value in (call.input, call.weight, call.bias, call.mean, call.var)
        )
        # A module that is called twice has one pair of statistics, and so has a buffer that two nodes read.
        total = self.totals.setdefault(mean.data_ptr(), _Total(running_mean=mean, running_var=var))
        total.add(inputs, self.weight)
        result = F.batch_norm(inputs, None, None, weight, bias, training=True, eps=call.eps)
        return (result, mean.new_empty(0), mean.new_empty(0)) if call.several_results else result

    def write(self) -> bool:
        """Store the averages in the module; return whether any number changed."""
        changed = False
        for total in self.totals.values():
            for buffer, summed in (
                (total.running_mean, total.mean),
                (total.running_var, total.var),
            ):
                average = (summed / total.weight).to(buffer.dtype)
                changed = changed or not torch.equal(average, buffer)
                buffer.copy_(average)
        return changed


def _sites(module: fx.GraphModule) -> dict[fx.Node, _BatchNormCall]:
    """Return every node that normalises with running statistics kept in the module."""
    found: dict[fx.Node, _BatchNormCall] = {}
    for node in module.graph.nodes:
        call = None
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, _BatchNorm):
                call = _of_module(node, layer)
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            call = _FUNCTIONS[node.target](node)
        if call is not None and call.mean is not None and call.var is not None:
            found[node] = call
    return found


def _of_module(node: fx.Node, layer: _BatchNorm) -> _BatchNormCall:
    return _BatchNormCall(
        input=node.args[0] if node.args else node.kwargs["input"],
        weight=layer.weight,
        bias=layer.bias,
        mean=layer.running_mean,
        var=layer.running_var,
        eps=layer.eps,
    )


def _of_functional(node: fx.Node) -> _BatchNormCall:
    names = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return _BatchNormCall(
        input=given["input"],
        weight=given.get("weight"),
        bias=given.get("bias"),
        mean=given["running_mean"],
        var=given["running_var"],
        eps=given.get("eps", 1e-5),
    )


def _of_aten(node: fx.Node) -> _BatchNormCall:
    # (input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    arguments: tuple[Any, ...] = node.args
    image, weight, bias, mean, var, _, _, eps, *_ = arguments
    return _BatchNormCall(input=image, weight=weight, bias=bias, mean=mean, var=var, eps=eps)


def _of_aten_inference(node: fx.Node) -> _BatchNormCall:
    # (input, weight, bias, running_mean, running_var, momentum, eps) -> (output, mean, inverse deviation)
    arguments: tuple[Any, ...] = node.args
    image, weight, bias, mean, var, _, eps = arguments
    return _BatchNormCall(
        input=image, weight=weight, bias=bias, mean=mean, var=var, eps=eps, several_results=True
    )


_FUNCTIONS: dict[Any, Callable[[fx.Node], _BatchNormCall]] = {
    F.batch_norm: _of_functional,
    torch.ops.aten.batch_norm.default: _of_aten,
    torch.ops.aten._native_batch_norm_legit_no_training.default: _of_aten_inference,
}
