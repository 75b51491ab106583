"""States of the random number generators of Python, numpy and torch: read, set, kept from harm."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["preserved", "read_state", "seed_all", "seeded", "write_state"]


def read_state() -> dict[str, Any]:
    """Return the state of every generator, made of what `torch.load` reads without running code."""
    version, numbers, python_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - users' transforms use it
    return {
        "python": (version, torch.tensor(numbers), python_gauss),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            gauss,
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def write_state(state: dict[str, Any]) -> None:
    """Set every generator to what `read_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def preserved() -> Iterator[None]:
    """Leave every generator as it was before."""
    state = read_state()
    try:
        yield
    finally:
        write_state(state)


@contextmanager
def seeded() -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds the generators of the CPU; they are as before when the context ends."""
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def reseed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        # torch.manual_seed would seed the GPU as well, whose generator drives dropout
        torch.default_generator.manual_seed(seed)

    try:
        yield reseed
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(state)
