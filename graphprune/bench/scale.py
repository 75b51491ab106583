"""How analysis grows: decoders of 8 billion parameters and less, on the meta device, where tensors have shapes only."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.capture import capture
from graphprune.errors import UsageError
from graphprune.groups import analyze

__all__ = ["DECODERS", "Measurement", "build", "measure", "to_markdown"]

DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "qwen": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}
"""Name -> class of the configuration in transformers, and the widths of the model of 8 billion parameters."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one model took."""

    model: str
    layers: int
    params: int
    groups: int
    capture_s: float
    """Wall time from the module to the graph."""
    analyze_s: float
    """Wall time from the graph to groups and costs."""
    processor_s: float
    """Processor time of both."""
    memory_gib: float
    """Peak memory of the process, libraries included."""


def build(name: str, layers: int) -> nn.Module:
    """Return a decoder on the meta device.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "the decoders come from transformers: pip install 'graphprune[transformers]'"
        ) from error
    kind, options = DECODERS[name]
    config = getattr(transformers, kind)(num_hidden_layers=layers, **options)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def measure(name: str, layers: int) -> Measurement:
    """Capture and analyse a decoder in a process of its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, layers))


def _measure(name: str, layers: int) -> Measurement:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = build(name, layers)
    tokens = torch.arange(16).view(1, 16)
    before, started = time.process_time(), time.perf_counter()
    program = capture(model, tokens)
    captured = time.perf_counter()
    groups = analyze(program)
    params = groups.cost.total().params
    ended = time.perf_counter()
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return Measurement(
        model=name,
        layers=layers,
        params=params,
        groups=len(groups),
        capture_s=captured - started,
        analyze_s=ended - captured,
        processor_s=time.process_time() - before,
        memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale,
    )


def to_markdown(rows: Sequence[Measurement], *, command: str, machine: str) -> str:
    """Return the document.

    Args:
        rows: What to show, in this order.
        command: What makes the document again.
        machine: What it was measured on.
    """
    lines = [
        "# Scale",
        "",
        f"    {command}",
        "",
        f"{machine}; one thread. Decoders built from their configurations on the meta device, captured with 16 tokens,",
        "and analysed: graph, dependency groups, constraints, costs. Each in a process of its own; memory is its peak,",
        "libraries included. Processor seconds leave out what other programs on the machine took.",
        "",
        "| model | layers | parameters (G) | groups | capture s | analysis s | processor s | per layer | memory GiB |",
        "|---|" + "--:|" * 8,
    ]
    lines += [
        f"| {r.model} | {r.layers} | {r.params / 1e9:.2f} | {r.groups} | {r.capture_s:.1f} | {r.analyze_s:.1f} | "
        f"{r.processor_s:.1f} | {r.processor_s / r.layers:.2f} | {r.memory_gib:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"
