"""Fine-tunes a program: the training that gives back what a cut has cost.

The defaults are those that the literature uses on pruned CIFAR networks: SGD with Nesterov momentum 0.9, a cosine from
a tenth of the usual learning rate, weight decay 5e-4, batches of 128, random crops and mirror images; and, because the
dense program is at hand, half of the loss asks for the logits of the dense program (Hinton et al. 2015).

Sources: Renda, Frankle and Carbin 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", section 2;
Fang et al. 2023, "DepGraph", section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphprune.contract import Context, Pass, TrainingResult
from graphprune.devices import process_count
from graphprune.errors import DataError
from graphprune.groups import analyze
from graphprune.program import Program
from graphprune.training import Hook, Moment, Recipe, Trainer, load_task
from graphprune.training.batches import Augment
from graphprune.training.metrics import publish
from graphprune.training.processes import Precision

__all__ = ["FineTune"]


@dataclass(frozen=True, kw_only=True)
class FineTune(Pass):
    """Train every weight for some epochs, learning from the labels and from the dense program.

    The program that comes in stays as it is. The same data and seed give the same weights on a CPU; a run that was
    interrupted goes on from its checkpoint and ends with the same weights too.
    """

    name: ClassVar[str] = "fine-tune"

    epochs: int = 10
    """Passes over the training set."""
    lr: float | None = None
    """Learning rate; none: 0.02 for sgd, torch's own default for others."""
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
    average: float = 0.0
    """Decay of a moving average of the weights, which takes their place; norms are settled on it. 0: no average."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    augment: Augment = "auto"
    """How training images are varied; auto: crop-flip for small colour images, else none."""
    mixup: float = 0.0
    """Each image is blended with another, by a share from Beta(mixup, mixup); 0: images stay as they are."""
    precision: Precision = "auto"
    """What to compute in; auto: bfloat16 where the device is fast in it."""
    task: str = ""
    """package.module:factory of a graphprune.training.Task; empty: classification by cross-entropy."""
    keep_zeros: bool = False
    """Leave weights that are zero at zero, as `l-obs` has made them."""
    workers: int = 0
    """Processes that load data; 0: none besides the training process."""
    checkpoint_seconds: float = 60.0
    """How often the state is kept between the ends of epochs."""

    def check(self, context: Context) -> None:
        """Look at the recipe, the task and the data."""
        task = load_task(self.task)
        recipe = Recipe.of(self, task)
        recipe.check(task)
        if context.data is None:
            raise DataError(f"{self.name} expected training data, found none; give data= or --data")
        recipe.must_fit(context.dense, context.data, processes=process_count())

    def run(self, program: Program, context: Context) -> TrainingResult:
        """Train a clone, and return it with the metrics of the last epoch."""
        self.check(context)
        assert context.data is not None
        task = load_task(self.task)
        recipe = Recipe.of(self, task)
        clone = program.clone()
        trainer = Trainer(
            program=clone,
            recipe=recipe,
            data=context.data,
            task=task,
            teacher=context.dense if recipe.distill or self.features else None,
            hooks=[_Zeros(clone)] if self.keep_zeros else [],
            device=context.device,
            seed=context.seed,
            progress=context.progress,
            checkpoint=context.checkpoint,
            resume=context.resume,
            name=self.spec(),
            macs=analyze(program).cost.macs,
        )
        outcome = trainer.fit()
        publish(outcome.history, out=context.out, checkpoint=context.checkpoint)
        modified = _differ(program, clone)
        return TrainingResult(
            program=clone if modified else program,
            modified=modified,
            metrics={
                f"{self.name}.{key}": float(value)
                for key, value in outcome.last.items()
                if isinstance(value, (int, float))
            },
        )


class _Zeros(Hook):
    """Keeps what is zero at zero: no gradient, so no momentum, and weight decay leaves a zero alone."""

    def __init__(self, program: Program) -> None:
        self.zeros = {
            name: parameter.detach() == 0
            for name, parameter in program.module.named_parameters()
            if parameter.dim() > 1
        }

    def after_backward(self, moment: Moment) -> None:
        for name, parameter in moment.module.named_parameters():
            if name in self.zeros and parameter.grad is not None:
                self.zeros[name] = self.zeros[name].to(parameter.device)
                parameter.grad.masked_fill_(self.zeros[name], 0.0)


def _differ(before: Program, after: Program) -> bool:
    pairs = zip(before.named_tensors(), after.named_tensors(), strict=True)
    return any(not torch.equal(a, b) for (_, a), (_, b) in pairs)
