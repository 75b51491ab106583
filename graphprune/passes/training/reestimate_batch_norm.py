"""Re-estimates the running statistics of batch norms from data, because a cut shifts what flows into them.

How is in `graphprune.training.running_statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphprune.contract import Context, Pass, TrainingResult
from graphprune.errors import DataError
from graphprune.outcome import Kept
from graphprune.program import Program
from graphprune.training.drawn_samples import DrawnSamples
from graphprune.training.running_statistics import RunningStatistics
from graphprune.training.samples import told_by_shape

__all__ = ["ReestimateBatchNorm"]


@dataclass(frozen=True, kw_only=True)
class ReestimateBatchNorm(Pass):
    """Replace every batch norm's running mean and variance by their average over training batches.

    The program that comes in stays as it is. The same data and seed give the same statistics.
    """

    name: ClassVar[str] = "reestimate-batch-norm"

    num_samples: int = 1024
    """How many training samples to use, drawn at random."""
    batch_size: int = 128
    """Samples in a batch; at least 2, because one sample has no variance."""
    task: str = ""
    """How samples are read, package.module:factory of a graphprune.training.Task; empty: (inputs, label)."""

    def run(self, program: Program, context: Context) -> TrainingResult:
        """Estimate, and return a clone with the new statistics."""
        clone = program.clone()
        home = next((t.device for _, t in clone.named_tensors()), torch.device("cpu"))
        clone.module.to(context.device)
        statistics = RunningStatistics(clone.module)
        if not statistics.has_batch_norms:
            return TrainingResult(program=program, modified=False, metrics={"batch_norms": 0.0})
        if self.num_samples < 2 or self.batch_size < 2:
            raise DataError(
                f"{self.name} needs at least 2 samples in a batch, found "
                f"num_samples={self.num_samples} batch_size={self.batch_size}"
            )
        if program.fixed_batch == 1:
            why = f"stay as they are: {program.source} takes one sample at a time, which says nothing of their spread"
            kept = (Kept("statistics of batch norms", why),)
            return TrainingResult(program=program, modified=False, kept=kept)
        drawn = DrawnSamples.of(self, program, context)
        samples = 0
        with context.progress.task("re-estimate batch norm", len(drawn)) as task:
            for inputs in drawn:
                # A last batch of one sample has no variance; the ones before it have been counted.
                if (count := len(inputs[0])) > 1 or not samples:
                    with told_by_shape(program, inputs):
                        statistics.look(*(t.to(context.device) for t in inputs))
                    samples += count
                task.advance()
        modified = statistics.write()
        clone.module.to(home)
        metrics = {"batch_norms": float(len(statistics)), "samples": float(samples)}
        return TrainingResult(
            program=clone if modified else program, modified=modified, metrics=metrics
        )
