"""Trainable gates: channels get gates, gates and weights are trained together, and what is shut in the end goes.

Source: Kim et al. 2019, "Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks" (arXiv 1904.10921; the
first version was called "Differentiable Pruning Method for Neural Networks").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from graphprune.budget import is_near, parse_round_to
from graphprune.contract import Context, Facts, Pass, TrainingResult
from graphprune.cost import Cost, Resource
from graphprune.cut import cut_program
from graphprune.devices import process_count
from graphprune.errors import DataError, PassError, UsageError
from graphprune.gates.function import SHAPES, Shape
from graphprune.gates.insertion import Gated, insert_gates
from graphprune.gates.training import GateHook
from graphprune.groups import DependencyGroups
from graphprune.outcome import Kept
from graphprune.passes.importance.magnitude import Magnitude
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.target import Target, parse_target
from graphprune.training import Outcome, Recipe, Trainer, load_task, write_slices
from graphprune.training.batches import Augment
from graphprune.training.metrics import publish
from graphprune.training.processes import Precision
from graphprune.units import parse_granularity
from graphprune.verify import verify_surgery

__all__ = ["TrainableGates"]

Shares = dict[Resource, float]
"""Fractions of the dense program."""


@dataclass(frozen=True, kw_only=True)
class TrainableGates(Pass):
    """Train weights together with a gate per channel under a budget, and remove what is shut in the end.

    The graph stays as it is; the plan that comes with it removes the channels. Whatever the gates do, the plan meets
    the target; how far they were from it by themselves is in the metrics. The program with the gates as they are in
    the end and the one that the plan leaves compute the same; the check ``gates`` proves it.
    """

    name: ClassVar[str] = "trainable-gates"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True
    chooses: ClassVar[bool] = True

    target: str = "macs=0.5"
    """Limits such as ``macs=0.5``, ``params=5M,latency=3ms`` or ``size=0.3``, or ``ratio=0.3`` of every group."""
    granularity: str = "channels"
    """What may go: ``channels``, ``heads``, or both with a comma."""
    round_to: str = "auto"
    """As for choose-channels."""
    epochs: int = 20
    """Passes over the training set."""
    frozen: float = 0.4
    """Part of them, at the end, in which the gates stand still and what they leave is trained."""
    shape: Shape = "one"
    """How a gate's gradient depends on its distance from the step."""
    gate_lr: float | None = None
    """Step of the gates; none: from the length of the training."""
    penalty: float = 1.0
    """Factor of the pressure towards the target."""
    lr: float | None = None
    """Learning rate of the weights; none: 0.02 for sgd, torch's own default for others."""
    optimizer: str = "sgd"
    """A class of torch.optim, or package.module:Class; options stand in braces: "adamw{betas=(0.9,0.95)}"."""
    schedule: str = "cosine"
    """cosine or constant, both with warmup=EPOCHS in braces, or a class of torch.optim.lr_scheduler."""
    weight_decay: float = 5e-4
    """Weight decay of everything but biases and norms."""
    batch_size: int = 128
    """Samples in a batch, over all processes."""
    distill: float | None = None
    """Share of the loss that asks for the dense program's logits; none: 0.5 where the task can be distilled, else 0."""
    temperature: float = 4.0
    """Temperature at which logits are compared."""
    mirror: bool = False
    """The dense program looks at mirror images too, and the mean of its logits counts; not for letters and digits."""
    features: float = 0.0
    """Weight of the distance from where the dense program attends to, stage by stage; 0: not compared."""
    clip: float = 0.0
    """Largest norm of all gradients of weights together; 0: no limit."""
    augment: Augment = "auto"
    """How training images are varied; auto: crop-flip for small colour images, else none."""
    precision: Precision = "auto"
    """What to compute in; auto: bfloat16 where the device is fast in it."""
    task: str = ""
    """package.module:factory of a graphprune.training.Task; empty: classification by cross-entropy."""
    workers: int = 0
    """Processes that load data; 0: none besides the training process."""
    checkpoint_seconds: float = 60.0
    """How often the state is kept between the ends of epochs."""

    def run(self, program: Program, context: Context) -> TrainingResult:
        """Train a clone with gates, and return it without them, with the plan that removes what is shut."""
        self.check(context)
        groups = context.need(DependencyGroups)
        target = parse_target(self.target).of(program, groups)
        granularity = parse_granularity(self.granularity)
        gated = insert_gates(
            program,
            groups,
            Magnitude().run(program, context),
            granularity=granularity,
            shape=self.shape,
        )
        if not len(gated.units):
            why = f"; {gated.kept[0].what}: {gated.kept[0].why}" if gated.kept else ""
            raise PassError(f"{self.name} found nothing that a gate could remove{why}")
        hook = GateHook(
            gated,
            target,
            granularity=granularity,
            round_to=parse_round_to(self.round_to),
            lr=self.gate_lr,
            penalty=self.penalty,
            frozen=self.frozen,
        )
        outcome = self._train(gated, hook, context)
        choice = hook.freeze()
        plan = Plan.of(
            program,
            groups,
            choice.keep,
            method=self.name,
            target=self.target,
            seed=context.seed,
            heads=choice.heads,
        )
        trained = program.clone()
        if hook.is_cut:
            for whole in (trained, gated.program):
                write_slices(whole.module, outcome.program.module, plan.slices)
        else:
            gated.to_original(trained)
        dense = groups.cost.total()
        checks = {}
        if context.verify:
            cut = cut_program(trained, groups, choice.keep).program
            checks["gates"] = verify_surgery(gated.program, cut)
        before = groups.cost.before(program)
        own, chosen = (_shares(cost, before, target) for cost in (hook.own_cost, choice.cost))
        return TrainingResult(
            program=trained,
            modified=True,
            metrics=self._metrics(outcome, own, chosen),
            facts=(groups, plan),
            kept=(
                *gated.kept,
                *self._distance(own, chosen, is_near=is_near(choice.cost, target, dense)),
            ),
            checks=checks,
        )

    def check(self, context: Context) -> None:
        """Look at the options, the recipe, the task and the data."""
        parse_target(self.target)
        parse_granularity(self.granularity)
        parse_round_to(self.round_to)
        task = load_task(self.task)
        recipe = Recipe.of(self, task)
        recipe.check(task)
        if context.data is None:
            raise DataError(f"{self.name} expected training data, found none; give data= or --data")
        recipe.must_fit(context.dense, context.data, processes=process_count())
        if self.shape not in SHAPES:
            raise UsageError(
                f"expected shape to be one of {', '.join(SHAPES)}, found {self.shape!r}"
            )
        if not 0 <= self.frozen < 1 or not 0 < self.penalty < math.inf:
            raise UsageError(
                "expected frozen from 0 to less than 1 and a positive penalty, "
                f"found frozen={self.frozen:g} penalty={self.penalty:g}"
            )
        if self.gate_lr is not None and not 0 < self.gate_lr < math.inf:
            raise UsageError(f"expected gate_lr to be positive, found {self.gate_lr:g}")

    def _train(self, gated: Gated, hook: GateHook, context: Context) -> Outcome:
        task = load_task(self.task)
        recipe = Recipe.of(self, task)
        assert context.data is not None
        measured, dense = gated.groups.cost.measured, gated.groups.cost.total()
        trainer = Trainer(
            program=gated.program,
            recipe=recipe,
            data=context.data,
            task=task,
            teacher=context.dense if recipe.distill or self.features else None,
            hooks=[hook],
            device=context.device,
            seed=context.seed,
            progress=context.progress,
            checkpoint=context.checkpoint,
            resume=context.resume,
            name=self.spec(),
            costs=" ".join(f"{name}={getattr(dense, name):.6g}" for name in measured) or None,
        )
        outcome = trainer.fit()
        publish(outcome.history, out=context.out, checkpoint=context.checkpoint)
        return outcome

    def _metrics(self, outcome: Outcome, own: Shares, chosen: Shares) -> dict[str, float]:
        last = {
            f"{self.name}.{key}": float(value)
            for key, value in outcome.last.items()
            if isinstance(value, (int, float))
        }
        return last | {
            f"{self.name}.{whose}_{name}": share
            for whose, shares in (("own", own), ("chosen", chosen))
            for name, share in shares.items()
        }

    def _distance(self, own: Shares, chosen: Shares, *, is_near: bool) -> Iterator[Kept]:
        """Say so where the gates are not within 1 % of the choice, or the choice not of the target."""
        choice = (
            f"the choice under target {self.target!r}, granularity={self.granularity} and "
            f"round_to={self.round_to} has {_text(chosen)}"
        )
        if max(abs(own[name] - share) for name, share in chosen.items()) > 0.01:
            yield Kept("gates", f"by themselves they came to {_text(own)}; {choice}")
        if not is_near:
            yield Kept(
                "target", f"{choice}: more than 1 % below, for what goes goes in larger steps"
            )


def _shares(cost: Cost, dense: Cost, target: Target) -> Shares:
    """Return what is left of the MACs, the parameters, and whatever else the target limits."""
    names: tuple[Resource, ...] = ("macs", "params", *target.resources)
    return {name: getattr(cost, name) / max(1e-12, getattr(dense, name)) for name in names}


def _text(shares: Shares) -> str:
    nouns = {"macs": "MACs", "params": "parameters"}
    return ", ".join(
        f"{share:.1%} of the {nouns.get(name, name)}" for name, share in shares.items()
    )
