"""The training engine: every pass that learns trains with this one loop.

accelerate says where and in what precision to compute and joins several processes; the training form (`forms`) makes
a captured program trainable; batches follow from (seed, epoch) (`batches`); what a pass needs besides comes in as a
`Hook` (`recipe`). The state after any step is complete (`checkpoint`): a run that goes on from it ends with the same
weights as one that was never interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.checkpoint import Checkpoint, absolute_sums
from graphprune.data import DataSource
from graphprune.errors import TrainingError
from graphprune.plan import fingerprint
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress
from graphprune.training import randomness
from graphprune.training.batches import Batches
from graphprune.training.evaluation import evaluate, settle_norms
from graphprune.training.metrics import EVENTS, EventWriter
from graphprune.training.mixup import Blend
from graphprune.training.optim import build_optimizer, build_schedule
from graphprune.training.processes import accelerated, resolve_precision
from graphprune.training.recipe import Hook, Moment, Recipe
from graphprune.training.state_surgery import carry_optimizer
from graphprune.training.student import Student, lay_down
from graphprune.training.task import Task, classification
from graphprune.training.words import Words

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Outcome", "Trainer"]

STATISTICS_SAMPLES = 2048
"""Training samples that the batch norms of averaged weights see, in whole batches; fewer where there are fewer."""

AGREE_STEPS = 100
"""With several processes, how often the first one says whether a checkpoint is due."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training came to."""

    program: Program
    """The trained program: the one that was given, or what surgery has made of it."""
    history: tuple[Mapping[str, Any], ...]
    """The metrics of every epoch, as in metrics.jsonl."""
    metric_name: str
    """What the task's figure is called in them."""

    @property
    def last(self) -> Mapping[str, Any]:
        """Metrics of the last epoch; empty for a training of no epochs."""
        return self.history[-1] if self.history else {}


@dataclass(kw_only=True)
class Trainer:
    """Trains the parameters of a program in place; the graph stays as it is."""

    program: Program
    """What is trained; the caller's own clone. A hook may go on with a smaller one."""
    recipe: Recipe
    """How."""
    data: DataSource
    """Trains on its training set; after each epoch the metric is measured on its test set."""
    task: Task = field(default_factory=classification)
    """What for."""
    teacher: Program | None = None
    """Whose outputs to learn from, where the recipe distills."""
    hooks: Sequence[Hook] = ()
    """What the pass adds."""
    device: str = "cpu"
    """Where to compute."""
    seed: int = 0
    """Seed of the order of samples, of augmentation and of dropout."""
    progress: Progress = field(default_factory=SilentProgress)
    """Where to show progress."""
    checkpoint: Path | None = None
    """Folder for the state of the run; None: an interrupted run is lost."""
    resume: bool = False
    """Whether to go on from the state in that folder, if there is one."""
    name: str = "training"
    """What the run is called; part of what a checkpoint must agree with."""
    costs: str | None = None
    """Measured costs that decide where the training goes, if any; they too must agree."""
    macs: int | None = None
    """Multiply-accumulates of the program, to be shown; a hook may know better."""

    def fit(self) -> Outcome:
        """Train, and leave the program in evaluation mode where it was.

        Raises:
            UsageError: The recipe asks for what does not exist, or does not fit the program.
            DataError: The samples do not fit the program or the task.
            TrainingError: The loss is not finite.
            CheckpointError: The checkpoint cannot be read, or belongs to another run.
        """
        self.recipe.check(self.task)
        module = self.program.module
        home = next((t.device for _, t in self.program.named_tensors()), torch.device("cpu"))
        precision = resolve_precision(self.recipe.precision, self.device)
        output = next(node for node in module.graph.nodes if node.op == "output")
        # Of several outputs, the task may use one; then some parameters see no gradient.
        is_partial = len(pytree.tree_leaves(output.args[0])) > 1
        with (
            randomness.preserved(),
            accelerated(self.device, precision, may_skip_parameters=is_partial) as accelerator,
        ):
            try:
                with _Run(self, accelerator) as run:
                    run.go()
                lay_down(run.student.program, home)
                return Outcome(
                    program=run.student.program,
                    history=tuple(run.history),
                    metric_name=self.task.metric_name,
                )
            finally:
                lay_down(self.program, home)


class _Run:
    """One training under way."""

    def __init__(self, trainer: Trainer, accelerator: Accelerator) -> None:
        self.trainer = trainer
        self.accelerator = accelerator
        self.recipe = trainer.recipe
        self.task = trainer.task
        self.device: torch.device = accelerator.device
        self.is_main: bool = accelerator.is_main_process
        self.recipe.must_fit(trainer.program, trainer.data, processes=accelerator.num_processes)
        self.weights = absolute_sums(trainer.program)
        self.batches = self._batches()
        self.epoch = self.step = 0
        self.operated: int | None = None
        """The step before which the last surgery was; None: there was none."""
        self.student = Student(
            trainer.program,
            self.recipe,
            self.task,
            accelerator,
            dense=trainer.teacher,
            steps=self._all_steps(),
        )
        self._prepare()
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        randomness.seed_all(trainer.seed + accelerator.process_index)
        self.checkpoint = self._open_checkpoint()
        self.events = (
            EventWriter(self.checkpoint.folder / EVENTS, start=self.epoch)
            if self.checkpoint is not None and self.is_main
            else None
        )
        self.words = Words(trainer.name, self.task.metric_name, self.moment)
        self.clock = self.saved = time.monotonic()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            self.events.close()

    # What the run is made of

    def _batches(self) -> Batches:
        return Batches(
            self.trainer.data.split("train"),
            self.recipe.batch_size,
            seed=self.trainer.seed,
            collate=self.task.collate,
            augment=self.recipe.augment,
            workers=self.recipe.workers,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )

    def _prepare(self) -> None:
        optimizer = build_optimizer(
            self.recipe.optimizer,
            self.student.parameters.items(),
            lr=self.recipe.lr,
            weight_decay=self.recipe.weight_decay,
            options_of=self._options_of,
        )
        self.schedule = build_schedule(
            self.recipe.schedule,
            optimizer,
            epochs=self.recipe.epochs,
            steps_per_epoch=len(self.batches),
        )
        self.optimizer = self.accelerator.prepare(optimizer)

    def _all_steps(self) -> int:
        return self.recipe.epochs * len(self.batches)

    def _options_of(self, name: str, parameter: Any) -> Mapping[str, Any] | None:
        found = [hook.parameter_options(name, parameter) for hook in self.trainer.hooks]
        merged = {key: value for options in found if options for key, value in options.items()}
        return merged or None

    @property
    def moment(self) -> Moment:
        """Where the run stands."""
        return Moment(
            epoch=self.epoch,
            step=self.step,
            steps_per_epoch=len(self.batches),
            epochs=self.recipe.epochs,
            module=self.student.program.module,
        )

    # The loop

    def go(self) -> None:
        """Train from where the run stands to the end."""
        while self.epoch < self.recipe.epochs:
            for hook in self.trainer.hooks:
                hook.before_epoch(self.moment)
            self.operate()
            self.student.model.train()
            batches = self.batches.epoch(self.epoch, start=self.step)
            last = self.history[-1] if self.history else {}
            heading = self.words.epoch(self.moment, last, self._macs())
            with self.trainer.progress.task(heading, len(batches)) as task:
                for batch in batches:
                    self.train(batch)
                    self.step += 1
                    for hook in self.trainer.hooks:
                        hook.after_step(self.moment)
                    task.advance()
                    self.words.step(task, self.moment, self.sums, self._macs())
                    if self.step < len(self.batches):
                        self.operate()
                        if self._is_due():
                            self.save()
            self.finish_epoch()
            self.save()
        if self.student.average is not None:
            self.student.average.write()
            self.settle_norms()

    def operate(self, operated: int | None = None) -> None:
        """Go on with a smaller program where a hook has one, with its part of the average and of the optimizer.

        Args:
            operated: The step before which the surgery was, where a checkpoint is behind it.
        """
        for hook in self.trainer.hooks:
            if (surgery := hook.surgery(self.moment)) is None:
                continue
            before = self.student.program.module
            self.operated = self.moment.steps if operated is None else operated
            self.student = self.student.smaller(surgery, steps=self._all_steps() - self.operated)
            carry_optimizer(self.optimizer, before, surgery.program.module, surgery.slices)
            self.student.model.train()

    def train(self, batch: Any) -> None:
        """Do one step."""
        inputs, target = self.student.placement.place(batch)
        blend = self._blend(self.epoch, self.step)
        outputs, loss = self.student.loss(inputs, target, blend, self._gates())
        objective = loss
        for hook in self.trainer.hooks:
            extra = hook.extra_loss(self.moment)
            objective = objective if extra is None else objective + extra
        self.accelerator.backward(objective)
        for hook in self.trainer.hooks:
            hook.after_backward(self.moment)
        if self.recipe.clip:
            self.accelerator.clip_grad_norm_(self.student.parameters.values(), self.recipe.clip)
        self.optimizer.step()
        self.schedule.after_step()
        self.optimizer.zero_grad()
        if self.student.average is not None:
            self.student.average.update()
        with torch.no_grad():
            metric = self.task.metric(pytree.tree_map(_detached, outputs), target)
            self.sums += torch.stack([objective.detach().double(), metric.double()])

    def _blend(self, epoch: int, step: int) -> Blend | None:
        if not self.recipe.mixup:
            return None
        return Blend.draw(self.recipe.mixup, self.trainer.seed, epoch, step)

    def _gates(self) -> dict[str, Tensor]:
        """Return the gates of the channels that the taps hold, where a hook has any."""
        found = {
            name: hook.gates_of(name) for hook in self.trainer.hooks for name in self.student.taps
        }
        return {name: gates for name, gates in found.items() if gates is not None}

    def finish_epoch(self) -> None:
        """Measure, note the metrics of the epoch, and move on to the next one."""
        loss, train_metric = (self._reduced(self.sums) / len(self.batches)).tolist()
        self._must_be_finite(loss)
        line: dict[str, Any] = {
            "pass": self.trainer.name.partition("{")[0],
            "epoch": self.epoch + 1,
            "loss": loss,
            f"train_{self.task.metric_name}": train_metric,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        with self.averaged():
            test_loss, test_metric = evaluate(
                self.student.placement,
                self.trainer.data.split("test"),
                self.accelerator,
                progress=self.trainer.progress,
                workers=self.recipe.workers,
            )
        self._must_be_finite(test_loss, "the loss on the test set")
        line |= {"test_loss": test_loss, f"test_{self.task.metric_name}": test_metric}
        self.schedule.after_epoch(loss)
        self.epoch, self.step = self.epoch + 1, 0
        for hook in self.trainer.hooks:
            line |= {key: float(value) for key, value in hook.after_epoch(self.moment).items()}
        if (macs := self._macs()) is not None:
            line["macs"] = macs
        line["seconds"] = self.seconds + time.monotonic() - self.clock
        self.history.append(line)
        self.sums.zero_()
        if self.events is not None:
            self.events.write(line)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place, if there are any; the present ones come back when the context ends."""
        if self.student.average is None:
            yield
            return
        with self.student.average.in_place():
            self.settle_norms()
            yield

    def settle_norms(self) -> None:
        """Give the batch norms the statistics of the averaged weights, which are no average of statistics."""
        settle_norms(self.student.placement, self._looks(), self.accelerator)

    def _looks(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the inputs of the first training batches, as they were trained with."""
        count = min(len(self.batches), -(-STATISTICS_SAMPLES // self.batches.batch_size))
        for step, batch in enumerate(itertools.islice(self.batches.epoch(0), count)):
            inputs, _ = self.student.placement.place(batch)
            blend = self._blend(0, step)
            yield inputs if blend is None else blend.inputs(inputs)

    def _reduced(self, sums: Tensor) -> Tensor:
        """Return the mean over all processes."""
        reduced: Tensor = self.accelerator.reduce(sums.clone(), "mean")
        return reduced

    # State

    def _open_checkpoint(self) -> Checkpoint | None:
        trainer = self.trainer
        if trainer.checkpoint is None:
            return None
        checkpoint = Checkpoint(
            trainer.checkpoint,
            {
                "run": trainer.name,
                "recipe": repr(self.recipe),
                "program": fingerprint(trainer.program),
                "costs": trainer.costs,
                "weights": self.weights,
                "data": trainer.data.name,
                "seed": trainer.seed,
                "processes": self.accelerator.num_processes,
            },
        )
        if self.is_main:
            checkpoint.prepare(keep=trainer.resume)
        self.accelerator.wait_for_everyone()
        if trainer.resume and (state := checkpoint.load()) is not None:
            self._load(state)
        return checkpoint

    def save(self) -> None:
        """Put the present state on the disk, if there is a folder for it."""
        if self.checkpoint is None:
            return
        from accelerate.utils import gather_object

        generators = gather_object([randomness.read_state()])
        self._must_be_finite(float(self.sums[0]))
        sums = self._reduced(self.sums)
        if self.is_main:
            self.checkpoint.save(
                {
                    "epoch": self.epoch,
                    "step": self.step,
                    "operated": self.operated,
                    "sums": sums,
                    "history": self.history,
                    "seconds": self.seconds + time.monotonic() - self.clock,
                    **self.student.state(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "hooks": [hook.state() for hook in self.trainer.hooks],
                    "generators": generators,
                }
            )
            self.checkpoint.write_metrics(self.history)
        self.saved = time.monotonic()

    def _load(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        for hook, own in zip(self.trainer.hooks, state["hooks"], strict=True):
            hook.load_state(own)
        if state["operated"] is not None:
            self.operate(state["operated"])
        self.student.load_state(state)
        self.sums.copy_(state["sums"])
        self.history = list(state["history"])
        self.seconds = state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        randomness.write_state(state["generators"][self.accelerator.process_index])

    def _is_due(self) -> bool:
        """Return whether it is time for a checkpoint; every process gives the same answer."""
        if self.checkpoint is None:
            return False
        is_due = time.monotonic() - self.saved >= self.recipe.checkpoint_seconds
        if self.accelerator.num_processes == 1:
            return is_due
        if self.step % AGREE_STEPS:
            return False
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor(int(is_due), device=self.device)).item())

    def _must_be_finite(self, loss: float, what: str = "the loss") -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"{what} became {loss} in epoch {self.epoch + 1} with lr="
                f'{self.optimizer.param_groups[0]["lr"]:.3g}; lower lr, warm up (schedule="cosine{{warmup=1}}"), '
                "or clip gradients (clip=1.0)"
            )

    def _macs(self) -> int | None:
        known = [m for hook in self.trainer.hooks if (m := hook.macs()) is not None]
        return known[-1] if known else self.trainer.macs


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
