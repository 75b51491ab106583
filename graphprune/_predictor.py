"""One way to call a module, a program or an ONNX Runtime session on batches of any size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from graphprune.errors import DataError
from graphprune.exported import flat_outputs
from graphprune.program import Program
from graphprune.runtime import Session

__all__ = ["Predictor"]


class Predictor:
    """Calls a model on batches of any size, with the module on the wanted device and in evaluation mode meanwhile."""

    def __init__(self, model: nn.Module | Program | Session, device: str) -> None:
        self.model = model
        self.device = torch.device(device)
        self.module = (
            model.module
            if isinstance(model, Program)
            else model
            if isinstance(model, nn.Module)
            else None
        )
        shape: tuple[int | None, ...] | None = None
        if isinstance(model, Session):
            shape = model.input_shapes[0]
        elif isinstance(model, Program):
            example = model.example_inputs[0].shape
            shape = (None, *example[1:]) if model.dynamic_batch else tuple(example)
        self.shape = shape

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        self.home: torch.device | None = None
        self.trained = False
        if self.module is not None:
            tensor = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
            self.home = tensor.device if tensor is not None else None
            # A captured program is in evaluation mode already, and one from torch.export refuses the switch.
            self.trained = not isinstance(self.model, Program) and self.module.training
            if self.trained:
                self.module.eval()
            if self.home is not None and self.home != self.device:
                self.module.to(self.device)
        return self.predict

    def __exit__(self, *_: object) -> None:
        if self.module is not None:
            if self.home is not None and self.home != self.device:
                self.module.to(self.home)
            if self.trained:
                self.module.train()

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the logits of a batch of any size."""
        if self.shape is not None:
            wanted, found = self.shape[1:], tuple(inputs.shape[1:])
            if len(wanted) != len(found) or any(
                w not in (None, f) for w, f in zip(wanted, found, strict=True)
            ):
                raise DataError(
                    f"the model takes samples of shape {_shape_text(wanted)}, the data gives {_shape_text(found)}; "
                    "a data option such as size=N may help"
                )
        fixed = self.shape[0] if self.shape is not None else None
        if fixed is None or len(inputs) == fixed:
            return self.call(inputs)
        rows = []
        for start in range(0, len(inputs), fixed):
            part = inputs[start : start + fixed]
            missing = fixed - len(part)
            filled = (
                torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            )
            rows.append(self.call(filled)[: len(part)])
        return torch.cat(rows)

    def call(self, inputs: Tensor) -> Tensor:
        """Return the first output for a batch that the model takes as it is."""
        if self.module is None:
            return cast("Session", self.model).run(inputs)[0]
        return flat_outputs(self.module(inputs.to(self.device)))[0]


def _shape_text(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)
