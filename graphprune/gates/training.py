"""Training gates: a budget written in gates, the pressure that makes it hold, and the choice that comes out.

    loss = task + sum over limits  pressure * (usage(gates) - goal)                     the budget term
    pressure = scale * (integral + PROPORTIONAL * e),   e = (usage - goal) / (1 - limit)

``usage`` is what is left of the MACs, of the parameters, or of a group's channels, as products of sums of gates. The
goal falls from 1 to the limit while the gates are free; the integral of what is missing makes the usage follow it, and
``scale``, the size of the task's gradients of gates relative to those of the usage, makes that independent of the task.
Gates are moved by Adam, which divides by the root of the mean squared gradient - the Fisher information of a gate: what
the task depends on moves slowly.

For the last part of the training the gates stand still: `graphprune.budget.choose` makes the choice, with the gates as
scores, exactly at the target. What is trained from then on is the network that will be left: it is cut at once, and the
optimizer goes on with its part of the state.

Source: Kim et al. 2019, "Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks", section 3: the loss of
the task plus lambda ||rho - c(gates)||^2. A pressure that follows the distance, in place of a fixed lambda, is our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.budget import Choice, choose
from graphprune.cost import Cost, Keep
from graphprune.cut import cut_program
from graphprune.gates.function import LIMIT, GateCost, Gates
from graphprune.gates.insertion import Gated
from graphprune.labels.trace import TensorInfo
from graphprune.plan import Plan
from graphprune.target import Target
from graphprune.training import Hook, Moment, Smaller
from graphprune.units import Granularity

__all__ = ["Axes", "Budget", "GateHook"]

RAMP = 0.7
"""Part of the time with free gates in which the goal falls to the limit."""
PROPORTIONAL = 6.0
"""Pressure for a distance of the whole way, in multiples of the task's gradients."""
INTEGRAL = 20.0
"""Pressure that such a distance adds in the whole time with free gates."""
CROSSINGS = 12.0
"""A gate that is pushed one way all the time goes this many times from the middle to the end of its range."""
FIRST, SECOND = 0.9, 0.99
"""Decay of Adam's means."""


class Budget(nn.Module):
    """What is used of each resource that a target limits, as fractions of the program that is trained."""

    limits: Tensor
    """Shape (number of limits,)."""
    channels: Tensor
    group_of: Tensor

    def __init__(self, gated: Gated, target: Target) -> None:
        """Prepare the resources that `target` names."""
        super().__init__()
        self.target = target
        dense = gated.groups.cost.total()
        limits = target.limits(dense)
        self.cost = GateCost(gated.groups.cost, target.resources)
        found = [getattr(limits, n) / max(1e-12, getattr(dense, n)) for n in target.resources]
        units = gated.units
        groups, group_of = np.unique(units.group, return_inverse=True)
        if target.ratio is not None:
            found = [1.0 - target.ratio] * len(groups)
        self.register_buffer("limits", torch.tensor(found, dtype=torch.float64))
        self.register_buffer("channels", torch.from_numpy(units.channels))
        self.register_buffer("group_of", torch.from_numpy(group_of[units.owner]))

    def forward(self, gates: Tensor) -> Tensor:
        """Return the usage of every limited resource, in float64, from the gate of every coupled channel."""
        if self.target.ratio is not None:
            inside = gates.double()[self.channels]
            sizes = torch.zeros_like(self.limits).index_add(
                0, self.group_of, torch.ones_like(inside)
            )
            return torch.zeros_like(self.limits).index_add(0, self.group_of, inside) / sizes
        used: Tensor = self.cost(gates)
        return used


class GateHook(Hook):
    """Moves the gates of a gated program towards a target, and freezes them at a choice that meets it."""

    def __init__(
        self,
        gated: Gated,
        target: Target,
        *,
        granularity: Sequence[Granularity],
        round_to: int | Literal["auto"],
        lr: float | None,
        penalty: float,
        frozen: float,
    ) -> None:
        """Check that the target can be reached.

        Args:
            gated: What is trained.
            target: What must be reached.
            granularity: What may go.
            round_to: As for `graphprune.budget.choose`.
            lr: Step of the gates; None: from the length of the training.
            penalty: Factor of the pressure.
            frozen: Part of the training, at its end, in which the gates stand still.

        Raises:
            TargetError: No choice reaches the target.
        """
        self.gated = gated
        self.gates = gated.gates
        self.target = target
        self.granularity = tuple(granularity)
        self.round_to = round_to
        self.lr = lr
        self.penalty = penalty
        self.frozen = frozen
        self.budget = Budget(gated, target)
        self.axes = Axes(gated)
        weight = self.gates.weight.detach()
        self.order = weight.clone()
        self.moments = torch.zeros(2, len(weight), dtype=torch.float64)
        self.task_square = torch.zeros((), dtype=torch.float64)
        self.integral = torch.zeros_like(self.budget.limits)
        self.steps = 0
        self.choice: Choice | None = None
        self.is_cut = False
        self.own_cost = gated.groups.cost.total()
        self.now = self.own_cost
        self._choose()

    # What the engine calls

    def before_epoch(self, moment: Moment) -> None:
        """Come to the device where the gates are; freeze gates that are never free."""
        device = self.gates.weight.device
        self.budget.to(device)
        self.axes.to(device)
        for name in ("moments", "task_square", "integral"):
            setattr(self, name, getattr(self, name).to(device))
        self._freeze_when_due(moment)

    def extra_loss(self, moment: Moment) -> Tensor | None:
        """Return the budget term, and note its own gradient."""
        weight = self.gates.weight
        if self.gates.is_frozen:
            # Until the cut, several processes expect a gradient of every parameter.
            return None if self.is_cut else 0.0 * weight.sum()
        free = self._free_steps(moment)
        usage = self.budget(self.gates())
        limits = self.budget.limits
        goal = 1.0 - (1.0 - limits) * min(1.0, (moment.steps + 1) / (RAMP * free))
        missing = usage - goal
        with torch.no_grad():
            relative = missing / (1.0 - limits).clamp(min=0.05)
            self.integral += INTEGRAL / free * relative
            wanted = self.penalty * (self.integral + PROPORTIONAL * relative)
        (unit,) = torch.autograd.grad(usage.sum(), weight, retain_graph=True)
        bias = 1.0 - SECOND**self.steps if self.steps else 1.0
        scale = (self.task_square / bias).sqrt() / unit.double().square().mean().sqrt().clamp(
            min=1e-30
        )
        term: Tensor = (scale * wanted * missing).sum()
        (self.push,) = torch.autograd.grad(term, weight, retain_graph=True)
        return term.to(weight.dtype)

    def after_backward(self, moment: Moment) -> None:
        """Move the gates; the optimizer has no part in it."""
        weight = self.gates.weight
        gradient, weight.grad = weight.grad, None
        if self.gates.is_frozen or gradient is None:
            return
        self.steps += 1
        task = (gradient - self.push).double()
        self.task_square.lerp_(task.square().mean(), 1.0 - SECOND)
        first, second = self.moments
        first.lerp_(gradient.double(), 1.0 - FIRST)
        second.lerp_(gradient.double().square(), 1.0 - SECOND)
        mean = first / (1.0 - FIRST**self.steps)
        root = (second / (1.0 - SECOND**self.steps)).sqrt()
        lr = CROSSINGS * LIMIT / self._free_steps(moment) if self.lr is None else self.lr
        with torch.no_grad():
            weight.sub_((lr * mean / (root + 1e-30)).to(weight.dtype)).clamp_(-LIMIT, LIMIT)
        self.axes.open_one(self.gates)

    def after_step(self, moment: Moment) -> None:
        """Freeze the gates when their time is over."""
        self._freeze_when_due(moment)

    def surgery(self, moment: Moment) -> Smaller | None:
        """Cut off what the frozen gates shut."""
        if self.choice is None or self.is_cut:
            return None
        self.is_cut = True
        program, keep = self.gated.original.clone(), self.choice.keep
        self.gated.to_original(program)
        plan = Plan.of(program, self.gated.groups, keep)
        return Smaller(
            program=cut_program(program, self.gated.groups, keep).program, slices=plan.slices
        )

    def after_epoch(self, moment: Moment) -> Mapping[str, float]:
        """Return what is open."""
        self.now = self._cost(self._keep())
        dense = self.target.whole(self.gated.groups.cost.total())
        return {
            "gates_open": float((self.gates.weight >= 0).sum()),
            "gates_macs": self.now.macs / max(1, dense.macs),
            "gates_params": self.now.params / max(1, dense.params),
        }

    def gates_of(self, node: str) -> Tensor | None:
        """Return the gates of the channels of a node's tensor, which still holds those that are shut."""
        groups = self.gated.groups
        info = groups.labels.values.get(node)
        if self.is_cut or not isinstance(info, TensorInfo) or not info.fields:
            return None
        gates = self.gates()
        each = (gates[groups.channel_of[f.over(len(info.shape))]] for f in info.fields)
        product: Tensor = reduce(torch.mul, each)
        return product

    def macs(self) -> int:
        """Return the multiply-accumulates of what was open after the last epoch."""
        return self.now.macs

    def state(self) -> dict[str, Any]:
        """Return the gates, which are no part of the program once it is cut, and what moves them."""
        return {
            "weight": self.gates.weight.detach(),
            "keep": self.gates.keep,
            "moments": self.moments,
            "task_square": self.task_square,
            "integral": self.integral,
            "steps": self.steps,
            "is_frozen": self.gates.is_frozen,
            "heads": 0 if self.choice is None else self.choice.heads,
            "own_cost": astuple(self.own_cost),
            "now": astuple(self.now),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        for name in ("moments", "task_square", "integral"):
            setattr(self, name, state[name].clone())
        self.steps = state["steps"]
        with torch.no_grad():
            self.gates.weight.copy_(state["weight"])
            self.gates.keep.copy_(state["keep"])
        self.gates.is_frozen = state["is_frozen"]
        self.own_cost, self.now = Cost(*state["own_cost"]), Cost(*state["now"])
        if self.gates.is_frozen:
            keep = self.gates.keep.cpu().numpy() > 0
            self.choice = Choice(keep, self._cost(keep), state["heads"])

    # The choice

    def freeze(self) -> Choice:
        """Return the choice that the gates come to, and make the gates those of it; once, then it stays."""
        if self.choice is None:
            self.own_cost = self._cost(self._keep())
            self.choice = self._choose()
            self.gates.freeze(torch.from_numpy(self.choice.keep).to(self.gates.keep))
            units = self.gated.units
            stays = np.bincount(units.owner, self.choice.keep[units.channels]) > 0
            with torch.no_grad():
                weight = self.gates.weight
                open_ = torch.from_numpy(stays).to(weight.device)
                weight.copy_(torch.where(open_, weight.clamp(min=1e-3), weight.clamp(max=-1e-3)))
            self.now = self.choice.cost
        return self.choice

    def _freeze_when_due(self, moment: Moment) -> None:
        if moment.steps >= self._free_steps(moment) and not self.gates.is_frozen:
            self.freeze()

    def _free_steps(self, moment: Moment) -> int:
        return max(1, round((1.0 - self.frozen) * moment.epochs * moment.steps_per_epoch))

    def _choose(self) -> Choice:
        return choose(
            self.gated.groups,
            self._scores(),
            self.target,
            granularity=self.granularity,
            round_to=self.round_to,
        )

    def _scores(self) -> np.ndarray:
        """Return a score per coupled channel: gates that are shut far below all others, no two units alike."""
        weight = self.gates.weight.detach().double().cpu()
        order = torch.argsort(torch.argsort(self.order.cpu(), stable=True))
        values = torch.exp(4.0 * weight) * torch.where(weight >= 0, 1.0, 1e-6)
        values *= 1.0 + 1e-6 * (order + 1) / max(1, len(order))
        padded = torch.cat([values, values.new_ones(1)])
        scores: np.ndarray = padded[self.gates.unit_of.cpu()].prod(0).numpy()
        return scores

    def _keep(self) -> Keep:
        """Return the channels that stay as the gates are."""
        with torch.no_grad():
            keep = self.gates().cpu().numpy() > 0
        return self.gated.groups.close(keep)

    def _cost(self, keep: Keep) -> Cost:
        return self.gated.groups.cost.total(keep)


class Axes(nn.Module):
    """The labelled dimensions of all tensors: at least one channel of each stays open."""

    channels: Tensor
    axis_of: Tensor

    def __init__(self, gated: Gated) -> None:
        """Take the dimensions from the analysis."""
        super().__init__()
        axes = gated.groups.axes
        none = np.zeros(0, np.int64)
        self.number = len(axes)
        self.register_buffer("channels", torch.from_numpy(np.concatenate([none, *axes])))
        self.register_buffer(
            "axis_of", torch.from_numpy(np.repeat(np.arange(len(axes)), [len(a) for a in axes]))
        )

    @torch.no_grad()
    def open_one(self, gates: Gates) -> None:
        """Open the best unit of every dimension that has none open."""
        level = gates.levels()[self.channels]
        best = level.new_full((self.number,), -torch.inf)
        best.scatter_reduce_(0, self.axis_of, level, "amax")
        is_last = (level == best[self.axis_of]) & (best < 0)[self.axis_of]
        flags = torch.zeros(gates.unit_of.shape[1], device=level.device)
        gates.open_units(flags.index_add(0, self.channels, is_last.float()))
