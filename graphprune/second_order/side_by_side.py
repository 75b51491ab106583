"""Side by side: a program and the dense one run together, layer by layer, so that each layer can be refitted in turn.

All batches stand at the same node. Before a chosen layer runs, the caller gets the second moments of what flows into it
in both programs, and may write other weights into it; what comes after sees the outputs of the new weights. One pass
over data serves all layers, at the price of holding the live activations of all batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from graphprune.program import Program
from graphprune.second_order.calibration import Moments, MomentSum
from graphprune.second_order.layers import layers

__all__ = ["walk"]


def walk(
    program: Program,
    reference: Program,
    batches: Sequence[tuple[Tensor, ...]],
    nodes: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    max_patches: int | None = None,
) -> Iterator[Moments]:
    """Yield the moments of every chosen layer, `cross` against the reference included, before the layer runs.

    Args:
        program: Runs with the weights that it has when a layer is reached; on `device` as long as the walk lasts.
        reference: The same graph with other weights, which must not share tensors with `program`.
        batches: One tensor for each input of the graph.
        nodes: The layers, by node; they are yielded in graph order.
        device: Where to compute; the moments come back to the CPU.
        max_patches: Look at this many samples of a batch at most, drawn at random with a fixed seed.
    """
    chosen = {layer.node: layer for layer in layers(program) if layer.node in set(nodes)}
    twins = {layer.node: layer for layer in layers(reference)}
    generator = torch.Generator().manual_seed(0)
    now = _Runner(program, batches, device)
    dense = _Runner(reference, batches, device)
    with torch.no_grad():
        for node, twin in zip(now.nodes, dense.nodes, strict=True):
            if layer := chosen.pop(node.name, None):
                total = MomentSum(
                    layer,
                    twins[node.name],
                    constant=layer.bias is not None,
                    limit=max_patches,
                    generator=generator,
                )
                for x, y in zip(now.inputs(node), dense.inputs(twin), strict=True):
                    total.add(x, y)
                yield total.moments(torch.float64)
                if not chosen:
                    return
            now.run(node)
            dense.run(twin)


class _Runner(fx.Interpreter):
    """Runs one node after the other, each on all batches, and forgets what no later node reads."""

    def __init__(
        self, program: Program, batches: Sequence[tuple[Tensor, ...]], device: str | torch.device
    ) -> None:
        super().__init__(program.module.to(device))
        self.nodes = list(program.module.graph.nodes)
        self.envs: list[dict[fx.Node, object]] = [{} for _ in batches]
        self.feeds = [iter([x.to(device) for x in inputs]) for inputs in batches]

    def inputs(self, node: fx.Node) -> Iterator[Tensor]:
        """Yield what flows into `node`, batch by batch."""
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        for env in self.envs:
            value = env[source]
            assert isinstance(value, Tensor)
            yield value

    def run(self, node: fx.Node) -> None:  # type: ignore[override]
        """Run a node on all batches."""
        for env, feed in zip(self.envs, self.feeds, strict=True):
            self.env, self.args_iter = env, feed
            env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                del env[dead]
