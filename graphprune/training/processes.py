"""accelerate: where to compute, in which precision, and with how many processes.

A run started by ``accelerate launch`` or ``torchrun`` trains with all its processes. Everything else that graphprune
does is the same in each of them; only the first one writes and prints (`graphprune.devices`).
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Precision", "accelerated", "resolve_precision"]

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_precision(precision: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """Return what to compute in: ``auto`` is bfloat16 where the device multiplies matrices in it, else float32.

    That is a GPU of compute capability 8.0 and more, and a CPU with AMX or AVX-512 instructions for bfloat16.
    """
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        is_fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if is_fast else "float32"


@contextmanager
def accelerated(
    device: str, precision: Literal["float32", "bfloat16"], *, may_skip_parameters: bool = False
) -> Iterator[Accelerator]:
    """Yield an Accelerator of this device and precision.

    accelerate keeps one state per process, which is put back when the context ends: an Accelerator of the caller's
    own goes on as before, and the next run may choose another device or precision.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: What matrices are multiplied in.
        may_skip_parameters: Whether a loss may leave parameters without gradients, which several processes must know.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states: list[Any] = [PartialState, AcceleratorState, GradientState]
    before = [dict(state._shared_state) for state in states]
    had_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    for state in states:
        state._shared_state.clear()
    kind = torch.device(device)
    here = (
        torch.cuda.device(kind) if kind.type == "cuda" and kind.index is not None else nullcontext()
    )
    try:
        with here:
            yield Accelerator(
                cpu=kind.type == "cpu",
                # The program is in its place; moving its training form to "cpu:0" would copy the buffers they share.
                device_placement=False,
                mixed_precision="bf16" if precision == "bfloat16" else "no",
                kwargs_handlers=[
                    DistributedDataParallelKwargs(find_unused_parameters=may_skip_parameters)
                ],
            )
    finally:
        for state, shared in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(shared)
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and not had_group
        ):
            atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
