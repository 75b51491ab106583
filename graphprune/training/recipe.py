"""How a training goes: its options as data, and what a pass may add to the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields
from typing import Any, cast, get_args

from torch import Tensor, nn

from graphprune.data import DataSource
from graphprune.errors import UsageError
from graphprune.program import Program, Slices
from graphprune.training.batches import Augment, shared_batch_size
from graphprune.training.distill import must_be_comparable
from graphprune.training.mixup import must_keep_neighbours
from graphprune.training.optim import build_optimizer, check_optim
from graphprune.training.processes import Precision
from graphprune.training.task import Task

__all__ = ["Hook", "Moment", "Recipe", "Smaller", "trained_parameters"]

DISTILL = 0.5
"""Share of the loss that asks for the dense program's logits, unless a pass is told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a training goes; the defaults are those of fine-tuning a small image classifier."""

    epochs: int
    """Passes over the training set."""
    batch_size: int = 128
    """Samples in a batch, over all processes."""
    optimizer: str = "sgd"
    """A class of torch.optim, or package.module:Class, with options in braces; sgd has Nesterov momentum 0.9 unless
    told otherwise."""
    lr: float | None = None
    """Learning rate; None: 0.02 for sgd, torch's own default for others."""
    weight_decay: float = 5e-4
    """Weight decay of everything but biases and norms."""
    schedule: str = "cosine"
    """The learning rate over the run: cosine, constant, or a class of torch.optim.lr_scheduler."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    distill: float = 0.0
    """Share of the loss that compares with the teacher's outputs."""
    temperature: float = 4.0
    """Temperature at which logits are compared."""
    mirror: bool = False
    """The teacher looks at mirror images too, and the mean of its logits counts; not for letters and digits."""
    features: float = 0.0
    """Weight of the distance from where the teacher attends to, stage by stage."""
    average: float = 0.0
    """Decay of a moving average of the weights, which takes their place; norms are settled on it. 0: no average."""
    augment: Augment = "auto"
    """How training images are varied; auto: crop-flip for small colour images, else none."""
    mixup: float = 0.0
    """Each image is blended with another, by a share from Beta(mixup, mixup); 0: images stay as they are."""
    precision: Precision = "auto"
    """What to compute in; auto: bfloat16 where the device is fast in it."""
    workers: int = 0
    """Processes that load data; 0: the training process itself."""
    checkpoint_seconds: float = 60.0
    """How often the state is kept between the ends of epochs."""

    @classmethod
    def of(cls, options: object, task: Task) -> Recipe:
        """Return the recipe that a pass has as options of the same names; those that it lacks stay at their defaults.

        Where its `distill` is None, half of the loss asks the dense program, if the task can be distilled.
        """
        names = [field.name for field in fields(cls) if hasattr(options, field.name)]
        values: dict[str, Any] = {name: getattr(options, name) for name in names}
        if values["distill"] is None:
            values["distill"] = DISTILL if task.is_classification or task.distill else 0.0
        return cls(**values)

    def check(self, task: Task | None = None) -> None:
        """Check every option, before any work is done for it.

        Args:
            task: What the training is for, where that is known.

        Raises:
            UsageError: An option out of range, an optimizer or schedule that does not exist, or a comparison with the
                teacher that the task knows no way to make.
        """
        bounds: dict[str, tuple[float, float]] = {
            "epochs": (0, math.inf),
            "batch_size": (1, math.inf),
            "weight_decay": (0, math.inf),
            "clip": (0, math.inf),
            "mixup": (0, math.inf),
            "features": (0, math.inf),
            "distill": (0, 1),
            "average": (0, 1),
            "workers": (0, math.inf),
            "checkpoint_seconds": (0, math.inf),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                limit = f"from {low:g} on" if high == math.inf else f"between {low:g} and {high:g}"
                raise UsageError(f"expected {name} {limit}, found {value}")
        if not self.temperature > 0 or (self.lr is not None and not self.lr > 0):
            raise UsageError(
                f"expected lr and temperature to be positive, found lr={self.lr} temperature={self.temperature}"
            )
        if self.mirror and not self.distill:
            raise UsageError(
                "mirror=true is about what the teacher says, and distill=0 does not ask; give distill= a share"
            )
        for name, kind in (("augment", Augment), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"expected {name} to be one of {', '.join(get_args(kind))}, found {getattr(self, name)!r}"
                )
        check_optim(self.optimizer, self.schedule, lr=self.lr)
        if task is not None:
            must_be_comparable(task, compares_outputs=self.distill > 0, mirror=self.mirror)

    def must_fit(self, program: Program, data: DataSource, *, processes: int) -> None:
        """Check that batches of this data can be made and that the program takes them, before anything is trained.

        Raises:
            DataError: There is no training set, its samples are too few for the processes, or these cannot share a
                batch equally.
            UsageError: The program takes batches of another size only, or blends need another; it has nothing to
                train, or the optimizer does not take parameters like its own.
        """
        build_optimizer(
            self.optimizer,
            trained_parameters(program).items(),
            lr=self.lr,
            weight_decay=self.weight_decay,
        )
        samples = len(cast("Sized", data.split("train")))
        batch_size = shared_batch_size(samples, self.batch_size, processes)
        share, fixed = batch_size // processes, program.fixed_batch
        if fixed is not None and fixed != share:
            advice = f"or train with batch_size={fixed * processes}"
            if fixed * processes > samples:
                advice = f"there are {samples} training samples"
            raise UsageError(
                f"the program takes batches of {fixed} samples only, found {share} per process; capture it with "
                f"{share} samples as example inputs, {advice}"
            )
        if self.mixup:
            must_keep_neighbours(batch_size, processes)


def trained_parameters(program: Program) -> dict[str, nn.Parameter]:
    """Return the parameters that a training moves, by name.

    Raises:
        UsageError: There are none.
    """
    found = {name: p for name, p in program.module.named_parameters() if p.requires_grad}
    if not found:
        raise UsageError(
            "expected parameters to train, found none that require gradients; call requires_grad_() on the model"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a training stands."""

    epoch: int
    """Epochs that are complete."""
    step: int
    """Steps of the present epoch that are complete."""
    steps_per_epoch: int
    """Steps of a whole epoch."""
    epochs: int
    """Epochs of the whole training."""
    module: nn.Module
    """The program's module, whose parameters are trained."""

    @property
    def steps(self) -> int:
        """Steps that are complete."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def fraction(self) -> float:
        """How much of the training is complete, from 0 to 1."""
        return self.steps / max(1, self.epochs * self.steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """What a surgery has made of the program in training."""

    program: Program
    """The program to go on with; its parameters have the names that they had."""
    slices: Slices
    """Parameter -> dimension -> indices that were kept, as in a plan."""


class Hook:
    """What a training pass adds to the engine; a subclass overrides what it needs.

    With several processes every one calls its own hook, with equal parameters: what a hook computes from them, and
    from nothing else, is equal everywhere.
    """

    def parameter_options(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any] | None:
        """Return optimizer options that this parameter has for itself, such as lr and weight_decay; None: the usual."""
        return None

    def before_epoch(self, moment: Moment) -> None:
        """Prepare an epoch; called again where a run goes on in the middle of one."""

    def extra_loss(self, moment: Moment) -> Tensor | None:
        """Return a scalar to add to the loss of this step."""
        return None

    def after_backward(self, moment: Moment) -> None:
        """Look at the gradients, or change them, before the optimizer uses them."""

    def after_step(self, moment: Moment) -> None:
        """Look at the parameters, or change them, after the optimizer has; `moment` counts the step."""

    def surgery(self, moment: Moment) -> Smaller | None:
        """Return a smaller program to go on with, once; None: no surgery now.

        It is asked before an epoch and between two steps; and after `load_state`, where the run that goes on had
        surgery before: then the answer leads from the program that was given to the one at that time.
        """
        return None

    def after_epoch(self, moment: Moment) -> Mapping[str, float]:
        """Return what to add to the metrics of this epoch."""
        return {}

    def gates_of(self, node: str) -> Tensor | None:
        """Return how much each channel of a node's tensor counts, in a shape that broadcasts to it; None: all do."""
        return None

    def macs(self) -> int | None:
        """Return the multiply-accumulates of the program as it stands, where they are known."""
        return None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides parameters: tensors, numbers, texts; lists and dicts of them."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
