"""LSTM, GRU and RNN: weights are put into torch's order of gates, inside a torch module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphprune.onnx_import.builder import Builder, Call
from graphprune.onnx_import.operators import operator

__all__: list[str] = []

# Position of torch's gates (input, forget, cell, output; reset, update, new) among ONNX's.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
_ACTIVATIONS = {
    "LSTM": [["Sigmoid", "Tanh", "Tanh"]],
    "GRU": [["Sigmoid", "Tanh"]],
    "RNN": [["Tanh"], ["Relu"]],
}


@operator("LSTM", "GRU", "RNN")
def recurrent(b: Builder, call: Call) -> Any:
    """One recurrent layer, in one or both directions; outputs ``Y``, ``Y_h`` and ``Y_c``."""
    kind = call.node.op_type
    direction = call.attr("direction", "forward")
    count = 2 if direction == "bidirectional" else 1
    activations = [a.decode() if isinstance(a, bytes) else a for a in call.attr("activations", [])]
    chosen = activations[: len(activations) // count] or _ACTIVATIONS[kind][0]
    if chosen not in _ACTIVATIONS[kind] or (activations and activations != chosen * count):
        raise call.refuse(f"activations {activations}, which torch's {kind} does not have")
    if direction == "reverse" or call.attr("layout", 0) or call.has(4) or call.has(7):
        raise call.refuse("reverse direction alone, layout 1, lengths of sequences, or peepholes")
    if call.attr("clip") is not None or call.attr("input_forget", 0):
        raise call.refuse("clipped or coupled gates")
    if kind == "GRU" and not call.attr("linear_before_reset", 0):
        raise call.refuse("linear_before_reset=0; torch's GRU resets after the product")
    weight, state, bias = (call.known(i) if call.has(i) else None for i in (1, 2, 3))
    if weight is None or state is None or (call.has(3) and bias is None):
        raise call.refuse("its weights are computed")
    module = _module(kind, call, weight, state, bias, count, chosen)
    name = f"{kind.lower()}_{len(b.batched)}"
    b.root.add_module(name, module)
    initial = [call.tensor(i) for i in (5, 6) if call.has(i)]
    return _outputs(b, name, module, call.tensor(0), initial, kind, count, call)


def _module(
    kind: str,
    call: Call,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None,
    count: int,
    activations: list[str],
) -> nn.RNNBase:
    hidden = call.attr("hidden_size", state.shape[-1])
    options: dict[str, Any] = {"bias": bias is not None, "bidirectional": count == 2}
    if kind == "RNN":
        options["nonlinearity"] = activations[0].lower()
    module: nn.RNNBase = _KINDS[kind](weight.shape[-1], hidden, **options).to(weight.dtype).eval()
    order = _GATES[kind]

    def gates(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(len(order))
        return torch.cat([parts[i] for i in order])

    with torch.no_grad():
        for d in range(count):
            end = "_l0_reverse" if d else "_l0"
            getattr(module, f"weight_ih{end}").copy_(gates(weight[d]))
            getattr(module, f"weight_hh{end}").copy_(gates(state[d]))
            if bias is not None:
                half = bias.shape[1] // 2
                getattr(module, f"bias_ih{end}").copy_(gates(bias[d, :half]))
                getattr(module, f"bias_hh{end}").copy_(gates(bias[d, half:]))
    return module


def _outputs(
    b: Builder,
    name: str,
    module: nn.RNNBase,
    x: Any,
    initial: list[Any],
    kind: str,
    count: int,
    call: Call,
) -> tuple[Any, ...]:
    hidden = module.hidden_size
    state: tuple[Any, ...] = ()
    if initial:
        state = (tuple(initial),) if kind == "LSTM" else (initial[0],)
    found = b.call_module(name, module, x, *state)
    sequence, last = b.items(found, 2)
    length, batch = call.shape()[:2]
    split = b.call(torch.reshape, sequence, [length, batch, count, hidden])
    y = b.call(torch.permute, split, [0, 2, 1, 3])
    return (y, *(b.items(last, 2) if kind == "LSTM" else (last,)))
