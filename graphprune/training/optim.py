"""Optimizers and schedules by name: all of torch, any of your own, and two schedules that fill in the run's length.

    sgd   adamw   adamw{betas=(0.9,0.95)}   rmsprop{momentum=0.9}              torch.optim, any spelling of its name
    timm.optim:Muon{nesterov=true}   package.module:Class                     any other that can be imported
    cosine   cosine{warmup=1 final=0.01}   constant   one-cycle   step{step_size=5}   multi-step{milestones=(4,8)}

Options stand in braces, as in a pipeline. ``cosine`` and ``constant`` take ``warmup`` (epochs of a linear rise) and
move every step, as ``one-cycle`` and ``cyclic`` do; the others of ``torch.optim.lr_scheduler`` move every epoch, as
torch documents them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from graphprune import textform
from graphprune.errors import UsageError
from graphprune.named import find_callable

__all__ = ["ParameterOptions", "Schedule", "build_optimizer", "build_schedule", "check_optim"]

ParameterOptions = Callable[[str, nn.Parameter], Mapping[str, Any] | None]
"""Returns the optimizer options that one parameter has for itself, or None."""

_DEFAULTS: dict[type[Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.02, "momentum": 0.9, "nesterov": True}
}
"""Options that stand unless others are given; for other classes torch's own."""

_OWN = {"cosine": ("warmup", "final"), "constant": ("warmup",)}


def build_optimizer(
    text: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float | None,
    weight_decay: float,
    options_of: ParameterOptions = lambda name, parameter: None,
) -> Optimizer:
    """Return the optimizer that `text` names, over `parameters` in groups of equal options.

    Parameters with fewer than two dimensions (biases, the scales of norms) get no weight decay.

    Args:
        text: A class of ``torch.optim``, in any spelling, or ``package.module:Class``; with options in braces.
        parameters: Names and parameters.
        lr: Learning rate; None: the default of the class, for SGD 0.02.
        weight_decay: Weight decay of parameters with two dimensions and more, where `text` does not say it.
        options_of: What one parameter has for itself, such as a learning rate of its own.

    Raises:
        UsageError: No such optimizer, it does not take the options, or there are two learning rates.
    """
    kind, options = _optimizer(text)
    if lr is not None and options.get("lr", lr) != lr:
        raise UsageError(f"optimizer {text!r}: found lr={lr:g} besides; give one of the two")
    merged = {**_DEFAULTS.get(kind, {}), **options}
    if lr is not None:
        merged["lr"] = lr
    takes_decay = "weight_decay" in inspect.signature(kind).parameters
    if takes_decay:
        weight_decay = merged.pop("weight_decay", weight_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters:
        group: dict[str, Any] = {"weight_decay": weight_decay if parameter.dim() > 1 else 0.0}
        group.update(options_of(name, parameter) or {})
        groups.setdefault(repr(sorted(group.items())), {**group, "params": []})["params"].append(
            parameter
        )
    if not takes_decay:
        for group in groups.values():
            group.pop("weight_decay")
    try:
        return kind(list(groups.values()), **merged)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"optimizer {text!r}: {error}") from error


class Schedule:
    """The learning rate over a run; call `after_step` after every step and `after_epoch` after every epoch."""

    def __init__(self, scheduler: Any, *, is_per_step: bool) -> None:
        """Wrap a scheduler of torch."""
        self.scheduler = scheduler
        self.is_per_step = is_per_step

    def after_step(self) -> None:
        """Move a schedule that moves every step."""
        if self.is_per_step:
            self.scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """Move a schedule that moves every epoch; one that watches a loss gets that of the epoch."""
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif not self.is_per_step:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.scheduler.load_state_dict(state)


def build_schedule(
    text: str, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int
) -> Schedule:
    """Return the schedule that `text` names, for a run of this length.

    Raises:
        UsageError: No such schedule, or it does not take the options.
    """
    total = max(1, epochs * steps_per_epoch)
    name, options = _read("schedule", text)
    if name in _OWN:
        _own_options(text, name, options)
        warmup = float(options.get("warmup", 0.0)) * steps_per_epoch
        final = float(options.get("final", 0.0)) if name == "cosine" else 1.0

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1.0, total - warmup))
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))

        return Schedule(lr_scheduler.LambdaLR(optimizer, factor), is_per_step=True)
    kind = _scheduler(text, name)
    taken = inspect.signature(kind).parameters
    peaks = [group["lr"] for group in optimizer.param_groups]
    if kind is lr_scheduler.OneCycleLR:
        known: dict[str, Any] = {"max_lr": peaks, "total_steps": total}
    elif kind is lr_scheduler.CyclicLR:
        known = {
            "base_lr": [0.01 * lr for lr in peaks],
            "max_lr": peaks,
            "step_size_up": max(1, total // 4),
            "cycle_momentum": "momentum" in optimizer.param_groups[0],
        }
    else:
        known = {"T_max": max(1, epochs), "total_iters": max(1, epochs)}
        if kind is lr_scheduler.CosineAnnealingWarmRestarts:
            known = {"T_0": max(1, epochs)}
    # A list stands for one value per group, and where a scheduler compares the list with numbers it takes no tuple.
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    arguments = {**{k: v for k, v in known.items() if k in taken}, **given}
    missing = [
        p.name
        for p in list(taken.values())[1:]
        if p.default is p.empty and p.name not in arguments and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if missing:
        raise UsageError(
            f"schedule {text!r}: {kind.__name__} needs {', '.join(missing)}; "
            f"give {name}{{{missing[0]}=...}}, or another schedule such as cosine"
        )
    try:
        scheduler = kind(optimizer, **arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"schedule {text!r}: {error}") from error
    per_step = kind in (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)
    return Schedule(scheduler, is_per_step=per_step)


def check_optim(optimizer: str, schedule: str, *, lr: float | None = None) -> None:
    """Check that both texts name something, before any work is done for them.

    Raises:
        UsageError: An optimizer or a schedule that does not exist, or two learning rates.
    """
    kind, _ = _optimizer(optimizer)
    probe = nn.Parameter(torch.zeros(1, 1))
    # SGD takes any schedule; the real optimizer is built once the parameters are known.
    build_optimizer(optimizer, [("probe", probe)], lr=lr, weight_decay=0.0)
    is_cyclic = _read("schedule", schedule)[0] in ("cyclic", "one-cycle")
    stand_in = torch.optim.SGD([probe], lr=1.0, momentum=0.9)
    real = kind if is_cyclic else None
    build_schedule(
        schedule,
        stand_in
        if real is None
        else build_optimizer(optimizer, [("probe", probe)], lr=lr, weight_decay=0.0),
        epochs=2,
        steps_per_epoch=2,
    )


def _optimizer(text: str) -> tuple[type[Optimizer], dict[str, Any]]:
    name, options = _read("optimizer", text)
    if ":" in name:
        found = find_callable("optimizer", name, error=UsageError)
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise UsageError(
                f"optimizer {name!r}: expected a subclass of torch.optim.Optimizer, found {found!r}"
            )
        return found, options
    known = {
        _plain(k): v
        for k, v in vars(torch.optim).items()
        if isinstance(v, type) and issubclass(v, Optimizer) and v is not Optimizer
    }
    known.pop("lbfgs", None)  # evaluates the loss several times in one step
    known.pop("sparseadam", None)  # for sparse gradients only
    if (kind := known.get(_plain(name))) is None:
        names = ", ".join(sorted(known))
        raise UsageError(f"optimizer: expected one of {names}, found {name!r}")
    return kind, options


def _scheduler(text: str, name: str) -> type[LRScheduler]:
    known = {
        re.sub("lr$", "", _plain(k)): v
        for k, v in vars(lr_scheduler).items()
        if isinstance(v, type)
        and issubclass(v, LRScheduler)
        and v not in (LRScheduler, *_NEED_FUNCTIONS)
        and not k.startswith("_")  # an old name of the base class
    }
    found: type[LRScheduler] | None = known.get(re.sub("lr$", "", _plain(name)))
    if found is None:
        names = ", ".join(dict.fromkeys([*_OWN, *sorted(known)]))
        raise UsageError(f"schedule: expected one of {names}, found {name!r}")
    return found


_NEED_FUNCTIONS: tuple[type[LRScheduler], ...] = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
)
"""Schedules that are made of functions or of other schedules, which no text can spell."""


def _own_options(text: str, name: str, options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if key not in _OWN[name]:
            raise UsageError(
                f"schedule {text!r}: {name} takes {', '.join(_OWN[name])}, found {key!r}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value:
            raise UsageError(
                f"schedule {text!r}: expected {key} to be a number from 0 on, found {value!r}"
            )


def _read(what: str, text: str) -> tuple[str, dict[str, Any]]:
    parts = textform.parse(text)
    if len(parts) != 1:
        raise UsageError(f"{what}: expected one name with options, found {text!r}")
    values: dict[str, Any] = {}
    for key, raw in parts[0].options.items():
        values[key] = (
            tuple(textform.interpret(word) for word in raw)
            if isinstance(raw, tuple)
            else textform.interpret(raw)
        )
    return parts[0].name, values


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
