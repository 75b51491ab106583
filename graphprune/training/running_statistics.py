"""Running statistics of batch norms, estimated anew for weights that did not come from a step of training.

For batch norm b and batches i of n_i samples with mean m_i and unbiased variance v_i per channel,

    running_mean = sum(n_i m_i) / sum(n_i)        running_var = sum(n_i v_i) / sum(n_i)

the cumulative average that torch keeps with ``momentum=None``. Every batch norm normalises with the batch's own
statistics meanwhile, so that later ones see what earlier ones will give; everything else, dropout too, stays in
evaluation mode. Both dialects are run node by node, so no module changes its mode.

Source, for averages of weights: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
Generalization", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import DataError
from graphprune.training.batch_norm import batch_norm, synchronised_batch_norm
from graphprune.training.forms import BATCH_NORMS

__all__ = ["BatchStatistics", "RunningStatistics"]


class RunningStatistics:
    """The running statistics of every batch norm in a graph, as averages over the batches that it is shown."""

    def __init__(self, module: fx.GraphModule, *, synchronised: bool = False) -> None:
        """Look for the batch norms of `module`, which is in evaluation mode.

        Args:
            module: Its buffers are overwritten by `write`.
            synchronised: Whether other processes look at as many samples at the same time, and all of them count.
        """
        self._sites = _sites(module)
        self._run = _Run(module, self._sites, synchronised=synchronised)

    @property
    def has_batch_norms(self) -> bool:
        """Whether there is a batch norm with running statistics."""
        return bool(self._sites)

    def __len__(self) -> int:
        """Return the number of pairs of running statistics that were estimated."""
        return len(self._run.totals)

    @torch.no_grad()
    def look(self, *inputs: Tensor) -> Any:
        """Run the graph, count what flows into its batch norms, and return its outputs.

        Raises:
            DataError: A batch norm sees one value per channel, which has no variance.
        """
        self._run.samples = len(inputs[0])
        return self._run.run(*inputs)

    @torch.no_grad()
    def write(self) -> bool:
        """Store the averages in the module; return whether any number changed."""
        changed = False
        for total in self._run.totals.values():
            for buffer, summed in (
                (total.running_mean, total.mean),
                (total.running_var, total.var),
            ):
                average = (summed / total.samples).to(buffer.dtype)
                changed = changed or not torch.equal(average, buffer)
                buffer.copy_(average)
        return changed


class BatchStatistics(nn.Module):
    """A graph whose batch norms normalise with the batch's own statistics, and forget them."""

    def __init__(self, module: fx.GraphModule) -> None:
        """Take `module`, in evaluation mode; it stays as it is."""
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """Return the outputs.

        Raises:
            DataError: A batch norm sees one value per channel, which has no variance.
        """
        return RunningStatistics(self.module).look(*inputs)


@dataclass(kw_only=True)
class _Total:
    """Sums over batches, in float64, for one pair of running statistics."""

    running_mean: Tensor
    running_var: Tensor
    mean: Tensor = field(init=False)
    var: Tensor = field(init=False)
    samples: int = 0

    def __post_init__(self) -> None:
        self.mean = torch.zeros_like(self.running_mean, dtype=torch.float64)
        self.var = torch.zeros_like(self.running_var, dtype=torch.float64)

    def add(self, mean: Tensor, var: Tensor, samples: int) -> None:
        self.mean += samples * mean.double()
        self.var += samples * var.double()
        self.samples += samples


class _Run(fx.Interpreter):
    """Runs a graph with its batch norms as they are in training."""

    def __init__(
        self,
        module: fx.GraphModule,
        sites: dict[fx.Node, dict[str, Any]],
        *,
        synchronised: bool,
    ) -> None:
        super().__init__(module)
        self.sites = sites
        self.synchronised = synchronised
        self.normalise = synchronised_batch_norm if synchronised else batch_norm
        self.totals: dict[int, _Total] = {}
        self.samples = 0

    def run_node(self, n: fx.Node) -> Any:
        call = self.sites.get(n)
        if call is None:
            return super().run_node(n)
        given = {k: self.env[v] if isinstance(v, fx.Node) else v for k, v in call.items()}
        x, running_mean, running_var = (
            given[name] for name in ("input", "running_mean", "running_var")
        )
        if not self.synchronised and x.numel() // x.shape[1] < 2:
            raise DataError(
                "the statistics of a batch norm need more than 1 value per channel; raise batch_size"
            )
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        # Replaced altogether: momentum 1.
        result = self.normalise(
            x,
            mean,
            var,
            weight=given.get("weight"),
            bias=given.get("bias"),
            momentum=1.0,
            eps=given.get("eps", 1e-5),
        )
        # A module that is called twice has one pair of statistics, and so has a buffer that two nodes read.
        total = self.totals.setdefault(
            running_mean.data_ptr(), _Total(running_mean=running_mean, running_var=running_var)
        )
        total.add(mean, var, self.samples)
        has_several = n.op == "call_function" and "training" not in BATCH_NORMS[n.target]
        return (result, mean.new_empty(0), mean.new_empty(0)) if has_several else result


def _sites(module: fx.GraphModule) -> dict[fx.Node, dict[str, Any]]:
    """Return the arguments of every node that normalises with running statistics kept in the module."""
    found = {}
    for node in module.graph.nodes:
        call: dict[str, Any] = {}
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, _BatchNorm):
                names = ("running_mean", "running_var", "weight", "bias", "eps")
                call = {name: getattr(layer, name) for name in names}
                call["input"] = node.args[0] if node.args else node.kwargs["input"]
        elif node.op == "call_function" and node.target in BATCH_NORMS:
            call = {**dict(zip(BATCH_NORMS[node.target], node.args, strict=False)), **node.kwargs}
        if call.get("running_mean") is not None and call.get("running_var") is not None:
            found[node] = call
    return found
