"""Long runs on a CPU are compiled: norms, activations and sums become one sweep over memory each.

torch.compile takes half a minute to two minutes, and then a step of a small convolutional network takes a seventh to
a quarter less. Where there is no compiler, or a module cannot be compiled, it runs as it is.
``TORCH_COMPILE_DISABLE=1`` in the environment switches this off.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch_config

__all__ = ["MANY_STEPS", "Compiled", "compiled"]

MANY_STEPS = 1000
"""From here on, compiling for the CPU is worth its time."""


def compiled(
    module: nn.Module, *, device: torch.device, steps: int, is_frozen: bool = False
) -> nn.Module:
    """Return `module`, compiled if it is going to be called often enough on a CPU that has a compiler.

    Args:
        module: Always called with inputs of the same shapes.
        device: Where it computes.
        steps: How often the whole run calls it, one that goes on from a checkpoint counted from its start: both then
            compute the same.
        is_frozen: Whether its parameters never change, and may become constants.
    """
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++"))
    if device.type != "cpu" or steps < MANY_STEPS or not has_compiler:
        return module
    return Compiled(module, is_frozen=is_frozen)


class Compiled(nn.Module):
    """Calls a module compiled, or as it is once compiling has failed."""

    def __init__(self, module: nn.Module, *, is_frozen: bool = False) -> None:
        super().__init__()
        self.module = module
        self.run: Callable[..., Any] = torch.compile(
            module, dynamic=False, options={"freezing": is_frozen}
        )
        self.has_run = False

    def forward(self, *inputs: Tensor) -> Any:
        """Call whichever works."""
        if self.has_run:
            return self.run(*inputs)
        self.has_run = True
        try:
            # The backward pass is compiled at once, so that it cannot fail later.
            with functorch_config.patch(force_non_lazy_backward_lowering=True):
                return self.run(*inputs)
        except TorchDynamoException:
            self.run = self.module
            return self.run(*inputs)
